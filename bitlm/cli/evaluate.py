"""`bitlm evaluate`: measure a model on a text or a task, alone or against its dense original."""

from __future__ import annotations

from contextlib import nullcontext
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UsageError
from .output import ActivationOption, DeviceOption

if TYPE_CHECKING:
    from ..evaluate.tasks import Options

_LONGEST = 2048  # the default context of models that read more


def evaluate(
    model: Annotated[str, typer.Argument(
        help="Model folder or hub id; for glue also a folder with a model for each task.")],
    task: Annotated[str, typer.Option(
        help="What to measure: perplexity, glue, glue/NAME, summarization, xsum, cnn_dailymail, "
             "translation, wmt16/en-ro, or lm:TASK of lm-eval.")] = "perplexity",
    data: Annotated[str, typer.Option(
        help="File, folder of split files, or hub id; a text (.txt, .jsonl, .parquet) for "
             "perplexity (default: the task's own hub id).")] = "",
    split: Annotated[str | None, typer.Option(
        help="Split (default: validation for glue, else test where there is one).")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N rows.", min=1)] = None,
    columns: Annotated[str | None, typer.Option(
        help="FIELD=COLUMN,...: names of columns that differ from the task's (sentence, label, "
             "document, summary, source, target, ...).")] = None,
    context: Annotated[int | None, typer.Option(
        help=f"Perplexity: tokens in a window (default: what the model reads, at most {_LONGEST}).",
        min=2)] = None,
    windows: Annotated[int | None, typer.Option(
        help="Perplexity: use only the first N windows.", min=1)] = None,
    field: Annotated[str | None, typer.Option(
        help="Perplexity: field of the text in json and hub data (default: text).")] = None,
    against: Annotated[str, typer.Option(
        help="Dense model: adds its scores and the differences; for perplexity KL divergence, "
             "top-1 agreement and logit error.")] = "",
    activation: ActivationOption = None,
    device: DeviceOption = "cpu",
    batch_size: Annotated[int | None, typer.Option(help="Inputs that run together.", min=1)] = None,
    max_input: Annotated[int | None, typer.Option(
        help="Tokens of an input at most (default: 128 for glue, else 1024).", min=1)] = None,
    beams: Annotated[int | None, typer.Option(help="Beams; 1 is greedy.", min=1)] = None,
    length_penalty: Annotated[float | None, typer.Option(
        help="Exponent of the length in beam search.")] = None,
    min_length: Annotated[int | None, typer.Option(
        help="Tokens to write at least.", min=0)] = None,
    max_length: Annotated[int | None, typer.Option(
        help="Tokens to write at most.", min=2)] = None,
    prefix: Annotated[str | None, typer.Option(
        help="Text before each input (default: T5's own instruction).")] = None,
    source: Annotated[str | None, typer.Option(
        help="Language to translate from, as en or, with the tokenizer's own code, "
             "en:eng_Latn.")] = None,
    target: Annotated[str | None, typer.Option(help="Language to translate into.")] = None,
    include: Annotated[str | None, typer.Option(
        help="lm-eval: folder of task YAML files of your own.")] = None,
    shots: Annotated[int | None, typer.Option(
        help="lm-eval: examples in the prompt (default: the task's).", min=0)] = None,
    resamples: Annotated[int | None, typer.Option(
        help="Resamples of the confidence intervals; 0 for none (default: 1000).", min=0)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the resamples (default: 0).",
                                             min=0)] = None,
    predictions: Annotated[Path | None, typer.Option(
        help="Write what the model predicts for each row, or each window's negative "
             "log-likelihood a token, to this jsonl file.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
) -> None:
    """Measure a model on a text or a task."""
    from ..evaluate import tasks
    from .output import check_target, console, write_json, write_text

    options = tasks.Options(
        split=split, limit=limit, batch_size=batch_size, max_input=max_input,
        columns=_columns(columns), beams=beams, length_penalty=length_penalty,
        min_length=min_length, max_length=max_length, prefix=prefix, source=source, target=target,
        include=include, shots=shots, resamples=resamples, seed=seed)
    for path in (json, predictions):
        if path:
            check_target(path)
    if json and predictions and json.resolve() == predictions.resolve():
        raise UsageError(f"--json and --predictions both name {json}: give each a file of its own")
    try:
        chosen = tasks.find(task)
        if chosen.kind == "perplexity":
            tasks.check_options(chosen, options)
            found, lines = _perplexity(model, data, against, activation, device, context, windows,
                                       field or "text", options)
        else:
            tasks.check_options(chosen, options, {"context": context, "windows": windows,
                                                  "field": field})
            # The data first: a wrong path should not cost the loading of a model.
            work = tasks.prepare(chosen, data, options)
            found, lines = _task(model, task, work, against, activation, device)
    except tasks.TaskError as error:
        raise UsageError(str(error)) from None
    result, shown, card_rows = found
    console().print(shown)  # first: nothing that goes wrong with a file should cost it
    if json:
        write_json(json, result | _versions())
    if predictions:
        write_text(predictions, lines)
    if _add_to_card(Path(model), card_rows):
        console().print(f"added to {Path(model) / 'README.md'}")


Found = tuple[dict[str, Any], Any, list[dict[str, str]]]  # JSON, table, rows of the model card


def _columns(text: str | None) -> dict[str, str] | None:
    """Return columns by field of `FIELD=COLUMN,...`; UsageError for anything else."""
    if text is None:
        return None
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(field.strip() and column.strip() for field, _, column in pairs):
        raise UsageError(f"--columns {text}: expected FIELD=COLUMN,FIELD=COLUMN")
    return {field.strip(): column.strip() for field, _, column in pairs}


def _perplexity(model: str, data: str, against: str, activation: str | None, device: str,
                context: int | None, windows: int | None, field: str, options: Options
                ) -> tuple[Found, str]:
    if not data:
        raise UsageError("name a text: --data FILE.txt, FILE.jsonl or a hub id")
    from ..calibration.text import check_ids, read_texts, token_windows
    from ..evaluate import language
    from ..evaluate.bootstrap import RESAMPLES
    from ..evaluate.load import load_model
    from .output import activations_of, progress_bar

    # The text first: a wrong path should not cost the loading of a model.
    texts = read_texts(data, field=field, split="test")
    tested, tokenizer = load_model(model, activation=activation, device=device)
    dense = None
    if against:
        dense, dense_tokenizer = load_model(against, device=device)
        tokenizer = tokenizer or dense_tokenizer
    _need(tokenizer, model)
    length = context or min(language.context_length(tested) or _LONGEST, _LONGEST)
    ids = token_windows(tokenizer, texts, length, windows, seed=None)
    check_ids(ids, language.vocabulary(tested), tokenizer)
    drawn = {"resamples": RESAMPLES} | options.given("batch_size", "resamples", "seed")
    with progress_bar("windows") as progress:
        if dense is None:
            own = language.perplexity(tested, ids, progress=progress, **drawn)
            result: dict[str, Any] = own.to_dict()
        else:
            found = language.compare(tested, dense, ids, progress=progress, **drawn)
            own, theirs = found.packed, found.dense
            result = own.to_dict() | {
                "against": against, "dense_perplexity": theirs.perplexity, "kl": found.kl,
                "top1": found.top1, "logit_error": found.logit_error}
            if theirs.low is not None:
                result |= {"dense_low": theirs.low, "dense_high": theirs.high}
    lines = "".join(dumps({"task": "perplexity", "window": number, "nll": nll}) + "\n"
                    for number, nll in enumerate(own.by_window, 1))
    modes = {"activations": activations_of(tested)} if activations_of(tested) else {}
    result = {"model": model, "task": "perplexity", "data": data} | modes | result
    return (result, _perplexity_table(result), [_perplexity_row(result)]), lines


def _perplexity_table(result: dict[str, Any]) -> Any:
    from ..report import mib
    from .output import table

    def shown(prefix: str = "") -> str:
        interval = f" [{result[prefix + 'low']:.4g}, {result[prefix + 'high']:.4g}]" \
            if prefix + "low" in result else ""
        return f"{result[prefix + 'perplexity']:.4g}{interval}"

    rows = [("data", result["data"]),
            ("windows", f"{result['windows']} x {result['context']} tokens, "
                        f"{result['tokens']:,} predicted"),
            *([("activations", result["activations"])] if "activations" in result else []),
            ("perplexity", shown())]
    if "kl" in result:
        rows += [("dense perplexity", shown("dense_")),
                 ("KL (dense || packed)", f"{result['kl']:.4g} nats"),
                 ("top-1 agreement", f"{result['top1']:.1%}"),
                 ("logit error", f"{result['logit_error']:.4g}")]
    if result.get("seconds"):
        rows.append(("speed", f"{result['tokens'] / result['seconds']:.1f} tokens/s"))
    if result.get("peak_bytes"):
        rows.append(("peak memory", mib(result["peak_bytes"])))
    return table(("", result["model"]), rows)


def _perplexity_row(result: dict[str, Any]) -> dict[str, str]:
    data = Path(result["data"])
    row = {"Task": result["task"], "Data": data.name if data.exists() else result["data"],
           "Context": str(result["context"]), "Tokens": f"{result['tokens']:,}",
           "Activations": result.get("activations", ""),
           "Perplexity": f"{result['perplexity']:.4g}"}
    if "kl" in result:
        row |= {"Dense perplexity": f"{result['dense_perplexity']:.4g}",
                "KL to dense": f"{result['kl']:.4g}", "Top-1 agreement": f"{result['top1']:.1%}"}
    return row


def _task(model: str, task: str, work: list[Any], against: str, activation: str | None,
          device: str) -> tuple[Found, str]:
    """Measure a model, then the dense one, so that neither counts in the other's memory.

    Returns what is found and the predictions as jsonl.
    """
    from ..evaluate import outcome
    from .output import table

    for name in filter(None, (model, against)):  # a wrong path should not show after an hour
        _check_places(name, work)
    found = _measure(model, work, activation, device)
    dense = _measure(against, work, None, device) if against else None
    return (outcome.to_dict(found, task, dense), table(*outcome.table(found, dense)),
            outcome.card_rows(found, dense)), outcome.predictions(found, dense)


def _check_places(model: str, work: list[Any]) -> None:
    """Raise LoadError for a folder that is no model, and has none for any of the tasks."""
    from ..evaluate.load import LoadError
    from ..source import SourceError, resolve

    try:
        folder = resolve(model)
    except SourceError as error:
        raise LoadError(str(error)) from None
    if not (folder / "config.json").is_file() and not any(
            (Path(_place(model, each.task)) / "config.json").is_file() for each in work):
        raise LoadError(f"{folder} has no config.json: is it a model folder?")


def _measure(model: str, work: list[Any], activation: str | None, device: str) -> Any:
    """Return what a model scores: of several tasks, those that it is for."""
    from ..evaluate.language import EvaluationError
    from ..evaluate.load import load_model
    from ..evaluate.outcome import Outcome
    from .output import activations_of, progress_bar

    results, skipped = [], {}
    place = loaded = tokenizer = None
    for each in work:
        wanted = _place(model, each.task)
        if len(work) > 1 and wanted == model and Path(model).is_dir() and \
                not (Path(model) / "config.json").is_file():
            skipped[each.task] = f"{model} has no model for it"
            continue
        if wanted != place:
            loaded = tokenizer = None  # freed before the next one is loaded
            loaded, tokenizer = load_model(wanted, activation=activation, device=device)
            _need(tokenizer, wanted)
            place = wanted
        try:
            if each.check:
                each.check(loaded)
        except EvaluationError as error:
            if len(work) == 1:
                raise
            skipped[each.task] = str(error)
            continue
        with progress_bar(each.task) if each.tells else nullcontext() as progress:
            results += [(each, result) for result in each.measure(loaded, tokenizer, progress)]
    if not results:
        raise EvaluationError(f"{model} is for none of these tasks: "
                              + "; ".join(f"{task}: {why}" for task, why in skipped.items()))
    return Outcome(model, results, skipped, activations_of(loaded))


def _place(model: str, task: str) -> str:
    """Return the model for a task: of a folder with a model for each task, its folder."""
    own = Path(model) / task.rpartition("/")[2]
    if (Path(model) / "config.json").exists() or not (own / "config.json").exists():
        return model
    return str(own)


def _need(tokenizer: Any, model: str) -> None:
    from ..evaluate.load import LoadError

    if tokenizer is None:
        raise LoadError(f"{model} has no tokenizer: copy the files tokenizer* of the dense model "
                        "into its folder")


def _add_to_card(folder: Path, rows: list[dict[str, str]]) -> bool:
    """Add rows to the model card of a packed folder; tell whether there was one."""
    from ..evaluate.card import add_measurement
    from ..evaluate.load import packed_config
    from .output import write_text

    path = folder / "README.md"
    if not path.is_file() or packed_config(folder) is None:
        return False
    card = path.read_text("utf-8")
    for row in rows:
        card = add_measurement(card, row)
    write_text(path, card)
    return True


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from .output import version
    return {"bitlm": version(), "torch": torch.__version__,
            "transformers": transformers.__version__}
