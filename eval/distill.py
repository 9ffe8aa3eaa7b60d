#!/usr/bin/env python3
"""What distillation brings back: studies of the recipes, one result file a run.

    eval/distill.py STUDY … --work DIR [--glue DIR] [--model DIR] [--pairs DIR] [--stories DIR]
    eval/distill.py --list
    eval/distill.py --tables

--glue: a folder with a folder for each GLUE task (`sst2/train.jsonl`, `sst2/dev.jsonl`). --model:
the encoder that is fine-tuned. --pairs: train.jsonl and dev.jsonl with `en` and `ro`. --stories:
train.jsonl and valid.jsonl with `text`.

A run is `bitlm distill` with a recipe and its settings in a folder of --work, then `bitlm evaluate`
of what it packed beside its teacher. Its result goes to eval/results/distill/RUN.json; a run with a
result is not done again, one that was interrupted goes on, and one that another process is at is
left to that: start the command twice to use two cores. --tables prints what there is as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitlm.cli.doctor import cpu_model
from bitlm.job import JobError, locked

RESULTS = Path(__file__).parent / "results" / "distill"


@dataclass(frozen=True)
class Run:
    """One training.

    settings: KEY=VALUE of the recipe, with {glue}, {model}, ... for what the user's options name.
    teacher: key of the run whose teacher it has; "": it trains its own. after: key of the run whose
    student teaches it and gives it its weights, as in BiT's chains; "": the teacher does.
    """

    study: str
    name: str
    recipe: str
    settings: dict[str, Any] = field(default_factory=dict)
    teacher: str = ""
    after: str = ""

    @property
    def key(self) -> str:
        return f"{self.study}-{self.name}"

    @property
    def before(self) -> set[str]:
        """The runs that have to be done before."""
        return {self.teacher, self.after} - {""}

    def student(self, work: Path) -> Path:
        """Return where the recipe keeps the student in training."""
        return work / self.key / self.settings["scheme"].replace("+", "-") / "model"


def _runs() -> dict[str, Run]:
    runs: list[Run] = []

    def study(name: str, recipe: str, common: dict[str, Any], students: dict[str, dict[str, Any]],
              after: dict[str, str] | None = None) -> None:
        runs.append(Run(name, "teacher", recipe, common | {"scheme": ""}))
        runs.extend(Run(name, student, recipe, common | own, f"{name}-teacher",
                        f"{name}-{after[student]}" if after and student in after else "")
                    for student, own in students.items())

    def glue(task: str) -> dict[str, Any]:
        return {"profile": "small", "task": task, "data": "{glue}", "model": "{model}"}

    w1a1 = {"scheme": "w1a1"}
    estimators = {"scheme": "w1a1+estimators"}
    study("sst2", "glue", glue("sst2"), {
        "w1a8-0": {"scheme": "w1a8"}, "w1a1-0": w1a1, "w1a1+estimators-0": estimators,
        "w1.58a8-0": {"scheme": "w1.58a8"}, "w1a16-0": {"scheme": "w1a16"},
        "w1a8-1": {"scheme": "w1a8", "seed": 1}, "w1a1-1": w1a1 | {"seed": 1},
        "w1a1+estimators-1": estimators | {"seed": 1},
        # Without the step between, as many steps in all; and with steps and moves of quantizers
        # that learn at the papers' rate, which is for ten times as many steps.
        "w1a1-direct-0": w1a1 | {"epochs": 2}, "w1a1-slow-0": w1a1 | {"quantizer_lr": 1e-4},
        "w1a1+estimators-slow-0": estimators | {"quantizer_lr": 1e-4},
        # Estimators of more than rank 1.
        "w1a1+estimators-rank4-0": estimators | {"estimators": 4},
        "w1a1+estimators-rank4-1": estimators | {"estimators": 4, "seed": 1}},
        {f"{name}-{end}": f"w1a8-{end[-1]}" for name in ("w1a1", "w1a1+estimators")
         for end in ("0", "1", "slow-0", "rank4-0", "rank4-1")})
    for task in ("mrpc", "cola", "stsb"):
        study(task, "glue", glue(task), {"w1a8-0": {"scheme": "w1a8"}, "w1a1-0": w1a1},
              {"w1a1-0": "w1a8-0"})
    # TBT against what it is compared with: BWN and TWN weights, and steps from the range of values.
    plain = {"weights": "baseline", "placement": "minmax"}
    pairs = {"w1.58a2": {"scheme": "w1.58a2"}, "w1a1": w1a1}
    students = {"w1a8": {"scheme": "w1a8"}} | pairs | {
        f"baseline-{name}": own | plain for name, own in pairs.items()}
    study("translation", "translation",
          {"profile": "small", "data": "{pairs}", "model": "new"}, students)
    study("denoise", "summarization",
          {"profile": "small", "task": "denoise", "data": "{stories}/train.jsonl",
           "valid": "{stories}/valid.jsonl", "model": "new"}, students)
    # What no copy is near to, and a small model learns from so little text: the missing vowels.
    study("vowels", "summarization",
          {"profile": "small", "task": "summarization", "data": "{vowels}/train.jsonl",
           "valid": "{vowels}/valid.jsonl", "model": "new", "lead": 100}, students)
    # How much the score moves with the learning rate, on a part of the data.
    for factor in (0.4, 1, 2.5):
        few = glue("sst2") | {"limit": 8000}
        runs.append(Run("rates", f"teacher-{factor:g}", "glue",
                        few | {"scheme": "", "teacher.lr": f"{factor * 5e-5:g}"}))
        runs.extend(Run("rates", f"{scheme}-{factor:g}", "glue", few | {
            "scheme": scheme, "lr": f"{factor * 5e-4:g}"}, "sst2-teacher",
            "sst2-w1a8-0" if scheme.startswith("w1a1") else "")
            for scheme in ("w1a8", "w1.58a8", "w1a1", "w1a1+estimators"))
    return {run.key: run for run in runs}


RUNS = _runs()


# --- running -------------------------------------------------------------------------------------

def perform(run: Run, options: argparse.Namespace) -> None:
    """Train, evaluate, and write the result, unless it is there."""
    target = options.results / f"{run.key}.json"
    if target.is_file():
        return
    out = options.work / run.key
    teacher = options.work / (run.teacher or run.key) / "teacher" / "model"
    first = RUNS[run.after].student(options.work) if run.after else teacher
    if run.teacher and not (first / "config.json").is_file():
        print(f"{run.key}: its teacher is not there yet", flush=True)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        with locked(options.work / f"{run.key}.study"):
            if target.is_file():
                return
            print(f"{run.key} ...", flush=True)
            if run.study == "vowels":
                options.vowels = without_vowels(_Paths(options)["stories"], options.work)
            given = {key: str(value).format_map(_Paths(options))
                     for key, value in run.settings.items()}
            if run.teacher:
                given["teacher.model"] = str(first)
            if run.after:
                given["student"] = str(teacher)
            _bitlm("distill", run.recipe, *(f"{key}={value}" for key, value in given.items()),
                   f"out={out}")
            save(target, run, options.work, given, evaluated(run, out, teacher, given))
    except JobError as error:
        print(f"{run.key}: {error}", flush=True)


def without_vowels(stories: str, work: Path) -> Path:
    """Write passages of two sentences as summaries of themselves without vowels; return where."""
    folder = work / "vowels"
    folder.mkdir(exist_ok=True)
    for name in ("train.jsonl", "valid.jsonl"):
        lines, source = [], Path(stories) / name
        if not source.is_file():
            raise SystemExit(f"there is no {source}: --stories names the folder of it")
        for line in source.read_text("utf-8").splitlines():
            parts = re.split(r"(?<=[.!?])\s+", " ".join(json.loads(line)["text"].split()))
            for start in range(0, len(parts), 2):
                text = " ".join(parts[start:start + 2])
                document = re.sub("[aeiou]", "", text, flags=re.IGNORECASE)
                if re.search("[a-z]", document, re.IGNORECASE):
                    lines.append(json.dumps({"document": document, "summary": text}))
        part = folder / f"{name}.{os.getpid()}"
        part.write_text("\n".join(lines) + "\n", "utf-8")
        os.replace(part, folder / name)
    return folder


class _Paths(dict):
    """What an option names, where a setting asks for it."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__({name: value for name, value in vars(options).items() if value})

    def __missing__(self, name: str) -> str:
        raise SystemExit(f"this study needs --{name}: see --help")


