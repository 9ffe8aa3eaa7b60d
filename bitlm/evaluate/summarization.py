"""Summarization: ROUGE of what a model writes, and the lead of the document as the baseline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from . import bootstrap
from .data import DataError, Rows, pick_column, renamed, texts
from .generation import BATCH, INPUT, Settings, generate_texts
from .language import Progress
from .result import Result

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
HEADLINE = "rougeL"
DOCUMENT = ("document", "article", "text")
SUMMARY = ("references", "summary", "highlights")
DECODER_SUFFIX = "\n\nTL;DR:"  # asks a decoder for a summary (Radford et al. 2019)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[^\sa-z])")


def examples(rows: Rows, columns: Mapping[str, str] | None = None
             ) -> tuple[list[str], list[list[str]]]:
    """Return the documents and the references of each row, one or several.

    The columns are those of DOCUMENT and SUMMARY, the first that there is, or `columns`
    (`document`, `summary`). Raises DataError for a row without a reference, or with an empty one.
    """
    named = renamed(columns, ("document", "summary"))
    document = pick_column(rows, [named["document"]] if "document" in named else DOCUMENT,
                           "the document")
    summary = pick_column(rows, [named["summary"]] if "summary" in named else SUMMARY,
                          "the summary")
    references = [_references(row.get(summary), summary, number)
                  for number, row in enumerate(rows, 1)]
    return texts(rows, document), references


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]
          ) -> dict[str, np.ndarray]:
    """Return ROUGE-1, -2, -L and -Lsum F-measures of each prediction, float64 [n], 0 to 100.

    Lin 2004, by rouge-score with its stemmer; it reads letters a to z and digits only, so it is for
    English. Of several references the best counts, for each metric by itself. For Lsum every line
    is a sentence; a text of one line is split at . ! and ?, as models write no lines.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(METRICS, use_stemmer=True)
    found = [scorer.score_multi(["\n".join(sentences(target)) for target in targets],
                                "\n".join(sentences(prediction)))
             for prediction, targets in zip(predictions, references, strict=True)]
    return {name: np.array([100.0 * each[name].fmeasure for each in found]) for name in METRICS}


def sentences(text: str) -> list[str]:
    """Return the sentences of a text: its lines where it has several, else split at . ! and ?"""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines if len(lines) > 1 else _SENTENCE_END.split(text.strip())


def lead(document: str, count: int, tokenizer: Any = None) -> str:
    """Return the first sentences of a document, one a line, without a tokenizer's special tokens:
    who copies a text with masks leaves them out.
    """
    for special in filter(None, tokenizer.all_special_tokens if tokenizer else ()):
        document = document.replace(special, " ")
    return "\n".join(sentences(document)[:count])


def prefix_of(model: nn.Module) -> str:
    """Return what a model wants before a document: T5's task name, else nothing."""
    known = (getattr(model.config, "task_specific_params", None) or {}).get("summarization", {})
    return known.get("prefix", "summarize: " if model.config.model_type == "t5" else "")


def measure(model: nn.Module, tokenizer: Any, rows: Rows, settings: Settings | None = None, *,
            task: str = "summarization", columns: Mapping[str, str] | None = None,
            prefix: str | None = None, lead_sentences: int = 3, batch_size: int = BATCH,
            max_input: int = INPUT, resamples: int = bootstrap.RESAMPLES, seed: int = 0,
            progress: Progress | None = None) -> Result:
    """Return the ROUGE of a model's summaries, with the document's lead as baseline.

    prefix: before each document, None for what `prefix_of` says; a decoder is asked by
    DECODER_SUFFIX. Raises DataError and EvaluationError as `examples` and `generate_texts` do.
    """
    settings = settings or Settings()
    documents, references = examples(rows, columns)
    # First: a missing rouge-score should not be found after an hour of generation.
    lines = rouge([lead(document, lead_sentences, tokenizer) for document in documents], references)
    written = generate_texts(
        model, tokenizer, documents, settings, batch_size=batch_size, max_input=max_input,
        prefix=prefix_of(model) if prefix is None else prefix,
        suffix="" if model.config.is_encoder_decoder else DECODER_SUFFIX, progress=progress)
    found = rouge(written.texts, references)
    scores = {name: bootstrap.of_mean(values, resamples, seed) for name, values in found.items()}
    records = [{"row": i + 1, "references": references[i], "prediction": text,
                "tokens": written.lengths[i], **{name: found[name][i] for name in METRICS}}
               for i, text in enumerate(written.texts)]
    baselines = {f"lead-{lead_sentences}": {name: float(values.mean())
                                            for name, values in lines.items()}}
    return Result(task, scores, HEADLINE, {"rows": len(documents), **asdict(settings),
                                           **written.facts()}, records, baselines)


def _references(value: Any, column: str, number: int) -> list[str]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        raise DataError(f"row {number}: {column!r} is neither a text nor a list of texts")
    if not found or not all(each.strip() for each in found):
        raise DataError(f"row {number}: the reference in {column!r} is empty: remove the row, or "
                        "give it one")
    return list(found)
