"""`bitlm evaluate`: measure a model on a text, alone or against its dense original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UsageError
from .output import ActivationOption

TASKS = ("perplexity",)
_LONGEST = 2048  # the default context of models that read more


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    task: Annotated[str, typer.Option(help="What to measure: perplexity.")] = "perplexity",
    data: Annotated[str, typer.Option(help="Text: .txt, .jsonl, .parquet file, or hub id.")] = "",
    context: Annotated[int | None, typer.Option(
        help=f"Tokens in a window (default: what the model reads, at most {_LONGEST}).",
        min=2)] = None,
    windows: Annotated[int | None, typer.Option(
        help="Use only the first N windows.", min=1)] = None,
    against: Annotated[str, typer.Option(help="Dense model: adds KL divergence, top-1 agreement "
                                              "and logit error.")] = "",
    activation: ActivationOption = None,
    field: Annotated[str, typer.Option(help="Field of the text in json and hub data.")] = "text",
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file.")] = None,
) -> None:
    """Measure a model on a text."""
    if task not in TASKS:
        raise UsageError(f"unknown task {task!r}: the tasks are {', '.join(TASKS)}")
    if not data:
        raise UsageError("name a text: --data FILE.txt, FILE.jsonl or a hub id")
    from ..calibration.text import check_ids, read_texts, token_windows
    from ..evaluate import language
    from ..evaluate.load import LoadError, load_model
    from .output import activations_of, check_target, console, progress_bar, write_json

    if json:
        check_target(json)
    # The text first: a wrong path should not cost the loading of a model.
    texts = read_texts(data, field=field, split="test")
    tested, tokenizer = load_model(model, activation=activation)
    dense = None
    if against:
        dense, dense_tokenizer = load_model(against)
        tokenizer = tokenizer or dense_tokenizer
    if tokenizer is None:
        raise LoadError(f"{model} has no tokenizer: copy the files tokenizer* of the dense model "
                        "into its folder")
    length = context or min(language.context_length(tested) or _LONGEST, _LONGEST)
    ids = token_windows(tokenizer, texts, length, windows, seed=None)
    check_ids(ids, language.vocabulary(tested), tokenizer)
    with progress_bar("windows") as progress:
        if dense is None:
            result: dict[str, Any] = vars(language.perplexity(tested, ids, progress=progress))
        else:
            found = language.compare(tested, dense, ids, progress=progress)
            result = vars(found.packed) | {
                "against": against, "dense_perplexity": found.dense.perplexity, "kl": found.kl,
                "top1": found.top1, "logit_error": found.logit_error}
    modes = {"activations": activations_of(tested)} if activations_of(tested) else {}
    result = {"model": model, "task": task, "data": data} | modes | result
    console().print(_table(result))
    if json:
        write_json(json, result | _versions())
    if _add_to_card(Path(model), result):
        console().print(f"added to {Path(model) / 'README.md'}")


def _table(result: dict[str, Any]) -> Any:
    from .output import table

    rows = [("data", result["data"]),
            ("windows", f"{result['windows']} x {result['context']} tokens, "
                        f"{result['tokens']:,} predicted"),
            *([("activations", result["activations"])] if "activations" in result else []),
            ("perplexity", f"{result['perplexity']:.4g}")]
    if "kl" in result:
        rows += [("dense perplexity", f"{result['dense_perplexity']:.4g}"),
                 ("KL (dense || packed)", f"{result['kl']:.4g} nats"),
                 ("top-1 agreement", f"{result['top1']:.1%}"),
                 ("logit error", f"{result['logit_error']:.4g}")]
    return table(("", result["model"]), rows)


def _add_to_card(folder: Path, result: dict[str, Any]) -> bool:
    """Add the result to the model card of a packed folder; tell whether there was one."""
    from ..evaluate.card import add_measurement
    from ..evaluate.load import packed_config
    from .output import write_text

    card = folder / "README.md"
    if not card.is_file() or packed_config(folder) is None:
        return False
    data = Path(result["data"])
    row = {"Task": result["task"], "Data": data.name if data.exists() else result["data"],
           "Context": str(result["context"]), "Tokens": f"{result['tokens']:,}",
           "Activations": result["activations"], "Perplexity": f"{result['perplexity']:.4g}"}
    if "kl" in result:
        row |= {"Dense perplexity": f"{result['dense_perplexity']:.4g}",
                "KL to dense": f"{result['kl']:.4g}", "Top-1 agreement": f"{result['top1']:.1%}"}
    write_text(card, add_measurement(card.read_text("utf-8"), row))
    return True


def _versions() -> dict[str, str]:
    import torch
    import transformers

    from .output import version
    return {"bitlm": version(), "torch": torch.__version__,
            "transformers": transformers.__version__}
