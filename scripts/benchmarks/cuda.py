"""Packed linear layers on a GPU against cuBLAS (and gemlite, where it is installed).

    scripts/bench cuda [--json eval/results/cuda.json]      # layers, then an 8B-shaped Llama
    scripts/bench cuda --layers-only | --decode-only
    scripts/bench cuda --tune                               # write ops/cuda_table.json for the card
    scripts/bench cuda --table eval/results/cuda.json       # what was measured before

A layer is measured in a CUDA graph that calls it once for each of many copies of its weight, more
than the L2 cache holds, between two events; engines take turns and medians count. Every result is
compared with float64 first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from harness import results
from harness.gpu import Graph, copy_bandwidth, describe
from harness.gpu_layers import DTYPE, Layer, Work, engines, packed
from harness.gpu_llama import decode

from bitlm.ops import cuda_launch, cuda_table

WORKS = [
    *(Work("decode", *shape, 1) for shape in ((4096, 4096), (11008, 4096), (4096, 11008),
                                              (28672, 8192), (8192, 28672))),
    *(Work("ternary", 4096, 11008, 1, kinds=kinds) for kinds in (("ternary",), ("trits",))),
    Work("planes", 4096, 4096, 1, kinds=("binary",) * 3),
    *(Work("batch", 4096, 4096, batch) for batch in (2, 4, 8, 16, 32, 64)),
    *(Work("batch", 28672, 8192, batch) for batch in (8, 16)),
    *(Work("prefill", 4096, 4096, batch) for batch in (128, 256, 512, 2048, 8192)),
    *(Work("int8", 4096, 11008, batch, activation="int8") for batch in (1, 16, 512)),
    *(Work("one bit", 4096, 4096, batch, activation="int1") for batch in (1, 16, 128, 512, 4096)),
    Work("two bits", 4096, 4096, 512, kinds=("ternary",), activation="int2"),
]
MOST_ERROR = 0.02  # relative to the result; bf16 has 0.004
WRONG = "wrong, an error of"
COPY_SHARE_FROM = 28 * 1024 * 1024  # bytes of packed weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers-only", action="store_true")
    parser.add_argument("--decode-only", action="store_true")
    parser.add_argument("--tune", action="store_true", help="write what suits this card")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=128, help="of decoding")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print what FILE holds")
    options = parser.parse_args()
    if options.table:
        print("\n\n".join(map(report, results.load(options.table))))
        return
    if not torch.cuda.is_available():
        sys.exit("scripts/bench cuda needs a GPU that torch can use")
    if options.tune:
        print(tune(options.rounds))
        return
    block = {"machine": describe(), "settings": vars(options) | {"json": None, "table": None},
             "groups": []}
    bandwidth = copy_bandwidth()
    block["machine"]["copy_gb_s"] = round(bandwidth / 1e9)
    if not options.decode_only:
        block["groups"] += [measure(work, options.rounds) for work in WORKS]
    if not options.layers_only:
        block["groups"].append(decode(options.tokens, options.rounds))
    print(report(block))
    if options.json:
        results.save(options.json, block)
    if WRONG in report(block):
        sys.exit("there are wrong results")


def measure(work: Work, rounds: int) -> dict:
    """Return the microseconds of every engine of a work, in rounds of turns."""
    layer = Layer(work)
    runs: dict[str, Graph] = {}
    errors, missing = {}, {}
    for name, calls in engines(layer).items():
        if isinstance(calls, str):
            missing[name] = calls
            continue
        if name in ("bitlm", f"cuBLAS {DTYPE}"):  # gemlite's weight is another one
            mode = work.activation if name == "bitlm" else "float"
            errors[name] = layer.error(calls[0](), mode)
            if not errors[name] < MOST_ERROR:
                missing[name] = f"{WRONG} {errors[name]:.2g}"
                continue
        runs[name] = Graph(calls)
    times = take_turns({name: graph.microseconds for name, graph in runs.items()}, rounds)
    group = {"name": work.name, "weight_bytes": layer.bytes,
             "engines": [{"engine": name, "batch": work.tokens, "error": errors.get(name),
                          "us": [round(us, 2) for us in values]} for name, values in times.items()]}
    return group | ({"missing": missing} if missing else {})


def take_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    return times


NEVER = cuda_table.NEVER
# Settings that make a product in one way, and the batches at which ways are compared.
WAYS = {"bits": cuda_table.Settings((1, 2, 4, 8), NEVER, NEVER, NEVER, few_tokens=NEVER),
        "many": cuda_table.Settings(many_tokens=1, dense_tokens=NEVER),
        "wide": cuda_table.Settings(dense_tokens_wide=NEVER, wide_tokens=1),
        "dense": cuda_table.Settings(dense_tokens=1)}
BATCHES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)


def tune(rounds: int) -> str:
    """Write what suits this card to ops/cuda_table.json; return what was measured, line by line."""
    lines, blocks = [], [1]  # a block of one token takes that one
    for tokens in (2, 4, 16):
        layer = Layer(Work("tune", 4096, 4096, tokens))
        times = {own: _median(layer, rounds, replace(WAYS["bits"], block_tokens=(own,) * 4))
                 for own in (1, 2, 4, 8)}
        blocks.append(min(times, key=times.get))
        lines.append(f"{tokens} tokens, by tokens of a block: {_shown(times)}")
    best = dict.fromkeys(("many", "wide", "dense", "beside wide", "alone"), NEVER)
    winning = set(best)  # at this batch and all larger ones
    card = torch.device("cuda", torch.cuda.current_device())
    ways = {name: replace(own, block_tokens=tuple(blocks)) for name, own in WAYS.items()
            if name != "wide" or card in cuda_launch.wide_cards}
    for tokens in reversed(BATCHES):
        layer = Layer(Work("tune", 4096, 4096, tokens))
        times = {name: _median(layer, rounds, own) for name, own in ways.items()}
        codes = min(times["many"], times["bits"])
        wide = times.get("wide", float("inf"))
        wins = {"many": times["many"] < times["bits"], "alone": times["dense"] < times["bits"],
                "dense": times["dense"] < codes, "wide": wide < codes,
                "beside wide": times["dense"] < min(codes, wide)}
        winning &= {name for name, won in wins.items() if won}
        best |= dict.fromkeys(winning, tokens)
        lines.append(f"{tokens} tokens: {_shown(times)}")
    few = NEVER
    for tokens in reversed(BATCHES[:11]):
        won = True
        for mode in ("int1", "int2"):
            layer = Layer(Work("tune", 4096, 4096, tokens, activation=mode))
            times = {name: _median(layer, rounds, replace(ways["bits"], few_tokens=limit))
                     for name, limit in (("plane by plane", NEVER), ("8 at a time", 1))}
            lines.append(f"{tokens} tokens of {mode}: {_shown(times)}")
            won &= times["8 at a time"] < times["plane by plane"]
        if not won:
            break
        few = tokens
    own = cuda_table.Settings(tuple(blocks), best["many"], best["dense"], best["alone"],
                              few_tokens=few, wide_tokens=best["wide"],
                              dense_tokens_wide=best["beside wide"])
    cuda_table.write(torch.cuda.get_device_capability(), own)
    return "\n".join([*lines, f"{cuda_table.TABLE.name}: {own}"])


def _median(layer: Layer, rounds: int, settings: cuda_table.Settings) -> float:
    with patch.object(cuda_launch, "settings_of", lambda device: settings):
        graph = Graph(packed(layer))
    return statistics.median(graph.microseconds() for _ in range(rounds))


def _shown(times: dict) -> str:
    return ", ".join(f"{name} {us:.2f} us" for name, us in times.items())


# --- tables --------------------------------------------------------------------------------------


def report(block: results.Block) -> str:
    """Return one machine's results as Markdown."""
    machine = block["machine"]
    copy = machine["copy_gb_s"]
    rows = [f"### {machine['gpu']}, torch {machine['torch']}, copies at {copy} GB/s", "",
            "| work | engine | us | against cuBLAS | share of a copy's bandwidth | error |",
            "|---|---|---|---|---|---|"]
    for group in block["groups"]:
        medians = {e["engine"]: statistics.median(e["us"]) for e in group["engines"]}
        peer = medians.get(f"cuBLAS {DTYPE}", medians.get("dense bf16"))
        for engine in group["engines"]:
            name, us = engine["engine"], medians[engine["engine"]]
            share = ""
            if name == "bitlm" and group.get("weight_bytes", 0) >= COPY_SHARE_FROM:
                share = f"{group['weight_bytes'] / us / 1e3 / copy:.0%}"
            error = f"{engine['error']:.1e}" if engine.get("error") is not None else ""
            against = f"{peer / us:.2f} x" if peer else ""
            rows.append(f"| {group['name']} | {name} | {us:.2f} | {against} | {share} | {error} |")
        rows += [f"| {group['name']} | {name} | - | {why} | | |"
                 for name, why in group.get("missing", {}).items()]
    return "\n".join([*rows, "", *targets(block)])


