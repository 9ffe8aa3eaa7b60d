"""Tasks of the Language Model Evaluation Harness (lm-eval) on a loaded model.

Offline too: with local data named by local YAML files (`include`). Its GLUE tasks prompt a language
model, they are not those of glue.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from . import bootstrap
from .batches import evaluating
from .language import EvaluationError
from .peak import peak_bytes
from .result import Result, Score

BATCH = 8
_NORMAL = 1.959964  # standard errors to each side of a 95 % interval


def measure(model: nn.Module, tokenizer: Any, tasks: Sequence[str], *,
            include: str | Path | None = None, shots: int | None = None, limit: int | None = None,
            batch_size: int = BATCH, resamples: int = bootstrap.RESAMPLES, seed: int = 0
            ) -> list[Result]:
    """Return the results of lm-eval tasks, one for each task; of a group its subtasks too.

    include: a folder of task YAML files, looked in first. shots: examples in the prompt, None for
    the task's own. limit: documents of each task. Metrics that are means over documents are
    bootstrapped here, the others get lm-eval's standard error. Raises EvaluationError where lm-eval
    is not installed, does not know a task or cannot read the task's data.
    """
    evaluator, lm, manager = _library()
    if include is not None and not Path(include).is_dir():
        raise EvaluationError(f"{include} is no folder of task files")
    if not model.can_generate():
        raise EvaluationError(f"{type(model).__name__} is no language model: lm-eval needs one")
    known = _manager(manager, tasks, include)
    start = time.perf_counter()
    with evaluating(model):
        try:
            found = evaluator.simple_evaluate(
                lm(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=list(tasks), task_manager=known, num_fewshot=shots, limit=limit,
                random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
                fewshot_random_seed=seed)
        except Exception as error:  # a task of the user's may fail in any way
            what = (str(error).strip().splitlines() or [""])[0][:300]
            raise EvaluationError(f"lm-eval could not measure {', '.join(tasks)}: "
                                  f"{type(error).__name__}: {what}") from error
    facts = {"seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(model.device)}
    return [_result(name, values, found, facts, resamples, seed)
            for name, values in found["results"].items() if _metrics(values)]


def _library() -> tuple[Any, Any, Any]:
    """Return lm-eval's evaluator, its wrapper of a model, its manager of tasks."""
    try:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(f"lm-eval is not installed or not whole ({error}): pip install "
                              "lm-eval") from None
    return evaluator, HFLM, TaskManager


def _manager(manager: Any, tasks: Sequence[str], include: str | Path | None) -> Any:
    """Return a manager that knows the tasks; without lm-eval's thousands where `include` does."""
    own = manager(include_path=str(include), include_defaults=False) if include else None
    if own and set(tasks) <= set(own.all_tasks):
        return own
    every = manager(include_path=str(include) if include else None)
    missing = [task for task in tasks if task not in every.all_tasks]
    if missing:
        raise EvaluationError(f"lm-eval has no task {missing[0]}: `lm_eval ls tasks` lists them, "
                              "and a folder of your own YAML files can be included")
    return every


def _metrics(values: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return value and standard error of each metric; their keys are `metric,filter`."""
    found = {}
    for key, value in values.items():
        name, _, way = key.partition(",")
        if way and not name.endswith("_stderr") and isinstance(value, (int, float)):
            error = values.get(f"{name}_stderr,{way}")
            shown = name if way == "none" else f"{name} ({way})"
            found[shown] = float(value), error if isinstance(error, float) else None
    return found


def _result(name: str, values: dict[str, Any], found: dict[str, Any], facts: dict[str, Any],
            resamples: int, seed: int) -> Result:
    samples = sorted(found.get("samples", {}).get(name, []), key=lambda each: each["doc_id"])
    scores = {}
    for metric, (value, error) in _metrics(values).items():
        plain, _, way = metric.partition(" (")
        items = [each.get(plain) for each in samples
                 if each.get("filter", "none") == (way.rstrip(")") or "none")]
        scores[metric] = _score(value, error, items, resamples, seed)
    records = [{"row": each["doc_id"] + 1, "filter": each.get("filter", "none"),
                "target": each["target"], "responses": each["filtered_resps"],
                **{key: each[key] for key in each.get("metrics", [])}} for each in samples]
    count = found.get("n-samples", {}).get(name, {}).get("effective", len(samples))
    return Result(f"lm:{name}", scores, next(iter(scores)),
                  {"rows": count, "shots": found.get("n-shot", {}).get(name), **facts},
                  json.loads(json.dumps(records, default=str)))


def _score(value: float, error: float | None, items: list[Any], resamples: int, seed: int) -> Score:
    numbers = [float(item) for item in items if isinstance(item, (int, float))]
    if numbers and len(numbers) == len(items):
        score = bootstrap.of_mean(numbers, resamples, seed)
        if abs(score.value - value) <= 1e-9 * max(1, abs(value)):  # the metric is a mean
            return score
    if error is None:
        return Score(value)
    return Score(value, value - _NORMAL * error, value + _NORMAL * error)
