"""Distil a binary or ternary translator from mBART, T5, or a small model made from the data.

    bitlm distill translation scheme=w1a8 out=OUT                       # WMT16 En-Ro, mBART
    bitlm distill translation data=DIR model=new scheme=w1a8,w1a1 profile=small out=OUT

The teacher is fine-tuned first where teacher.epochs says so. With model=new it is made from the
data alone: a tokenizer and a BART of random weights.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoConfig, DataCollatorForSeq2Seq

from bitlm.evaluate import generation, translation
from bitlm.evaluate.data import DataError, choose_split, load_split
from bitlm.evaluate.generation import Settings
from bitlm.evaluate.language import check_pads, check_reads
from bitlm.evaluate.load import load_model, load_tokenizer
from bitlm.source import resolve
from bitlm.train import fresh, rows, stages


def run(settings, say=None):
    """Run the recipe; returns what it writes to out/result.json."""
    top, _ = stages.check(settings)
    wanted = Settings(top.beams, top.length_penalty, top.min_length, top.max_length)
    (source, source_code), (target, target_code) = map(language, (top.source, top.target))
    train, valid = parallel(top)
    sources, targets = translation.examples(train, source, target)
    translation.examples(valid, source, target)  # an empty reference should not show too late
    tokenizer = tokenizer_of(top, sources + targets)
    prefix = prefix_of(top, tokenizer, source_code, target_code)

    def check(model):
        check_reads(model, top.length, "length")
        generation.room(model, tokenizer, wanted, top.length)
        check_pads(model, tokenizer)

    def measure(model, quick):
        found = translation.measure(
            model, tokenizer, valid[:quick and top.eval_limit or None], source, target, wanted,
            codes=(source_code, target_code), batch_size=top.eval_batch, max_input=top.length,
            resamples=0)
        return {name: score.value for name, score in found.scores.items()}

    return stages.run(settings, stages.Job(
        load=partial(load, top, tokenizer), tokenizer=tokenizer, measure=measure,
        rows=rows.pairs(tokenizer, sources, targets, top.length, top.target_length, prefix),
        collate=lambda model: DataCollatorForSeq2Seq(tokenizer, model=model),
        headline=translation.HEADLINE, check=check), say)


def language(text):
    """Return a language's column and the tokenizer's code of it: `en`, or `en:en_XX`."""
    name, _, code = text.partition(":")
    return name, code or name


def parallel(top):
    """Return the rows to train on, and those to measure on."""
    config, valid = top.config or None, top.valid or top.data
    if not top.valid and Path(top.data).is_file():
        raise DataError(f"{top.data} is one file: name another to measure on, valid=FILE")
    split = choose_split(valid, ("validation", "test"), config)
    return (list(load_split(top.data, "train", config, top.limit or None)),
            list(load_split(valid, split, config, top.eval_rows or None)))


def tokenizer_of(top, texts):
    """Return the tokenizer of the model, of a new one trained on the texts (or by an earlier run).
    """
    if top.model != "new" or top.teacher.model:
        return stages.tokenizer(top)
    earlier = Path(top.out) / "teacher" / "model"
    if earlier.is_dir():
        return load_tokenizer(earlier)
    return fresh.new_tokenizer(texts, top.new.vocabulary, max(top.length, top.target_length))


def prefix_of(top, tokenizer, source, target):
    """Return what the model wants before a text; a multilingual tokenizer is set to the pair."""
    if top.model == "new" and not top.teacher.model:
        return ""
    config = AutoConfig.from_pretrained(resolve(top.teacher.model or top.model))
    return translation.route(SimpleNamespace(config=config), tokenizer, source, target).prefix


def load(top, tokenizer, name):
    """Return a model, a new one of random weights for the name new."""
    if name != "new":
        return load_model(name, dtype="float32")[0]
    return fresh.new_bart(tokenizer, hidden=top.new.hidden, layers=top.new.layers,
                          heads=top.new.heads, seed=top.seed,
                          longest=max(top.length, top.target_length, top.max_length) + 2)


if __name__ == "__main__":
    from bitlm.cli.distill import script

    script(__file__)