def targets(block: results.Block) -> list[str]:
    """Return whether each target is met, as a table."""
    median = {(g["name"], e["engine"]): statistics.median(e["us"])
              for g in block["groups"] for e in g["engines"]}
    sizes = {g["name"]: g.get("weight_bytes", 0) for g in block["groups"]}
    copy = block["machine"]["copy_gb_s"]

    def name(*work: object) -> str:
        return Work(*work).name

    def ours(work: str) -> float | None:
        return median.get((work, "bitlm"))

    def against(work: str) -> float | None:
        own = ours(work)
        peer = median.get((work, f"cuBLAS {DTYPE}"))
        return own and peer and peer / own

    big, square = name("decode", 28672, 8192, 1), name("decode", 4096, 4096, 1)
    sixteen = name("batch", 4096, 4096, 16)
    own, batch = ours(square), ours(sixteen)
    rows = [
        ("share of a copy's bandwidth, 28672x8192", ">= 70 %", ours(big) and
         sizes[big] / ours(big) / 1e3 / copy * 100, 70, False),
        ("4096x4096 in a graph", "<= 4 us", own, 4, True),
        ("4096x11008 against cuBLAS", ">= 4 x", against(name("decode", 4096, 11008, 1)), 4, False),
        ("28672x8192 against cuBLAS", ">= 8 x", against(big), 8, False),
        ("batch 16 against batch 1", "<= 1.5 x", own and batch and batch / own, 1.5, True),
        ("prefill 256 against cuBLAS", ">= 1 x", against(name("prefill", 4096, 4096, 256)), 1,
         False),
        ("prefill 2048 against cuBLAS", ">= 0.9 x", against(name("prefill", 4096, 4096, 2048)),
         0.9, False),
    ]
    decoding = median.get(("Llama 8B, one token", "bitlm"))
    rows.append(("decoding against dense bf16", ">= 3 x", decoding and
                 median["Llama 8B, one token", "dense bf16"] / decoding, 3, False))
    lines = ["| target | | reached | |", "|---|---|---|---|"]
    for what, wanted, reached, limit, at_most in rows:
        if reached is not None:
            met = reached <= limit if at_most else reached >= limit
            verdict = "yes" if met else "**missed**"
            lines.append(f"| {what} | {wanted} | {reached:.2f} | {verdict} |")
    return lines


if __name__ == "__main__":
    main()
