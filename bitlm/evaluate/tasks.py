"""The tasks that `bitlm evaluate` knows, and a task with its data read and its options set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from . import glue, harness, summarization, translation
from .data import DataError, Rows, choose_split, load_split, splits
from .generation import Settings
from .language import Progress
from .result import Result

log = logging.getLogger("bitlm")

Measure = Callable[[nn.Module, Any, Progress | None], list[Result]]


@dataclass(frozen=True)
class Task:
    """A task by the name that users type.

    kind: perplexity, glue, summarization, translation or harness. data, config: of the hub, read
    where no data is named. splits: the first one that the data has is measured. settings: of the
    generation. lead: sentences of the baseline. languages: source and target.
    """

    name: str
    kind: str
    data: str = ""
    config: str | None = None
    splits: tuple[str, ...] = ("test", "validation")
    settings: Settings | None = None
    lead: int = 3
    languages: tuple[str, str] | None = None


_BEAMS = Settings(beams=5, max_length=200)
# Beam settings of XSum and CNN/DailyMail: TBT, arXiv 2306.01841.
TASKS: dict[str, Task] = {task.name: task for task in (
    Task("perplexity", "perplexity"),
    Task("glue", "glue", "nyu-mll/glue"),
    *(Task(f"glue/{name}", "glue", "nyu-mll/glue", name, each.splits)
      for name, each in glue.TASKS.items()),
    Task("summarization", "summarization", settings=Settings()),
    Task("xsum", "summarization", "EdinburghNLP/xsum", lead=1,
         settings=Settings(beams=6, length_penalty=1.0, min_length=11, max_length=62)),
    Task("cnn_dailymail", "summarization", "abisee/cnn_dailymail", "3.0.0", lead=3,
         settings=Settings(beams=4, length_penalty=2.0, min_length=56, max_length=142)),
    Task("translation", "translation", settings=_BEAMS),
    Task("wmt16/en-ro", "translation", "wmt/wmt16", "ro-en", settings=_BEAMS,
         languages=("en", "ro")),
    Task("wmt16/ro-en", "translation", "wmt/wmt16", "ro-en", settings=_BEAMS,
         languages=("ro", "en")),
)}
HARNESS = "lm:"  # and the names of lm-eval's tasks, with commas


@dataclass(frozen=True)
class Options:
    """What a user may set; None leaves the task's or the function's own value.

    source, target: a language code, or `code:tokenizer's own code`.
    """

    split: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    max_input: int | None = None
    columns: dict[str, str] | None = None
    beams: int | None = None
    length_penalty: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    prefix: str | None = None
    source: str | None = None
    target: str | None = None
    include: str | None = None
    shots: int | None = None
    resamples: int | None = None
    seed: int | None = None

    def given(self, *names: str) -> dict[str, Any]:
        """Return the named options that were set, all of them without names."""
        return {name: value for name, value in vars(self).items()
                if value is not None and (not names or name in names)}


_SETTINGS = ("beams", "length_penalty", "min_length", "max_length")
_ROWS = ("split", "limit", "batch_size", "max_input", "columns", "resamples", "seed")
TAKES: dict[str, tuple[str, ...]] = {
    "perplexity": ("batch_size", "resamples", "seed"),
    "glue": _ROWS,
    "summarization": (*_ROWS, *_SETTINGS, "prefix"),
    "translation": (*_ROWS, *_SETTINGS, "prefix", "source", "target"),
    "harness": ("limit", "batch_size", "include", "shots", "resamples", "seed"),
}


@dataclass(frozen=True)
class Work:
    """A task whose data is read. measure: (model, tokenizer, progress) -> the results.

    check: raises EvaluationError for a model that the task is not for. tells: whether `measure`
    calls its progress.
    """

    task: str
    data: str
    split: str
    measure: Measure
    check: Callable[[nn.Module], None] | None = None
    tells: bool = True


class TaskError(ValueError):
    """A task or an option that does not exist: the message names those that do."""


def find(name: str) -> Task:
    """Return the task of a name; TaskError where there is none."""
    if name.startswith(HARNESS) and name != HARNESS:
        return Task(name, "harness")
    if name not in TASKS:
        raise TaskError(f"unknown task {name!r}: the tasks are {', '.join(TASKS)}, {HARNESS}TASK")
    return TASKS[name]


def check_options(task: Task, options: Options, others: dict[str, Any] | None = None) -> None:
    """Raise TaskError for an option that is set and that the task does not take.

    others: options of other tasks, by name.
    """
    taken = TAKES[task.kind]
    wrong = [name for name in options.given() if name not in taken]
    wrong += [name for name, value in (others or {}).items() if value is not None]
    if wrong:
        raise TaskError(f"{task.name} takes no --{wrong[0].replace('_', '-')}")


def prepare(task: Task, data: str = "", options: Options | None = None) -> list[Work]:
    """Return what to measure, the data read: one piece of work, of `glue` one for each task.

    data: file, folder or hub id, the task's own where it is empty. Raises TaskError for an option
    that the task does not take and for missing data or languages, DataError for data that cannot be
    used.
    """
    options = options or Options()
    check_options(task, options)
    if task.kind == "harness":
        return [_of_harness(task, data, options)]
    data = data or task.data
    if not data:
        raise TaskError(f"name the data of {task.name}: --data FILE.jsonl, a folder or a hub id")
    if task.kind == "glue":
        return _of_glue(task, data, options)
    make = {"summarization": _of_summaries, "translation": _of_translations}[task.kind]
    split = options.split or choose_split(data, task.splits, task.config)
    rows = load_split(data, split, task.config, options.limit)
    settings = replace(task.settings, **options.given(*_SETTINGS))
    common = options.given("batch_size", "max_input", "columns", "prefix", "resamples", "seed")
    return [Work(task.name, data, split, make(task, rows, settings, options, common))]


def _of_summaries(task: Task, rows: Rows, settings: Settings, options: Options,
                  common: dict[str, Any]) -> Measure:
    summarization.examples(rows, options.columns)  # bad rows show before a model is loaded
    return lambda model, tokenizer, progress: [summarization.measure(
        model, tokenizer, rows, settings, task=task.name, lead_sentences=task.lead,
        progress=progress, **common)]


def _of_translations(task: Task, rows: Rows, settings: Settings, options: Options,
                     common: dict[str, Any]) -> Measure:
    given = options.source, options.target
    pair = [side or own for side, own in zip(given, task.languages or (None, None))]
    if None in pair:
        raise TaskError(f"name the languages of {task.name}: --source en --target ro")
    (source, _, source_code), (target, _, target_code) = (side.partition(":") for side in pair)
    translation.examples(rows, source, target, options.columns)
    return lambda model, tokenizer, progress: [translation.measure(
        model, tokenizer, rows, source, target, settings, task=task.name,
        codes=(source_code or source, target_code or target), progress=progress, **common)]


def _of_harness(task: Task, data: str, options: Options) -> Work:
    if data:
        raise TaskError(f"{task.name} takes no --data: the task's YAML names it, and --include "
                        "FOLDER finds YAML of your own")
    names = task.name.removeprefix(HARNESS).split(",")
    common = options.given(*TAKES["harness"])
    return Work(task.name, "", "", lambda model, tokenizer, progress: harness.measure(
        model, tokenizer, names, **common), tells=False)


def _of_glue(task: Task, data: str, options: Options) -> list[Work]:
    folders = glue.find(data) if Path(data).is_dir() else {}
    names = [task.config] if task.config else list(folders if Path(data).exists() else glue.TASKS)
    if not names:
        raise DataError(f"{data} holds no folder of a GLUE task: expected {', '.join(glue.TASKS)}; "
                        "for the files of one task name it, as --task glue/sst2")
    return [_of_glue_task(name, str(folders.get(name, data)), options) for name in names]


def _of_glue_task(name: str, data: str, options: Options) -> Work:
    rows = {split: load_split(data, split, name, options.limit)
            for split in _glue_splits(data, name, options.split)}
    for each in rows.values():
        try:
            glue.examples(name, each, options.columns)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
    common = options.given("batch_size", "columns", "resamples", "seed")
    if options.max_input is not None:
        common["max_length"] = options.max_input
    return Work(f"glue/{name}", data, " + ".join(rows),
                lambda model, tokenizer, progress: [glue.measure(
                    model, tokenizer, name, rows, progress=progress, **common)],
                lambda model: glue.check_model(model, name))


def _glue_splits(data: str, name: str, asked: str | None) -> list[str]:
    """Return the splits of a task to measure: of MNLI both halves, where the data has halves."""
    wanted = glue.TASKS[name].splits
    if asked:
        return [asked]
    if not Path(data).is_dir():
        return [""] if Path(data).is_file() else list(wanted)
    present = splits(data, name)
    found = [split for split in wanted if split in present]
    for half in set(wanted) - set(found) if found else ():
        log.warning("%s has no %s: the score of %s is that of one half", data, half, name)
    return found or [choose_split(data, tuple(dict.fromkeys((*wanted, "validation"))), name)]