def evaluated(run: Run, out: Path, teacher: Path, given: dict[str, str]) -> dict[str, Any]:
    """Return what `bitlm evaluate` says of the packed model beside its teacher, or of this alone.
    """
    model, path = (out / "packed", ["--against", str(teacher)]) if run.teacher else (teacher, [])
    if run.recipe == "glue":
        task = ["--task", f"glue/{given['task']}", "--data", f"{given['data']}/{given['task']}",
                "--max-input", "64" if given["task"] in ("sst2", "cola") else "128"]
    elif run.recipe == "translation":
        task = ["--task", "translation", "--data", given["data"], "--source", "en",
                "--target", "ro", *_GENERATION]
    else:
        valid = out / "valid.jsonl" if run.study == "denoise" else given["valid"]
        task = ["--task", "summarization", "--data", str(valid), *_GENERATION]
    scratch = out / "evaluated.json"
    _bitlm("evaluate", str(model), *task, *path, "--json", str(scratch))
    return json.loads(scratch.read_text("utf-8"))


_GENERATION = ("--beams", "2", "--max-length", "48", "--limit", "400")


def _bitlm(*arguments: str) -> None:
    command = [sys.executable, "-c", "from bitlm.cli import main; main()", *arguments]
    print("  bitlm " + shlex.join(arguments), flush=True)
    subprocess.run(command, check=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})


