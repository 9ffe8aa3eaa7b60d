"""Time of one linear layer: torch's own beside bitlm's packed ones, in microseconds a call.

All engines take turns in each round, and the median over the rounds counts, so a slow spell of the
machine hits all alike. cold: calls cycle over copies of the weight that no cache holds together;
warm: one copy.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from torch import Tensor, nn

from bitlm.ops import library, packed_linear
from bitlm.ops.form import Form

FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd")
# name: planes, ternary, group size (None: one scale a row)
FORMS = {
    "bitlm binary g128": (1, False, 128),
    "bitlm binary row": (1, False, None),
    "bitlm ternary g128": (1, True, 128),
    "bitlm 3 planes g128": (3, False, 128),
}


@dataclass
class Engine:
    """One way to compute a layer: `call(copy number)`, with `copies` of its weight."""

    name: str
    call: Callable[[int], Tensor]
    copies: int
    next: int = 0

    def run(self) -> None:
        self.call(self.next)
        self.next = (self.next + 1) % self.copies


def machine() -> dict[str, object]:
    """Return what the numbers depend on: processor, its instruction sets, versions."""
    info: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    flags = info.get("flags", info.get("Features", "")).split()
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "family": info.get("cpu family"), "model": info.get("model"),
        "cores": torch.get_num_threads(), "flags": [flag for flag in FLAGS if flag in flags],
        "torch": torch.__version__, "bitlm": library.instruction_set() or library.load().reason,
    }


def copies_of(size: int, cold_mib: int) -> int:
    return max(1, ceil(cold_mib * 2**20 / size))


def torch_engines(rows: int, columns: int, x: Tensor, cold_mib: int,
                  names: set[str]) -> list[Engine]:
    """Return nn.Linear in float32 and bfloat16 and torch's dynamic int8 layer."""
    engines = []
    for name, dtype in (("torch fp32", torch.float32), ("torch bf16", torch.bfloat16)):
        if name in names:
            layer = nn.Linear(columns, rows, bias=False, dtype=dtype)
            count = copies_of(layer.weight.nbytes, cold_mib)
            layers = [copy.deepcopy(layer) for _ in range(count)]
            own = x.to(dtype)
            engines.append(Engine(name, lambda i, m=layers, v=own: m[i](v), count))
    if "torch int8" in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = nn.Sequential(nn.Linear(columns, rows, bias=False))
            count = copies_of(rows * columns, cold_mib)
            layers = [torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, torch.qint8)[0]
                      for _ in range(count)]
        engines.append(Engine("torch int8", lambda i, m=layers: m[i](x), count))
    return engines


def packed_engine(name: str, rows: int, columns: int, x: Tensor, cold_mib: int) -> Engine:
    """Return a packed layer with random codes."""
    planes, ternary, group = FORMS[name]
    form = Form(rows, columns, (), min(group or columns, columns))
    names, weight = [], []
    for plane in range(planes):
        for part in ("signs", "mask") if ternary else ("signs",):
            names.append(f"plane{plane}.{part}")
            weight.append(torch.randint(256, (rows, ceil(columns / 8)), dtype=torch.uint8))
        names.append(f"plane{plane}.scales")
        weight.append(torch.rand(rows, form.groups).half() / 100)
    text = Form(rows, columns, tuple(names), form.group_size).text
    count = copies_of(sum(t.nbytes for t in weight), cold_mib)
    weights = [[t.clone() for t in weight] for _ in range(count)]
    return Engine(name, lambda i: packed_linear(x, weights[i], text), count)


def measure(engines: list[Engine], rounds: int, seconds: float) -> dict[str, float]:
    """Return the median microseconds a call of each engine."""
    times: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for engine in engines:
        for _ in range(3):
            engine.run()
    for _ in range(rounds):
        for engine in engines:
            calls, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < seconds or not calls:
                engine.run()
                calls += 1
            times[engine.name].append(passed / calls * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", metavar="NxK",
                        default=["4096x4096", "4096x11008", "768x768"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--modes", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--engines", nargs="+", help="part of a name; all of them by default")
    parser.add_argument("--instruction-set", choices=library.INSTRUCTION_SETS,
                        help="bitlm uses at most this one; torch is not limited")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05, help="of an engine in a round")
    parser.add_argument("--cold-mib", type=int, default=320)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    library.limit_instruction_set(options.instruction_set)
    names = ["torch fp32", "torch bf16", "torch int8", *FORMS]
    if options.engines:
        names = [n for n in names if any(part in n for part in options.engines)]
    about = machine()
    print(" ".join(f"{key}: {value};" for key, value in about.items()))
    print(f"{'N x K':>12} {'batch':>5} {'thr':>3} {'mode':>5}  "
          + " ".join(f"{name.removeprefix('bitlm '):>14}" for name in names), flush=True)
    results = []
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        for batch in options.batch:
            x = torch.randn(batch, columns)
            for mode in options.modes:
                cold = options.cold_mib if mode == "cold" else 0
                with torch.inference_mode():
                    engines = torch_engines(rows, columns, x, cold, set(names))
                    engines += [packed_engine(n, rows, columns, x, cold)
                                for n in names if n in FORMS]
                    for threads in options.threads:
                        torch.set_num_threads(threads)
                        times = measure(engines, options.rounds, options.seconds)
                        results.append({"rows": rows, "columns": columns, "batch": batch,
                                        "mode": mode, "threads": threads, "us": times})
                        print(f"{shape:>12} {batch:>5} {threads:>3} {mode:>5}  "
                              + " ".join(f"{times[name]:14.1f}" for name in names), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "results": results}, indent=1))


if __name__ == "__main__":
    main()
