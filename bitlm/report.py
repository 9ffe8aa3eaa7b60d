"""What a quantization did: as JSON, as Markdown, and as the model card of the output folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import log2
from typing import Any

from .plan import Entry, Plan
from .scheme import Scheme
from .verdict import Verdict


@dataclass
class Layer:
    """One packed weight in the report.

    activation: the mode and what it makes of the layer, "int8 (W1A8)"; "" for an embedding.
    """

    name: str
    shape: list[int]
    method: str
    bits: float
    bytes: int
    relative_error: float
    output_error: float | None = None
    note: str = ""
    activation: str = ""


@dataclass
class Report:
    """The result of `quantize`: sizes, coverage, errors per layer, the verdict and the times.

    bytes are measured on the written tensors. bits_packed: bits per weight of the packed layers,
    everything counted; bits_file: of the whole file.
    """

    model: str
    hub: bool  # model is an id of the hub, not a local folder's name
    out: str
    request: dict[str, Any]
    layers: list[Layer]
    skipped: list[dict[str, Any]]
    packed_bytes: int
    packed_numel: int
    dense_bytes: int
    dense_numel: int
    source_bytes: int
    calibration: dict[str, Any] | None = None
    verdict: Verdict | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    command: str = ""
    producer: str = ""

    @property
    def bits_packed(self) -> float:
        return 8 * self.packed_bytes / self.packed_numel

    @property
    def bits_file(self) -> float:
        return 8 * self.total_bytes / (self.packed_numel + self.dense_numel)

    @property
    def total_bytes(self) -> int:
        return self.packed_bytes + self.dense_bytes

    @property
    def relative_error(self) -> float:
        """Mean of ||W - What|| / ||W|| over the packed weights."""
        return sum(layer.relative_error for layer in self.layers) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        data = {key: value for key, value in vars(self).items() if key not in ("layers", "verdict")}
        data |= {"bits_packed": self.bits_packed, "bits_file": self.bits_file,
                 "total_bytes": self.total_bytes,
                 "verdict": self.verdict.to_dict() if self.verdict else None,
                 "layers": [{k: v for k, v in vars(layer).items() if v not in (None, "")}
                            for layer in self.layers]}
        return data

    def summary(self) -> list[tuple[str, str]]:
        """Return the headline figures as (what, value) rows."""
        rows = [("packed weights", f"{len(self.layers)} tensors, {self.packed_numel:,} weights"),
                ("bits per weight, packed layers", f"{self.bits_packed:.3f}"),
                ("bits per weight, whole file", f"{self.bits_file:.3f}"),
                ("size", f"{mib(self.total_bytes)} (dense: {mib(self.source_bytes)})"),
                ("mean relative weight error", f"{self.relative_error:.3f}"),
                ("activations", count_activations(layer.activation for layer in self.layers))]
        if self.calibration:
            rows.append(("calibration", f"{self.calibration['tokens']:,} tokens of "
                                        f"{self.calibration['source']}"))
        if self.verdict:
            rows.append(("verdict", self.verdict.sentence()))
            if self.verdict.advice:
                rows.append(("better", self.verdict.advice))
        return rows

    def markdown(self) -> str:
        """Return the report as Markdown: headline, coverage, layers."""
        lines = ["## Result", "", "| | |", "|---|---|"]
        lines += [f"| {what} | {value} |" for what, value in self.summary()]
        lines += ["", "## What was not packed", "", "| weight | elements | why |", "|---|---|---|"]
        lines += [f"| `{s['name']}` | {s['numel']:,} | {s['reason']} |" for s in self.skipped]
        lines += ["", "## Layers", "",
                  "| weight | shape | method | activations | bits per weight | relative error | "
                  "output error |", "|---|---|---|---|---|---|---|"]
        for layer in self.layers:
            output = "" if layer.output_error is None else f"{layer.output_error:.4f}"
            note = f" ({layer.note})" if layer.note else ""
            lines.append(f"| `{layer.name}` | {'x'.join(map(str, layer.shape))} | "
                         f"{layer.method}{note} | {layer.activation} | {layer.bits:.3f} | "
                         f"{layer.relative_error:.4f} | {output} |")
        return "\n".join(lines) + "\n"

    def card(self) -> str:
        """Return the model card (README.md of the output folder)."""
        title = self.out.rstrip("/").rpartition("/")[2]
        base = f"base_model: {self.model}\n" if self.hub else ""
        head = ["---", f"{base}library_name: transformers", "tags:", "- bitlm", "- 1-bit", "---",
                "", f"# {title}", "",
                f"`{self.model}` packed by {self.producer}.", "",
                "```", self.command, "```", "",
                "```python", "import bitlm  # pip install bitlm",
                "from transformers import AutoModel  # or the class for your task", "",
                f'model = AutoModel.from_pretrained("{title}")', "```", ""]
        return "\n".join(head) + "\n" + self.markdown()


def mib(size: int) -> str:
    """Return a byte count for people."""
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def precision(scheme: Scheme) -> str:
    """Return bits of codes and of activations in the usual short form, as W1.58A8.

    Salient weights count with their 8 bits; float and int16 activations, which lose nothing that
    16-bit floats would keep, are A16. A quantizer of the input says its own bits.
    """
    bits = scheme.planes * (log2(3) if scheme.method == "ternary" else 1)
    bits += scheme.salient * (8 - bits)
    inputs = 16 if scheme.activation == "float" else int(scheme.activation.lstrip("uint"))
    if scheme.input is not None:
        inputs = scheme.input.bits
    return f"W{bits:.3g}A{inputs}"


def activation_of(entry: Entry) -> str:
    """Return the mode of a planned layer, or the kind of its inputs' quantizer, with the short
    form; "" for an embedding."""
    mode = entry.scheme.input.kind if entry.scheme.input else entry.activation
    return mode and f"{mode} ({precision(entry.scheme)})"


def count_activations(modes: Iterable[str]) -> str:
    """Return modes of layers in one line, with how many have each where they differ; "" has none.

    `int8 (W1A8)`, or `int8 (W1A8): 12, float (W1A16): 2`.
    """
    counts = Counter(mode for mode in modes if mode)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{mode}: {count}" for mode, count in counts.most_common()) or "none"


def plan_rows(plan: Plan) -> list[tuple[str, str, int, int]]:
    """Return the plan as rows (module kind, scheme, weights, bytes), one a kind and scheme."""
    rows: dict[tuple[str, str], list[int]] = {}
    for entry in plan.entries:
        kind = ".".join(part for part in entry.name.removesuffix(".weight").split(".")
                        if not part.isdigit())
        key = kind, describe(entry.scheme.to_dict())
        count = rows.setdefault(key, [0, 0])
        count[0] += 0 if entry.target.tied else entry.target.numel
        count[1] += entry.nbytes()
    return [(*key, *count) for key, count in rows.items()]


def describe(scheme: dict[str, Any]) -> str:
    """Return a scheme dict in a few words: `binary planes=3 refit=10`."""
    rest = " ".join(f"{key}={value}" for key, value in scheme.items() if key != "method")
    return f"{scheme['method']} {rest}".strip()
