#!/usr/bin/env python3
"""A fair report on the students of `eval/distill.py`, after BiBench (arXiv 2301.11233).

    eval/report.py --work DIR --glue DIR     measure sizes, operations and speed; write, print
    eval/report.py                           print what is written

Beside the quality it says what a student costs: bits and operations, all of them counted (see
bitlm.evaluate.cost), file and memory (the tensors, and all of a process of its own that measures
the texts), measured speed with the tokenizing of the texts, training time, and how much its score
moves with the learning rate. Models are timed in turn, so that a busy machine slows all of them
alike. The tracks' overall metrics are quadratic means of ratios to full precision, of seeds the
mean; a ratio of a score below 0 is 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from distill import RESULTS, RUNS
from torch import nn

from bitlm.cli.doctor import cpu_model
from bitlm.evaluate import cost, glue
from bitlm.evaluate.data import load_split
from bitlm.evaluate.load import load_model
from bitlm.evaluate.peak import peak_bytes

TASKS = ("sst2", "mrpc", "cola", "stsb")
SCHEMES = ("w1a16", "w1a8", "w1.58a8", "w1a1", "w1a1+estimators")
FULL = "teacher"
TASK = "sst2"  # whose models are measured
ROUNDS, ALONE, TOGETHER = 7, 40, 256  # times each; texts one by one, and in batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="the folder that eval/distill.py worked in")
    parser.add_argument("--glue", type=Path, help="folder with a folder for each task")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)  # a process for one model
    options = parser.parse_args()
    if options.peak:
        print(json.dumps(peak(options.peak, options.glue)))
        return
    path = options.results / "report.json"
    if options.work:
        if not options.glue:
            parser.error("--work needs --glue, the texts to measure on")
        measured = measure(options.work, options.glue)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(measured, indent=1) + "\n", "utf-8")
        os.replace(part, path)
    if not path.is_file():
        parser.error("nothing is measured yet: give --work and --glue")
    rows = report(options.results, json.loads(path.read_text("utf-8"))["models"])
    print(table(rows))
    plot(rows, options.results / "report.png")


# --- measuring -----------------------------------------------------------------------------------

def measure(work: Path, folder: Path) -> dict[str, Any]:
    """Return sizes, operations and speed of the full-precision model and the first student of each
    scheme."""
    places = {FULL: work / f"{TASK}-teacher" / "teacher" / "model"} | {
        scheme: work / f"{TASK}-{scheme}-0" / "packed" for scheme in SCHEMES}
    places = {name: place for name, place in places.items() if (place / "config.json").is_file()}
    loaded = {name: load_model(place, dtype="float32") for name, place in places.items()}
    texts, _ = glue.examples(TASK, load_split(str(folder / TASK), "validation"))
    models = {name: facts(model, tokenizer, places[name], texts)
              for name, (model, tokenizer) in loaded.items()}
    for name, seconds in timed(loaded, texts).items():
        models[name] |= seconds
    for name, place in places.items():
        command = [sys.executable, __file__, "--peak", str(place), "--glue", str(folder)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        models[name] |= json.loads(done.stdout)
    return {"machine": cpu_model(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "task": TASK, "texts": {"alone": ALONE,
                                                                "together": TOGETHER},
            "models": models}


def peak(place: Path, folder: Path) -> dict[str, int | None]:
    """Return the most memory of this process, which measures the texts with one model."""
    model, tokenizer = load_model(place, dtype="float32")
    texts, _ = glue.examples(TASK, load_split(str(folder / TASK), "validation"))
    glue.predict(model, tokenizer, texts[:TOGETHER], 32, 64)
    return {"peak_bytes": peak_bytes(torch.device("cpu"))}


def facts(model: nn.Module, tokenizer: Any, place: Path, texts: list[tuple[str, ...]]
          ) -> dict[str, Any]:
    """Return bytes of file and memory, bits, and the operations of the first texts."""
    products: dict[tuple[int, int], int] = defaultdict(int)
    for text in texts[:ALONE]:
        for bits, number in cost.count(model, tokenizer(*text, return_tensors="pt")
                                       ).products.items():
            products[bits] += number
    file = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    return {"file_bytes": file, "bits": file * 8 / _weights(model),
            "memory_bytes": sum(tensor.numel() * tensor.element_size() for tensor in
                                {t.data_ptr(): t for t in _tensors(model)}.values()),
            "cost": cost.Cost(products).to_dict()}


def _weights(model: nn.Module) -> int:
    """Return how many numbers the dense model has."""
    from bitlm.modules import packed_weights
    packed = packed_weights(model)
    inside = {id(t) for weight in packed.values() for _, t in weight.named_tensors()}
    own = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return own + sum(math.prod(weight.shape) for weight in packed.values())


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def timed(loaded: dict[str, tuple[nn.Module, Any]], texts: list[tuple[str, ...]]
          ) -> dict[str, dict[str, float]]:
    """Return medians of seconds for one text, and of texts a second in batches of 32."""
    alone, together = texts[:ALONE], texts[:TOGETHER]
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in loaded}
    for turn in range(ROUNDS + 1):  # the first one prepares weights
        for name, (model, tokenizer) in loaded.items():
            for key, own, batch in (("alone", alone, 1), ("together", together, 32)):
                start = time.perf_counter()
                glue.predict(model, tokenizer, own, batch, 64)
                if turn:
                    found[name][key].append(time.perf_counter() - start)
        print(f"round {turn} of {ROUNDS}", file=sys.stderr)
    return {name: {"seconds_alone": statistics.median(each["alone"]) / ALONE,
                   "texts_a_second": TOGETHER / statistics.median(each["together"])}
            for name, each in found.items()}


# --- the report ----------------------------------------------------------------------------------

def report(folder: Path, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each model: its own figures, and the overall metrics of the tracks."""
    results = {key: json.loads(path.read_text("utf-8")) for key in RUNS
               if (path := folder / f"{key}.json").is_file()}
    full = measured[FULL]
    spread = {name: _spread(results, name) for name in (FULL, *SCHEMES)}
    rows = []
    for name, own in measured.items():
        scores = {task: found for task in TASKS
                  if (found := _scores(results, task, name)) is not None}
        base = {task: statistics.mean(found) for task in TASKS
                if (found := _scores(results, task, FULL))}
        ratios = [max(statistics.mean(each), 0) / base[task] for task, each in scores.items()
                  if task in base]
        minutes = _minutes(results, name)
        row = {"name": name, "scores": scores, "own": own, "minutes": minutes,
               "spread": spread[name], "task": _quadratic(ratios), "tasks": len(ratios),
               "operations": full["cost"]["ops"] / own["cost"]["ops"],
               "size": full["file_bytes"] / own["file_bytes"],
               "faster_alone": full["seconds_alone"] / own["seconds_alone"],
               "faster_together": own["texts_a_second"] / full["texts_a_second"]}
        row["complexity"] = _quadratic([row["operations"], row["size"]])
        faster = statistics.mean([row["faster_alone"], row["faster_together"]])
        row["inference"] = _quadratic([faster, row["size"]])
        if minutes and spread[name] and spread[FULL]:
            row["training"] = _quadratic([_minutes(results, FULL) / minutes,
                                          spread[FULL] / spread[name]])
        rows.append(row)
    return rows


