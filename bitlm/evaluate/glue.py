"""The nine GLUE tasks: their columns, labels and official metrics, measured on a classifier.

GLUE: Wang et al. 2018, arXiv 1804.07461. A task with several metrics has their mean as headline, as
on the benchmark's own board: accuracy and F1 (MRPC, QQP), Pearson and Spearman (STS-B), the two
halves of MNLI. All are fractions of 1.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.text import check_ids
from ..source import quiet
from . import bootstrap, metrics
from .batches import by_length, evaluating, reads
from .data import DataError, Rows, pick_column, renamed, texts
from .language import EvaluationError, Progress, check_pads, vocabulary
from .peak import peak_bytes
from .result import Result, Score, mean

log = logging.getLogger("bitlm")

LENGTH = 128  # tokens, as the papers cut their inputs
BATCH = 32


@dataclass(frozen=True)
class GlueTask:
    """One task: its text columns, the names of its labels in their order, its metrics.

    No labels: a number from 0 to 5 is predicted. splits: what is measured, test labels being
    secret.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    splits: tuple[str, ...] = ("validation",)

    @property
    def outputs(self) -> int:
        """How many outputs a model for this task has."""
        return len(self.labels) or 1


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"),
                    ("accuracy", "f1")),
    "stsb": GlueTask(_PAIR, (), ("pearson", "spearman")),
    "mnli": GlueTask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"),
                     splits=("validation_matched", "validation_mismatched")),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT),
    "rte": GlueTask(_PAIR, _ENTAILMENT),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment")),
}
HIGHEST = 5.0  # STS-B's label of equal meaning


def find(folder: str | Path) -> dict[str, Path]:
    """Return the folders of tasks in a folder, by task: `sst2` is also found as `SST-2`."""
    named = {path.name.lower().replace("-", ""): path
             for path in sorted(Path(folder).iterdir()) if path.is_dir()}
    return {task: named[task] for task in TASKS if task in named}


def examples(task: str, rows: Rows, columns: Mapping[str, str] | None = None
             ) -> tuple[list[tuple[str, ...]], list[int] | list[float]]:
    """Return the texts of each row, one or two, and the labels in the task's numbering.

    columns: the names of columns by the task's own (`label` too), where they differ. A label is a
    number or a name. Raises DataError for a label outside the task's range, naming the row.
    """
    wanted = TASKS[task]
    named = renamed(columns, (*wanted.columns, "label"))
    found = [texts(rows, pick_column(rows, [named.get(column, column)]))
             for column in wanted.columns]
    label = pick_column(rows, [named.get("label", "label")])
    labels = [_label(wanted, row.get(label), number) for number, row in enumerate(rows, 1)]
    return list(zip(*found)), labels


def check_model(model: nn.Module, task: str) -> None:
    """Raise EvaluationError for a model that has not the task's number of outputs."""
    outputs, wanted = model.config.num_labels, TASKS[task].outputs
    if outputs != wanted:
        raise EvaluationError(f"the model has {outputs} output{'s' * (outputs != 1)}, {task} needs "
                              f"{wanted}: it was not fine-tuned on {task}")


def predict(model: nn.Module, tokenizer: Any, inputs: Sequence[tuple[str, ...]],
            batch_size: int = BATCH, max_length: int = LENGTH, progress: Progress | None = None
            ) -> Tensor:
    """Return a classifier's outputs for texts or pairs of texts, float32 [n, outputs], in order.

    The texts run in batches of similar length, cut at max_length tokens; `progress` gets (texts
    done, texts). Raises EvaluationError for a model that is no sequence classifier, and where an
    output is NaN, TextError for a tokenizer with more tokens than the model has.
    """
    if None in (tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None)):
        batch_size = 1  # nothing says where a padded text ends
    limit = reads(model, tokenizer, max_length)
    encoded = tokenizer(*map(list, zip(*inputs)), truncation=True, max_length=limit)
    if batch_size > 1:
        check_pads(model, tokenizer)
    check_ids(torch.tensor([max(ids, default=0) for ids in encoded["input_ids"]]),
              vocabulary(model), tokenizer)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    outputs = torch.empty(len(inputs), model.config.num_labels)
    done = 0
    with evaluating(model), quiet():
        for batch in by_length(lengths, batch_size):
            fields = {name: [values[i] for i in batch] for name, values in encoded.items()}
            if batch_size > 1:
                fields = tokenizer.pad(fields)
            tensors = {name: torch.tensor(values, device=model.device)
                       for name, values in fields.items()}
            logits = getattr(model(**tensors), "logits", None)
            if logits is None or logits.shape != (len(batch), outputs.shape[1]):
                raise EvaluationError(f"{type(model).__name__} is no sequence classifier: GLUE is "
                                      "measured on fine-tuned ones")
            outputs[batch] = logits.float().cpu()
            done += len(batch)
            if progress:
                progress(done, len(inputs))
    broken = outputs.isnan().any(1).nonzero()
    if len(broken):
        raise EvaluationError(f"the model's output for row {int(broken[0]) + 1} is NaN")
    return outputs


