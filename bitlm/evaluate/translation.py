"""Translation: sacreBLEU and chrF of what a model writes, and the source itself as the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import nn

from . import bootstrap
from .data import DataError, Rows, pick_column, renamed, texts
from .generation import BATCH, INPUT, Settings, generate_texts
from .language import EvaluationError, Progress
from .result import Result, Score

HEADLINE = "bleu"
LANGUAGES = {"cs": "Czech", "de": "German", "en": "English", "es": "Spanish", "et": "Estonian",
             "fi": "Finnish", "fr": "French", "it": "Italian", "nl": "Dutch", "pl": "Polish",
             "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "tr": "Turkish",
             "zh": "Chinese"}


@dataclass(frozen=True)
class Route:
    """How a model is told from which language into which.

    prefix, suffix: around each text. options: arguments of `generate`.
    """

    prefix: str = ""
    suffix: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def route(model: nn.Module, tokenizer: Any, source: str, target: str, prefix: str | None = None
          ) -> Route:
    """Return how to ask a model for a translation; a multilingual tokenizer is set to the pair.

    A tokenizer with language codes (mBART, mBART-50, M2M-100, NLLB) gets its `src_lang` and
    `tgt_lang`, and the first token of the output is forced, which mBART takes as its start. T5 gets
    its own instruction, a decoder one with the languages' names; other models are bilingual and
    need nothing. prefix: in place of the instruction. source, target: codes as `en` or, where the
    tokenizer has others, its own (`en_XX`, `eng_Latn`). Raises EvaluationError for a language that
    the tokenizer does not know.
    """
    if hasattr(tokenizer, "src_lang"):
        tokenizer.src_lang = _code(tokenizer, source)
        tokenizer.tgt_lang = _code(tokenizer, target)
        start = _codes(tokenizer)[tokenizer.tgt_lang]
        # The first mBART has no start token but the language; the later ones write it themselves.
        first = type(tokenizer).__name__.startswith("MBartTokenizer")
        return Route(prefix or "", options={
            "decoder_start_token_id" if first else "forced_bos_token_id": start})
    names = [LANGUAGES.get(code, code) for code in (source, target)]
    if not model.config.is_encoder_decoder:
        return Route(f"{names[0]}: " if prefix is None else prefix, f"\n{names[1]}:")
    known = getattr(model.config, "task_specific_params", None) or {}
    own = known.get(f"translation_{source}_to_{target}", {}).get("prefix")
    if own is None and model.config.model_type == "t5":
        own = f"translate {names[0]} to {names[1]}: "
    return Route((own or "") if prefix is None else prefix)


def examples(rows: Rows, source: str, target: str, columns: Mapping[str, str] | None = None
             ) -> tuple[list[str], list[str]]:
    """Return the texts in the source language and those in the target language.

    The columns are named by the language codes, in the rows or in their field `translation`;
    columns: other names of `source` and `target`. Raises DataError for an empty target, naming the
    row.
    """
    named = renamed(columns, ("source", "target"))
    if isinstance(rows[0].get("translation"), dict):
        inner = [row.get("translation") for row in rows]
        wrong = next((i for i, each in enumerate(inner, 1) if not isinstance(each, dict)), None)
        if wrong:
            raise DataError(f"row {wrong}: 'translation' has no text for each language")
        rows = inner
    pairs = [texts(rows, pick_column(rows, [named.get(side, code)], f"the {side}"))
             for side, code in (("source", source), ("target", target))]
    for number, text in enumerate(pairs[1], 1):
        if not text.strip():
            raise DataError(f"row {number}: the reference is empty: remove the row, or give it one")
    return pairs[0], pairs[1]


def bleu(predictions: Sequence[str], references: Sequence[str], target: str = "",
         resamples: int = bootstrap.RESAMPLES, seed: bootstrap.Seed = 0
         ) -> tuple[dict[str, Score], dict[str, str]]:
    """Return corpus BLEU and chrF, 0 to 100, and their sacreBLEU signatures, by metric.

    target: the language, whose words sacreBLEU finds in its own way for zh, ja and ko. Raises
    EvaluationError where that needs a library that is not installed.

    Papineni et al. 2002 and Popovic 2015, as sacreBLEU's defaults compute them (Post 2018): the
    counts of n-grams are added up over the sentences, those drawn for the confidence interval.
    """
    from sacrebleu.metrics import BLEU, CHRF

    try:
        words = BLEU(trg_lang=target)
    except (ImportError, RuntimeError) as error:
        raise EvaluationError(f"sacreBLEU cannot read {target}: {str(error).strip()}") from None
    found, signatures = {}, {}
    for name, metric in (("bleu", words), ("chrf", CHRF())):
        # The two methods are what sacreBLEU asks every metric to have, and its own bootstrap uses.
        counts = metric._extract_corpus_statistics(list(predictions), [list(references)])
        found[name] = bootstrap.of_sums(
            np.array(counts), lambda sums, metric=metric: np.array(
                [metric._compute_score_from_stats(each).score
                 for each in np.rint(sums).astype(int).tolist()]), resamples, seed)
        signatures[name] = str(metric.get_signature())
    return found, signatures


def measure(model: nn.Module, tokenizer: Any, rows: Rows, source: str, target: str,
            settings: Settings | None = None, *, task: str = "translation",
            codes: tuple[str, str] | None = None, columns: Mapping[str, str] | None = None,
            prefix: str | None = None, batch_size: int = BATCH, max_input: int = INPUT,
            resamples: int = bootstrap.RESAMPLES, seed: int = 0, progress: Progress | None = None
            ) -> Result:
    """Return BLEU and chrF of a model's translations, with the copied source as baseline.

    source, target: languages, which name the columns too. codes: the tokenizer's own for them. Of a
    decoder's output the first line counts. Raises DataError and EvaluationError as the functions
    above and `generate_texts` do.
    """
    settings = settings or Settings()
    sources, references = examples(rows, source, target, columns)
    # First: a missing sacrebleu should not be found after an hour of generation.
    copied, _ = bleu(sources, references, target, resamples=0)
    way = route(model, tokenizer, *(codes or (source, target)), prefix)
    written = generate_texts(model, tokenizer, sources, settings, prefix=way.prefix,
                             suffix=way.suffix, options=way.options, batch_size=batch_size,
                             max_input=max_input, progress=progress)
    lines = written.texts if model.config.is_encoder_decoder else [
        text.partition("\n")[0].strip() for text in written.texts]
    scores, signatures = bleu(lines, references, target, resamples, seed)
    records = [{"row": i + 1, "source": sources[i], "reference": references[i],
                "prediction": line, "tokens": written.lengths[i]} for i, line in enumerate(lines)]
    baselines = {"copy": {name: score.value for name, score in copied.items()}}
    return Result(task, scores, HEADLINE, {
        "source": source, "target": target, "rows": len(sources), "signatures": signatures,
        **asdict(settings), **written.facts()}, records, baselines)


def _codes(tokenizer: Any) -> dict[str, int]:
    """Return the token of each language that a multilingual tokenizer knows."""
    known = getattr(tokenizer, "lang_code_to_id", None)
    return known or {token: tokenizer.convert_tokens_to_ids(token)
                     for token in map(str, tokenizer.all_special_tokens)}


def _code(tokenizer: Any, language: str) -> str:
    """Return a tokenizer's own code of a language: `en` is also found as `en_XX`."""
    codes = _codes(tokenizer)
    found = [code for code in codes if code == language or code.startswith(f"{language}_")]
    if not found:
        raise EvaluationError(f"the tokenizer has no language {language!r}: give its own code; it "
                              f"has {', '.join(sorted(codes))}")
    return language if language in found else found[0]
