"""What a model scored, alone or beside its dense one: as table, JSON, predictions and card rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..report import mib
from .glue import average
from .result import Result, Score, agreement, shown
from .tasks import Work

Row = tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """The results of one model, each with the work that it came from.

    skipped: why a task was not measured, by task. activations: the modes of packed layers, "" of a
    dense model.
    """

    model: str
    results: list[tuple[Work, Result]]
    skipped: Mapping[str, str] = field(default_factory=dict)
    activations: str = ""

    def find(self, task: str) -> Result | None:
        """Return the result of a task, None where it was not measured."""
        return next((result for _, result in self.results if result.task == task), None)


def to_dict(outcome: Outcome, task: str, dense: Outcome | None = None) -> dict[str, Any]:
    """Return an outcome as JSON types: one result flat, several as a list with their average."""
    head = {"model": outcome.model, "task": task}
    if dense:
        head["against"] = dense.model
    if outcome.activations:
        head["activations"] = outcome.activations
    entries = []
    for work, result in outcome.results:
        entry = {"task": result.task, "data": work.data, "split": work.split} | result.to_dict()
        other = dense and dense.find(result.task)
        if other:
            # The process had the other model before, so its peak says nothing of the dense one.
            theirs = {key: value for key, value in other.to_dict().items() if key != "peak_bytes"}
            entry |= {"dense": theirs, "agreement": agreement(result, other),
                      "difference": {name: score.to_dict() for name, score
                                     in _differences(result, other).items()}}
        entries.append(entry)
    if len(entries) == 1 and not outcome.skipped:
        return head | entries[0]
    more: dict[str, Any] = {}
    common = _common(outcome, dense)
    if mean := _average(outcome, common):
        more = {"average": mean.to_dict(), "average_of": common}
        if dense:
            other = _average(dense, common)
            more |= {"dense_average": other.to_dict(),
                     "average_difference": mean.minus(other).to_dict()}
    skipped = {"skipped": dict(outcome.skipped)}
    if dense:
        skipped["dense_skipped"] = dict(dense.skipped)
    return head | {"results": entries, **more, **skipped}


def table(outcome: Outcome, dense: Outcome | None = None) -> tuple[Row, list[Row]]:
    """Return heading and rows: the metrics of each task, then what else there is to know."""
    names = {name for _, result in outcome.results for name in result.baselines}
    heading = ("", outcome.model, *((dense.model, "difference") if dense else ()), *sorted(names))
    rows: list[Row] = []
    for work, result in outcome.results:
        other = dense.find(result.task) if dense else None
        label = f"{result.task} " * (len(outcome.results) > 1)
        rows.append((f"{label}data", ", ".join(filter(None, [_short(work.data), work.split,
                                                             f"{result.facts['rows']} rows"]))))
        differences = _differences(result, other) if other else {}
        for metric, score in result.scores.items():
            cells = [shown(metric, score)]
            if dense:
                cells += [shown(metric, other.scores[metric]) if other else "",
                          shown(metric, differences[metric], sign=True) if other else ""]
            cells += [shown(metric, Score(result.baselines[name][metric]))
                      for name in sorted(names) if name in result.baselines]
            rows.append((f"{label}{metric}", *cells))
        same = agreement(result, other) if other else None
        if same is not None:
            rows.append((f"{label}same predictions", f"{same:.1%}"))
        theirs = _facts(other) if other else {}
        rows += [(f"{label}{name}", value, *([theirs[name]] if name in ("mean length", "speed")
                                             and theirs else []))
                 for name, value in _facts(result).items()]
    common = _common(outcome, dense)
    if mean := _average(outcome, common):
        cells = [shown("", mean)]
        if dense:
            other = _average(dense, common)
            cells += [shown("", other), shown("", mean.minus(other), sign=True)]
        rows.append((f"average of {len(common)} tasks", *cells))
    if outcome.activations:
        rows.append(("activations", outcome.activations))
    rows += [(f"{name}: skipped", reason) for name, reason in outcome.skipped.items()]
    rows += [(f"{name}: skipped", "", reason) for name, reason in (
        dense.skipped if dense else {}).items()]
    return heading, [(*row, *[""] * (len(heading) - len(row))) for row in rows]


def predictions(outcome: Outcome, dense: Outcome | None = None) -> str:
    """Return the predictions as jsonl, one record a row with its task, and the dense model's."""
    lines = []
    for _, result in outcome.results:
        other = dense.find(result.task) if dense else None
        for number, record in enumerate(result.predictions):
            theirs = other.predictions[number] if other else {}
            more = {"dense": theirs["prediction"]} if "prediction" in theirs else {}
            lines.append(json.dumps({"task": result.task} | record | more, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def card_rows(outcome: Outcome, dense: Outcome | None = None) -> list[dict[str, str]]:
    """Return rows of a model card's "Measured" table, one a result."""
    rows = []
    for work, result in outcome.results:
        other = dense.find(result.task) if dense else None
        rows.append({"Task": result.task, "Activations": outcome.activations,
                     "Data": " ".join(filter(None, [_short(work.data), work.split]))
                     + f", {result.facts['rows']} rows",
                     "Scores": _scores(result),
                     **({"Dense scores": _scores(other)} if other else {})})
    return rows


def _differences(result: Result, other: Result) -> dict[str, Score]:
    return {name: score.minus(other.scores[name]) for name, score in result.scores.items()}


def _common(outcome: Outcome, dense: Outcome | None) -> list[str]:
    """Return the GLUE tasks that a model, and the dense one beside it, were measured on."""
    return [result.task for _, result in outcome.results if result.task.startswith("glue/")
            and (dense is None or dense.find(result.task))]


def _average(outcome: Outcome, tasks: list[str]) -> Score | None:
    """Return the mean of several GLUE tasks, None of fewer."""
    return average([outcome.find(task) for task in tasks]) if len(tasks) > 1 else None


def _scores(result: Result) -> str:
    return ", ".join(f"{name} {shown(name, score)}" for name, score in result.scores.items())


def _short(data: str) -> str:
    """Return a hub id, or the last part of a path: others have other folders."""
    return Path(data).name if data and Path(data).exists() else data


def _facts(result: Result) -> dict[str, str]:
    """Return lengths, speed, memory and signatures for people."""
    facts = result.facts
    found = {}
    if "beams" in facts:
        found["generation"] = (f"beams {facts['beams']}, length penalty "
                               f"{facts['length_penalty']:g}, {facts['min_length']} to "
                               f"{facts['max_length']} tokens")
        found["mean length"] = f"{facts['mean_length']:.1f} tokens"
        found["speed"] = f"{facts['tokens_per_second']:.1f} tokens/s"
    elif facts.get("seconds"):
        found["speed"] = f"{facts['rows'] / facts['seconds']:.1f} rows/s"
    if facts.get("peak_bytes"):
        found["peak memory"] = mib(facts["peak_bytes"])
    return found | {f"{name} signature": text
                    for name, text in facts.get("signatures", {}).items()}
