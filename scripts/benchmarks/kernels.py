"""Time of linear layers, ours beside torch's and llama.cpp's, against the targets.

    scripts/bench kernels [--ggml FOLDER] [--instruction-set avx2] [--json FILE]
    scripts/bench kernels --table eval/results/kernels.json    # tables of what was measured before
    scripts/bench kernels --table eval/results/kernels.json --plot FOLDER   # rooflines, PNG
    scripts/bench kernels --list                               # the groups, for --groups

Within a group all engines take turns in each round, and medians over the rounds count, so a slow
spell of the machine hits all alike; ratios are medians of the rounds' own ratios. cold: calls cycle
over copies of the weight that no cache holds together; warm: one copy. Ours is the op that a packed
layer calls; "read" is a pass over the same bytes that does nothing with them. --ggml: a folder that
scripts/benchmarks/ggml/build filled. With --instruction-set avx2 torch and llama.cpp are held to
AVX2, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from harness import calls, machine, peak, results, roofline, tables, torch_layers
from harness.ggml import Ggml, Type
from harness.packed import Prepared
from harness.timing import Engine, take_turns
from harness.work import COLD_MIB, GROUPS, Group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instruction-set", choices=("scalar", "avx2", "avx512", "amx"),
                        help="bitlm uses at most this one; the peers are held to AVX2 as well")
    parser.add_argument("--ggml", type=Path, metavar="FOLDER", help="builds of llama.cpp")
    parser.add_argument("--groups", nargs="+", metavar="PART", help="parts of names of groups")
    parser.add_argument("--engines", nargs="+", metavar="PART", help="parts of names of engines")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.06, help="of an engine in a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print what FILE holds")
    parser.add_argument("--plot", type=Path, metavar="FOLDER",
                        help="write a roofline of each block, roofline-*.png")
    parser.add_argument("--list", action="store_true", help="only print the groups")
    options = parser.parse_args()
    if options.table:
        blocks = results.load(options.table)
        print("\n\n".join(map(tables.report, blocks)))
        draw(blocks, options.plot)
        return
    if options.list:
        print("\n".join(f"{group.name}: {len(group.engines)} engines" for group in GROUPS))
        return
    used = machine.limit(options.instruction_set)
    ggml = Ggml(options.ggml, used) if options.ggml else None
    block = {"machine": machine.describe() | {"instruction_set": used},
             "settings": {"rounds": options.rounds, "seconds": options.seconds,
                          "cold_mib": COLD_MIB},
             "peak": peak.measure(used), "groups": [], "errors": {}}
    with torch.inference_mode():
        for group in GROUPS:
            if _chosen(group.name, options.groups):
                block["groups"].append(measure(group, ggml, options, block["errors"]))
    if ggml:
        ggml.close()
    print(tables.report(block))
    if options.json:
        results.save(options.json, block)
    draw([block], options.plot)


def draw(blocks: list[results.Block], folder: Path | None) -> None:
    """Write the rooflines of blocks into a folder, if there is one."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        found = block["machine"]
        name = f"roofline-{found['instruction_set']}-{found['family']}-{found['model']}.png"
        roofline.plot(block, folder / name)


def _chosen(name: str, parts: list[str] | None) -> bool:
    return not parts or any(part in name for part in parts)


def measure(group: Group, ggml: Ggml | None, options: argparse.Namespace,
            errors: dict[str, float]) -> dict[str, object]:
    """Time one group; adds the errors of products that were not checked yet to `errors`."""
    start = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(group.threads)
    makers = _Makers(group, ggml)
    engines = [makers.make(name, batch) for name, batch in group.engines
               if _chosen(name, options.engines) and (ggml or not name.startswith("ggml"))]
    for name, weight, activation in makers.products:
        if name not in errors:
            errors[name] = weight.error(activation)
    with _busy_core() if group.busy else nullcontext():
        rounds = take_turns(engines, options.rounds, options.seconds)
    rows = [{"engine": engine.name, "batch": engine.batch, "us": [round(us, 3) for us in times]}
            for engine, times in zip(engines, rounds)]
    for engine, row in zip(engines, rows):
        row |= makers.notes(engine)
    if ggml:
        ggml.ask("drop")
    print(f"{group.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return {"name": group.name, "rows": group.rows, "columns": group.columns, "cold": group.cold,
            "threads": group.threads, "engines": rows}


@contextmanager
def _busy_core() -> Iterator[None]:
    """Run a process that computes all the while."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


class _Makers:
    """Makes the engines of a group; engines of one weight share its copies."""

    def __init__(self, group: Group, ggml: Ggml | None) -> None:
        self.group, self.ggml = group, ggml
        self.cold_mib = COLD_MIB if group.cold else 0
        self.products: list[tuple[str, Prepared, str]] = []
        self._weights: dict[str, object] = {}

    def make(self, name: str, batch: int) -> Engine:
        kind, _, rest = name.partition(" ")
        rows, columns, threads = self.group.rows, self.group.columns, self.group.threads
        x = torch.randn(batch, columns)
        if kind == "torch":
            layers = self._once(name, lambda: torch_layers.make(name, rows, columns,
                                                                self.cold_mib << 20))
            return torch_layers.engine(name, layers, x)
        if kind == "ggml":
            found = self._once(name, lambda: self.ggml.ask("prepare", rows, columns, rest,
                                                           self.cold_mib))
            return Type(self.ggml, rest, batch, threads, [row["name"] for row in found])
        if kind == "call":
            return calls.engine(rest, self._prepared("binary"), x)
        if kind == "read":
            return self._prepared(rest).read(threads)
        if kind == "prepare":
            return self._prepared(rest).prepare(threads)
        form, _, activation = rest.rpartition(" ")
        weight = self._prepared(form)
        if activation != "int1":  # no rounding of given activations: they are levels already
            self.products.append((name, weight, activation))
        return weight.product(activation, x)

    def notes(self, engine: Engine) -> dict[str, object]:
        """Return bytes of the weight and the variant that a peer used."""
        kind, _, rest = engine.name.partition(" ")
        if kind == "ggml":
            sizes = {row["name"]: row["bytes"] for row in self._weights[engine.name]}
            return {"bytes": sizes[engine.detail], "detail": f"ggml {engine.detail}"}
        if kind == "torch":
            size = {"torch fp32": 4, "torch bf16": 2, "torch int8": 1}[engine.name]
            return {"bytes": size * self.group.rows * self.group.columns}
        if kind == "call":
            return {}
        form = rest if kind in ("read", "prepare") else rest.rpartition(" ")[0]
        return {"bytes": self._prepared(form).nbytes}

    def _prepared(self, form: str) -> Prepared:
        return self._once(f"prepared {form}", lambda: Prepared(
            form, self.group.rows, self.group.columns, self.cold_mib << 20))

    def _once(self, name: str, make):
        if name not in self._weights:
            self._weights[name] = make()
        return self._weights[name]


if __name__ == "__main__":
    main()