def _scores(results: dict[str, Any], task: str, name: str) -> list[float] | None:
    """Return the headline of a task for each seed of a scheme."""
    found = [result["evaluated"] for key, result in results.items()
             if result["study"] == task and (key == f"{task}-{name}" or
                                             key.removeprefix(f"{task}-{name}-").isdigit())]
    return [each["metrics"][each["headline"]]["value"] for each in found] or None


def _minutes(results: dict[str, Any], name: str) -> float:
    """Return the minutes of a training, with those of the student that it began with."""
    own = results.get(f"{TASK}-{name}" if name == FULL else f"{TASK}-{name}-0", {})
    before = results.get(own.get("after"), {})
    return sum(stage["seconds"] for each in (own, before)
               for stage in each.get("stages", {}).values()) / 60


def _spread(results: dict[str, Any], name: str) -> float | None:
    """Return the standard deviation of the score over the learning rates that were tried."""
    values = [result["evaluated"]["metrics"]["accuracy"]["value"] for key, result in
              results.items() if key.startswith(f"rates-{name}-")]
    return statistics.stdev(values) if len(values) > 1 else None


def _quadratic(ratios: list[float]) -> float:
    return math.sqrt(sum(ratio * ratio for ratio in ratios) / max(len(ratios), 1))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the report as Markdown, the models side by side."""
    def line(title: str, cell: Any) -> str:
        return f"| {title} | " + " | ".join(cell(row) or "" for row in rows) + " |"

    def score(task: str) -> Any:
        return lambda row: " / ".join(f"{value * 100:.1f}" for value in row["scores"].get(task, ()))

    titles = {"sst2": "SST-2 accuracy", "mrpc": "MRPC mean of accuracy and F1",
              "cola": "CoLA Matthews", "stsb": "STS-B mean of Pearson and Spearman"}
    lines = ["| | " + " | ".join("full precision" if row["name"] == FULL else row["name"].upper()
                                 for row in rows) + " |", "|---|" + "---|" * len(rows)]
    lines += [line(titles[task], score(task)) for task in TASKS
              if any(task in row["scores"] for row in rows)]
    lines += [
        line("tasks, overall", lambda row: f"{row['task']:.3f} ({row['tasks']})"),
        line("bits a weight, whole file", lambda row: f"{row['own']['bits']:.2f}"),
        line("file, MiB", lambda row: f"{row['own']['file_bytes'] / 2**20:.1f}"),
        line("tensors in memory, MiB", lambda row: f"{row['own']['memory_bytes'] / 2**20:.1f}"),
        line("peak of a process, MiB", lambda row: row["own"].get("peak_bytes") and
             f"{row['own']['peak_bytes'] / 2**20:.0f}"),
        line("FLOPs a text, M", lambda row: _million(row["own"]["cost"]["flops"])),
        line("BOPs a text, M", lambda row: _million(row["own"]["cost"]["bops"])),
        line("operations saved", lambda row: f"{row['operations']:.1f}x"),
        line("complexity, overall", lambda row: f"{row['complexity']:.1f}"),
        line("ms a text, alone", lambda row: f"{row['own']['seconds_alone'] * 1e3:.1f}"),
        line("texts a second, 32 together", lambda row: f"{row['own']['texts_a_second']:.0f}"),
        line("faster, alone / together",
             lambda row: f"{row['faster_alone']:.2f}x / {row['faster_together']:.2f}x"),
        line("inference, overall", lambda row: f"{row['inference']:.1f}"),
        line("training, minutes", lambda row: row["minutes"] and f"{row['minutes']:.0f}"),
        line("accuracy's deviation over learning rates",
             lambda row: row["spread"] and f"{row['spread'] * 100:.1f}"),
        line("training, overall", lambda row: row.get("training") and f"{row['training']:.2f}")]
    return "\n".join(lines)


def _million(number: int) -> str:
    return f"{number / ALONE / 1e6:,.1f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw quality against size."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for row, marker in zip(rows, cycle("osD^vP")):  # models as large and as good lie on each other
        values = [value * 100 for value in row["scores"].get(TASK, ())]
        size = row["own"]["file_bytes"] / 2**20
        name = "full precision" if row["name"] == FULL else row["name"].upper()
        axes.plot([size] * len(values), values, marker, markersize=8, alpha=0.7, label=name)
    axes.set(xlabel="file, MiB", ylabel="SST-2 accuracy, %", xscale="log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    part = path.with_name(f".{path.name}")
    figure.savefig(part, dpi=110, format="png")
    pyplot.close(figure)
    os.replace(part, path)


if __name__ == "__main__":
    main()
