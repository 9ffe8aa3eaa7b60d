"""Distil a binary or ternary summarizer, or denoiser, from a fine-tuned BART or T5.

    bitlm distill summarization task=xsum model=facebook/bart-base scheme=w1a1 out=OUT
    bitlm distill summarization data=pairs.jsonl scheme=w1a8,w1a1 profile=small out=OUT
    bitlm distill summarization task=denoise data=stories.jsonl model=new profile=small out=OUT

`denoise` is BART's own task (arXiv 1910.13461): a text whose spans were masked is to be restored.
With model=new it needs nothing but a text: the teacher is trained from random weights first.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from transformers import AutoConfig, DataCollatorForSeq2Seq

from bitlm.calibration.text import read_texts
from bitlm.evaluate import generation, language, summarization
from bitlm.evaluate.data import DataError, choose_split, load_split
from bitlm.evaluate.generation import Settings
from bitlm.evaluate.load import load_model, load_tokenizer
from bitlm.source import resolve
from bitlm.train import fresh, rows, stages
from bitlm.train.recipe import RecipeError

TASKS = ("summarization", "xsum", "cnn_dailymail", "denoise")
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"'A-Z])")


def run(settings, say=None):
    """Run the recipe; returns what it writes to out/result.json."""
    top, _ = stages.check(settings)
    if top.task not in TASKS:
        raise RecipeError(f"unknown task {top.task!r}: use one of {', '.join(TASKS)}")
    wanted = Settings(top.beams, top.length_penalty, top.min_length, top.max_length)
    if not top.data:
        raise DataError("say what to train on: data=FILE, a folder or a hub id")
    denoises = top.task == "denoise"
    train, valid = texts(top) if denoises else summaries(top)
    tokenizer = tokenizer_of(top, train)
    prefix = "" if denoises else prefix_of(top)
    if denoises:
        noise = partial(noised, tokenizer, top)
        data = rows.Noised([row["summary"] for row in train], noise, top.seed)
        valid = [row | {"document": tokenizer.decode(noise(row["summary"], rows.generator(
            top.seed, number))["input_ids"][1:-1])} for number, row in enumerate(valid)]
    else:
        documents, references = summarization.examples(train)
        data = rows.pairs(tokenizer, documents, [each[0] for each in references], top.length,
                          top.summary_length, prefix)
        summarization.examples(valid)  # an empty reference should not show after the training

    def check(model):
        language.check_reads(model, top.length, "length")
        generation.room(model, tokenizer, wanted, top.length)
        language.check_pads(model, tokenizer)

    def measure(model, quick):
        found = summarization.measure(
            model, tokenizer, valid[:quick and top.eval_limit or top.eval_rows or None], wanted,
            prefix=prefix, lead_sentences=top.lead, batch_size=top.eval_batch,
            max_input=top.length, resamples=0)
        return {name: score.value for name, score in found.scores.items()}

    return stages.run(settings, stages.Job(
        load=partial(load, top, tokenizer), tokenizer=tokenizer, rows=data, measure=measure,
        collate=lambda model: DataCollatorForSeq2Seq(tokenizer, model=model),
        headline=summarization.HEADLINE, valid=valid if denoises else (), check=check), say)


def summaries(top):
    """Return the rows to train on, and those to measure on."""
    config = top.config or None
    valid = top.valid or top.data
    split = choose_split(valid, ("validation", "test"), config)
    if not top.valid and Path(top.data).is_file():
        raise DataError(f"{top.data} is one file: name another to measure on, valid=FILE")
    return (list(load_split(top.data, "train", config, top.limit or None)),
            list(load_split(valid, split, config, top.eval_rows or None)))


def texts(top):
    """Return passages of `sentences` sentences, and those to measure on: the last ones if there is
    no other file of them."""
    def passages(source):
        for text in read_texts(source):
            parts = SENTENCE.split(" ".join(text.split()))
            for start in range(0, len(parts), top.sentences):
                yield {"summary": " ".join(parts[start:start + top.sentences])}

    train = list(passages(top.data))
    if top.valid:
        return train[:top.limit or None], list(passages(top.valid))
    held = min(max(1, len(train) // 20), 500)
    return train[:-held][:top.limit or None], train[-held:]


def noised(tokenizer, top, text, random):
    """Return a passage as a row of the denoising task."""
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"]
             for part in SENTENCE.split(text)]
    ids = rows.permute(parts, random) if top.permute else \
        tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = rows.infill(ids[:top.length - 2], random, mask=tokenizer.mask_token_id)
    shown = [tokenizer.bos_token_id, *shown[:top.length - 2], tokenizer.eos_token_id]
    labels = tokenizer(text, truncation=True, max_length=top.summary_length)["input_ids"]
    return {"input_ids": shown, "attention_mask": [1] * len(shown), "labels": labels}


def tokenizer_of(top, train):
    """Return the tokenizer of the model, of a new one trained on the texts (or by an earlier run).
    """
    if top.model != "new" or top.teacher.model:
        return stages.tokenizer(top)
    earlier = Path(top.out) / "teacher" / "model"
    if earlier.is_dir():
        return load_tokenizer(earlier)
    found = (text for row in train for text in row.values() if isinstance(text, str))
    return fresh.new_tokenizer(found, top.new.vocabulary, top.length)


def prefix_of(top):
    """Return what the model wants before a document."""
    if top.model == "new" and not top.teacher.model:
        return ""
    config = AutoConfig.from_pretrained(resolve(top.teacher.model or top.model))
    return summarization.prefix_of(SimpleNamespace(config=config))


def load(top, tokenizer, name):
    """Return a model, a new one of random weights for the name new."""
    if name != "new":
        return load_model(name, dtype="float32")[0]
    return fresh.new_bart(tokenizer, hidden=top.new.hidden, layers=top.new.layers,
                          heads=top.new.heads, seed=top.seed,
                          longest=max(top.length, top.summary_length, top.max_length) + 2)


if __name__ == "__main__":
    from bitlm.cli.distill import script

    script(__file__)
