"""Tokens a second of a 1-bit Llama of 1.1 billion parameters inside transformers.

    scripts/bench decode [--ggml FOLDER] [--instruction-set avx2] [--json FILE]
    scripts/bench decode --profile                             # where the time of a token goes
    scripts/bench decode --table eval/results/decode.json      # what was measured before

Linear layers, head and embeddings are binary with groups of 128, the weights random. generate() is
greedy, with a prompt of 16 tokens; the time of the tokens after the first counts. With --ggml
llama-bench decodes with files of the same size in turns with ours; scripts/benchmarks/ggml/build
and make_models fill the folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from harness import machine, results, tables
from harness.ggml import programs
from harness.llama import Generate, LlamaBench, make_model
from harness.profile import profile
from harness.targets import DECODE_TARGETS
from harness.timing import Engine, take_turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instruction-set", choices=("scalar", "avx2", "avx512", "amx"),
                        help="bitlm uses at most this one; the peers are held to AVX2 as well")
    parser.add_argument("--ggml", type=Path, metavar="FOLDER", help="builds and files of llama.cpp")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--activations", nargs="+", default=["int8", "float"])
    parser.add_argument("--eager-only", action="store_true", help="without torch.compile")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="only profile, with one thread")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print what FILE holds")
    options = parser.parse_args()
    if options.table:
        print("\n\n".join(map(report, results.load(options.table))))
        return
    used = machine.limit(options.instruction_set)
    model = make_model()
    if options.profile:
        torch.set_num_threads(1)
        for activation in options.activations:
            engine = Generate(model, activation, False, options.tokens)
            print(profile(model, engine, options.tokens), end="\n\n")
        return
    block = {"machine": machine.describe() | {"instruction_set": used},
             "settings": {"rounds": options.rounds, "tokens": options.tokens}, "groups": []}
    for threads in options.threads:
        torch.set_num_threads(threads)
        torch._dynamo.reset()  # compiled loops know the number of threads
        engines: list[Engine] = [
            Generate(model, activation, compiled, options.tokens)
            for compiled in ([False] if options.eager_only else [False, True])
            for activation in options.activations]
        engines += peers(options.ggml, used, threads)
        rounds = take_turns(engines, options.rounds, 0)
        block["groups"].append({
            "name": f"decode, {threads} thread{'s' * (threads > 1)}", "threads": threads,
            "engines": [{"engine": engine.name, "batch": 1, "us": [round(us) for us in times]}
                        for engine, times in zip(engines, rounds)]})
    print(report(block))
    if options.json:
        results.save(options.json, block)


def peers(folder: Path | None, used: str, threads: int) -> list[Engine]:
    """Return llama.cpp's types; ends the program when a given folder has no files of them."""
    if folder is None:
        return []
    files = sorted((folder / "models").glob("*.gguf"))
    if not files:
        sys.exit(f"{folder}/models has no .gguf: scripts/benchmarks/ggml/make_models writes them")
    return [LlamaBench(programs(folder, used), file, threads) for file in files]


def report(block: results.Block) -> str:
    return "\n\n".join([f"### {results.title(block)}", tables.target_table(block, DECODE_TARGETS),
                        tables.token_table(block)])


if __name__ == "__main__":
    main()