def label_order(model: nn.Module, task: str) -> list[int]:
    """Return which output of a model belongs to each label of a task.

    By the names in the model's config where those are the task's, in any case and order; else the
    outputs are taken in the task's order.
    """
    labels = TASKS[task].labels
    named = {str(name).lower(): int(number)
             for number, name in (model.config.id2label or {}).items()}
    if all(name.startswith("label_") for name in named):  # transformers' own: it was not said
        named = {str(name).lower(): int(number)
                 for name, number in (model.config.label2id or {}).items()} or named
    if labels and set(labels) == set(named):
        return [named[label] for label in labels]
    if labels and not all(name.startswith("label_") for name in named):
        log.warning("the model names its outputs %s, %s %s: they are taken in this order",
                    ", ".join(named), task, ", ".join(labels))
    return list(range(TASKS[task].outputs))


def predictions(model: nn.Module, task: str, outputs: Tensor) -> list[int] | list[float]:
    """Return labels in the task's numbering, or STS-B's numbers, of a model's outputs."""
    if not TASKS[task].labels:
        return outputs[:, 0].tolist()
    return outputs[:, label_order(model, task)].argmax(1).tolist()


def scores(task: str, predicted: Sequence[float], labels: Sequence[float],
           resamples: int = bootstrap.RESAMPLES, seed: bootstrap.Seed = 0) -> dict[str, Score]:
    """Return the metrics of a task by name, with their `mean` where there are several.

    resamples: 0 for no confidence intervals.
    """
    wanted = TASKS[task]
    found = {name: metrics.score(name, predicted, labels, wanted.outputs, resamples, seed)
             for name in wanted.metrics}
    return _with_mean(found)


def measure(model: nn.Module, tokenizer: Any, task: str, splits: Mapping[str, Rows], *,
            columns: Mapping[str, str] | None = None, batch_size: int = BATCH,
            max_length: int = LENGTH, resamples: int = bootstrap.RESAMPLES, seed: int = 0,
            progress: Progress | None = None) -> Result:
    """Return what a sequence classifier scores on a GLUE task.

    splits: the rows of each split that counts: one, or MNLI's two halves, whose metrics then bear
    the half's name. Raises DataError and EvaluationError as the functions above do.
    """
    check_model(model, task)
    read = {split: examples(task, rows, columns) for split, rows in splits.items()}
    total = sum(len(labels) for _, labels in read.values())
    found: dict[str, Score] = {}
    records: list[dict[str, Any]] = []
    seconds = 0.0
    for half, (split, (inputs, labels)) in enumerate(read.items()):
        before, start = len(records), time.perf_counter()
        outputs = predict(model, tokenizer, inputs, batch_size, max_length, progress and (
            lambda done, _, before=before: progress(before + done, total)))
        seconds += time.perf_counter() - start
        predicted = predictions(model, task, outputs)
        # Each data set is drawn by itself, or a mean over them would vary too much.
        key = [seed, list(TASKS).index(task), half]
        suffix = f" {split.partition('_')[2]}" if len(read) > 1 else ""
        found |= {name + suffix: score for name, score in
                  scores(task, predicted, labels, resamples, key).items()}
        records += [{"split": split, "row": row, "label": label, "prediction": prediction,
                     "outputs": values} for row, (label, prediction, values) in
                    enumerate(zip(labels, predicted, outputs.tolist()), 1)]
    found = _with_mean(found) if len(read) > 1 else found
    facts = {"rows": total, "max_length": max_length, "seconds": seconds,
             "peak_bytes": peak_bytes(model.device)}
    headline = "mean" if "mean" in found else next(iter(found))
    return Result(f"glue/{task}", found, headline, facts, records)


def average(results: Sequence[Result]) -> Score:
    """Return the mean of the headlines of several tasks."""
    return mean([result.scores[result.headline] for result in results])


def _with_mean(found: dict[str, Score]) -> dict[str, Score]:
    return found | {"mean": mean(list(found.values()))} if len(found) > 1 else found


def _label(task: GlueTask, value: Any, number: int) -> int | float:
    """Return a row's label as the task's number; DataError for any other."""
    if isinstance(value, str) and value.lower() in task.labels:
        return task.labels.index(value.lower())
    try:
        label = float(value)
    except (TypeError, ValueError):
        label = math.nan
    if not task.labels and 0 <= label <= HIGHEST:
        return label
    if label in range(len(task.labels)):
        return int(label)
    names = ", ".join(f"{i} {name}" for i, name in enumerate(task.labels))
    secret = ": a test split, whose labels are secret? Use the validation split" * (label == -1)
    raise DataError(f"row {number}: label {value!r} is none of "
                    f"{names or f'the numbers 0 to {HIGHEST:g}'}{secret}")