def save(target: Path, run: Run, work: Path, given: dict[str, str], scores: dict[str, Any]) -> None:
    """Write a run's result: scores, cost and settings; other paths by their last part."""
    trained = json.loads((work / run.key / "result.json").read_text("utf-8"))
    named = _named(given, work)
    data = {"run": run.key, "study": run.study, "name": run.name, "after": run.after,
            "machine": cpu_model(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            "command": shlex.join(["bitlm", "distill", run.recipe, *(
                f"{key}={value}" for key, value in named.items())]),
            "versions": trained["versions"],
            "stages": {name: {key: value for key, value in stage.items() if key != "settings"}
                       for name, stage in trained["stages"].items()},
            "settings": _named(trained["settings"], work), "packed": trained["packed"],
            "evaluated": _named(scores, work)}
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    os.replace(part, target)


def _named(tree: Any, work: Path) -> Any:
    """Return a tree of JSON types with paths from `work` on, or, as others have other folders, cut
    to their last part."""
    if isinstance(tree, dict):
        return {key: _named(value, work) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_named(value, work) for value in tree]
    if not isinstance(tree, str) or not (os.path.isabs(tree) or "/" in tree and
                                         Path(tree).exists()):
        return tree
    path = Path(tree).resolve()
    inside = path.is_relative_to(work.resolve())
    return str(path.relative_to(work.resolve())) if inside else path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="*", help="studies or single runs, as --list names them")
    parser.add_argument("--work", type=Path, help="folder of the trained models, several GB")
    for name in ("glue", "model", "pairs", "stories"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="show the runs and which are done")
    parser.add_argument("--tables", action="store_true", help="print the results as Markdown")
    options = parser.parse_args()
    if options.list:
        for key in RUNS:
            print(f"{key:32} {'done' * (options.results / f'{key}.json').is_file()}")
    elif options.tables:
        print(tables(options.results))
    else:
        if not options.study or not options.work:
            parser.error("name studies and --work, or use --list or --tables")
        chosen = [run for key, run in RUNS.items() if {key, run.study} & set(options.study)]
        needed = {run.key for run in chosen}
        for key in reversed(RUNS):  # what a run needs stands before it
            needed |= RUNS[key].before if key in needed else set()
        work([key for key in RUNS if key in needed], options)


def work(keys: list[str], options: argparse.Namespace) -> None:
    """Perform runs; wait for those that other processes are at, whose teachers others may need."""
    if not keys:
        raise SystemExit("no such study: --list shows them")
    while keys:
        for key in keys:
            perform(RUNS[key], options)
        keys = [key for key in keys if not (options.results / f"{key}.json").is_file()]
        if keys:
            time.sleep(30)


# --- tables --------------------------------------------------------------------------------------

def tables(folder: Path) -> str:
    """Return the results of all studies as Markdown, a table a study."""
    found = [json.loads((folder / f"{key}.json").read_text("utf-8")) for key in RUNS
             if (folder / f"{key}.json").is_file()]
    seconds = {each["run"]: sum(stage["seconds"] for stage in each["stages"].values())
               for each in found}
    return "\n\n".join(table([each for each in found if each["study"] == study], seconds)
                       for study in dict.fromkeys(each["study"] for each in found))


def table(results: list[dict[str, Any]], seconds: dict[str, float]) -> str:
    """Return one study as Markdown: a row for each run, with the time of the one before it too."""
    metrics = [name for name in results[0]["evaluated"]["metrics"] if name in SHOWN]
    lines = [f"| {results[0]['study']} | " + " | ".join(metrics)
             + " | to the teacher | same predictions | MiB | minutes |",
             "|---|" + "---|" * (len(metrics) + 4)]
    for result in results:
        own = result["evaluated"]
        headline = own["headline"]
        baseline = own.get("baselines") if result["name"] == "teacher" else None
        for name, scores in (baseline or {}).items():
            lines.append(f"| *{name}* | " + " | ".join(
                shown(metric, {"value": scores[metric]}) for metric in metrics) + " | | | | |")
        difference = own.get("difference", {}).get(headline)
        size = (result["packed"] or {}).get("bytes")
        took = seconds[result["run"]] + seconds.get(result.get("after", ""), 0)
        lines.append(f"| {result['name']} | " + " | ".join(
            shown(metric, own["metrics"][metric]) for metric in metrics) + " | "
            + (shown(headline, difference, sign=True) if difference else "") + " | "
            + (f"{own['agreement']:.1%}" if own.get("agreement") is not None else "") + " | "
            + (f"{size / 2**20:.1f}" if size else "") + f" | {took / 60:.0f} |")
    return "\n".join(lines)


SHOWN = ("accuracy", "f1", "matthews", "pearson", "spearman", "mean", "rouge1", "rouge2", "rougeL",
         "bleu", "chrf")


def shown(metric: str, score: dict[str, float], sign: bool = False) -> str:
    """Return a metric with its interval, GLUE's in percent."""
    factor = 1 if metric.startswith(("rouge", "bleu", "chrf")) else 100
    form = f"{'+' * sign}.1f"
    text = f"{score['value'] * factor:{form}}"
    return text + (f" [{score['low'] * factor:{form}}, {score['high'] * factor:{form}}]"
                   if sign and "low" in score else "")


if __name__ == "__main__":
    main()
