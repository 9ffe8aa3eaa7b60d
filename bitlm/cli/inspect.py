"""`bitlm inspect`: what a packed checkpoint holds, from its headers alone."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer


def inspect(
    folder: Annotated[Path, typer.Argument(help="Packed model folder.")],
    verify: Annotated[bool, typer.Option("--verify",
                                         help="Read all tensors and check them.")] = False,
) -> None:
    """Show what a packed model holds."""
    from ..report import mib
    from .output import console, table

    found = examine(folder)
    screen = console()
    screen.print(table((str(folder), ""), found["headline"], left=True))
    screen.print("", table(("packed", "scheme", "weights", "size"),
                           [(kind, scheme, f"{numel:,}", mib(size))
                            for kind, scheme, numel, size in found["packed"]]))
    if found["dense"]:
        screen.print("", table(("dense", "weights", "why"), [
            (kind, f"{numel:,}", reason) for kind, reason, numel in found["dense"]], left=True))
    screen.print("", table(("layers", "on this CPU"), found["kernels"], left=True))
    if verify:
        from ..checkpoint import deep_verify
        from ..source import quiet

        with quiet():
            problems = deep_verify(folder)
        for problem in problems:
            typer.echo(f"bitlm: {problem}", err=True)
        if problems:
            raise typer.Exit(1)
        screen.print("\nverified: every tensor is what the configuration asks for")


def examine(folder: Path) -> dict[str, Any]:
    """Return what `inspect` shows: headline, packed and dense parts, kernels, as rows.

    Raises LoadError for a folder that holds no packed model, CheckpointError for damaged files.
    """
    import torch

    from ..checkpoint import checkpoint_files, read_headers, split_name
    from ..evaluate.load import LoadError, packed_config
    from ..plan import make_plan
    from ..report import activation_of, count_activations, describe, mib, plan_rows
    from ..source import quiet, skeleton

    if not folder.is_dir():
        raise LoadError(f"{folder} is no folder: give the folder that `bitlm quantize` wrote")
    quantization = packed_config(folder)
    if quantization is None:
        raise LoadError(f"{folder} holds no packed model: its config.json names no bitlm scheme")
    headers = read_headers(checkpoint_files(folder))
    with quiet():
        config, request = _read_config(folder, quantization)
        dtype = getattr(config, "dtype", None) or torch.float32
        plan = make_plan(skeleton(config, dtype), request)
    sizes = Counter()
    for name, header in headers.items():
        sizes[bool(split_name(name)[1])] += prod(header.shape) * header.dtype.itemsize
    total = sizes[True] + sizes[False]
    numel = plan.packed_numel + plan.dense_numel
    report = _report(folder)
    headline = [
        ("architecture", ", ".join(config.architectures or ["unknown"])),
        ("scheme", describe(request.scheme.to_dict())),
        ("activations", count_activations(map(activation_of, plan.entries))),
        ("format version", str(quantization.get("format_version", 1))),
        ("written by", str(quantization.get("producer") or "unknown")),
        ("source", str(quantization.get("source") or "unknown")),
        ("bits per weight, packed layers", f"{8 * sizes[True] / max(plan.packed_numel, 1):.3f}"),
        ("bits per weight, whole file", f"{8 * total / max(numel, 1):.3f}"),
        ("size", f"{mib(total)}: packed {mib(sizes[True])}, dense {mib(sizes[False])} "
                 f"(dense model: {mib(plan.source_bytes)})"),
    ]
    calibration = quantization.get("calibration")
    if calibration:
        headline.append(("calibration", f"{calibration.get('tokens', '?')} tokens of "
                                        f"{calibration.get('source', 'unknown text')}"))
    verdict = report.get("verdict") or {}
    if verdict:
        headline.append(("verdict", str(verdict.get("word"))))
    return {"headline": headline, "packed": plan_rows(plan), "dense": _dense_rows(plan.skipped),
            "kernels": _kernel_rows(plan, dtype)}


def _read_config(folder: Path, quantization: dict[str, Any]) -> tuple[Any, Any]:
    """Return the transformers config without its quantization, and what was asked of the model."""
    from transformers import AutoConfig

    from ..evaluate.load import LoadError
    from ..hf.config import BitlmConfig

    request = BitlmConfig(**quantization).request
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"{folder / 'config.json'} cannot be read: "
                        f"{str(error).strip().splitlines()[0]}") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config, request


def _dense_rows(skipped: Any) -> list[tuple[str, str, int]]:
    """Return (kind, reason, elements) of what is not packed, names without layer numbers."""
    rows: dict[tuple[str, str], int] = {}
    for each in skipped:
        key = _kind(each.name), each.reason
        rows[key] = rows.get(key, 0) + each.numel
    return [(kind, reason, numel) for (kind, reason), numel in rows.items()]


def _kernel_rows(plan: Any, dtype: Any) -> list[tuple[str, str]]:
    """Return (layers, native kernel or the reason for the reference), one row a reason."""
    from ..ops import cpu

    kinds: dict[str, dict[str, None]] = {}
    for entry in plan.entries:
        reason = "embedding look-ups have no kernel yet" if entry.target.role == "embedding" else \
            cpu.unsupported(entry.form, dtype)
        where = f"reference: {reason}" if reason else "native kernel"
        kinds.setdefault(where, {})[_kind(entry.name)] = None
    if len(kinds) == 1:
        return [("all packed layers", next(iter(kinds)))]
    return [(", ".join(names), where) for where, names in kinds.items()]


def _kind(name: str) -> str:
    return ".".join(part for part in name.removesuffix(".weight").split(".") if not part.isdigit())


def _report(folder: Path) -> dict[str, Any]:
    """Return bitlm_report.json, {} where it is missing or damaged: it is only extra."""
    try:
        found = json.loads((folder / "bitlm_report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

