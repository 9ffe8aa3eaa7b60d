"""Distil a binary or ternary classifier on a GLUE task from a fine-tuned teacher.

    bitlm distill glue task=sst2 data=DIR model=org/encoder scheme=w1a8 profile=small out=OUT
    python recipes/glue.py task=cola scheme=w1a8,w1a1+estimators teacher.model=DIR out=OUT
    torchrun --nproc-per-node 2 recipes/glue.py task=mnli out=OUT

The teacher is fine-tuned first, unless teacher.model names one. Several schemes are a chain: each
student teaches the next one and gives it its weights, as in BiT (arXiv 2205.13016).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
)

from bitlm.evaluate import glue, language, tasks
from bitlm.evaluate.data import DataError, load_split
from bitlm.evaluate.load import load_model
from bitlm.source import quiet, resolve
from bitlm.train import stages
from bitlm.train.recipe import RecipeError
from bitlm.train.terms import LossError

OF_CLASSES = {"kl", "soft_cross_entropy", "plackett_luce"}


def run(settings, say=None):
    """Run the recipe; returns what it writes to out/result.json."""
    top, names = stages.check(settings)
    if top.task not in glue.TASKS:
        raise RecipeError(f"unknown task {top.task!r}: use one of {', '.join(glue.TASKS)}")
    if Path(top.data).is_file():
        raise DataError(f"{top.data} is one file: name its folder, with train and dev files")
    check_losses(settings, names)
    own = top.teacher
    if not (own.model or own.epochs or own.steps) and top.model and not has_head(top.model):
        raise RecipeError(f"{top.model} has no head for {top.task}, and teacher.epochs=0 trains "
                          "none: name a fine-tuned teacher, teacher.model=DIR, or let it train")
    work, short = evaluations(top)
    rows = load_split(folder(top), "train", top.task, top.limit or None)
    inputs, labels = glue.examples(top.task, rows)
    tokenizer = stages.tokenizer(top)

    def measure(model, quick):
        found = (short if quick else work).measure(model, tokenizer, None)[0]
        return {name: score.value for name, score in found.scores.items()}

    metrics = glue.TASKS[top.task].metrics
    return stages.run(settings, stages.Job(
        load=partial(load, top), tokenizer=tokenizer, measure=measure,
        rows=encode(tokenizer, inputs, labels, top),
        collate=lambda model: DataCollatorWithPadding(tokenizer),
        check=partial(check, top, tokenizer),
        headline="mean" if len(metrics) > 1 or " + " in work.split else metrics[0]), say)


def evaluations(top):
    """Return the task on its validation split, and on the rows that are measured in training."""
    options = {"batch_size": top.eval_batch, "max_input": top.length, "resamples": 0}
    return [tasks.prepare(tasks.find(f"glue/{top.task}"), top.data, tasks.Options(
        limit=limit or None, **options))[0] for limit in (0, top.eval_limit)]


def check_losses(settings, names):
    """Raise LossError for losses of classes in a task that predicts a number."""
    for own in (settings.at(scheme=name) for name in names):
        wrong = OF_CLASSES & {each[0] for each in own.losses}
        if glue.TASKS[own.task].outputs == 1 and wrong:
            raise LossError(f"{own.task} predicts a number, which has no classes: use logits_mse "
                            f"in place of {', '.join(sorted(wrong))}")


def folder(top):
    """Return where the task's training data is: a folder of it in `data`, else `data` itself."""
    found = glue.find(top.data) if Path(top.data).is_dir() else {}
    return found.get(top.task, top.data)


def check(top, tokenizer, model):
    """Raise for a model that reads less than a row, or that the tokenizer is not for."""
    language.check_reads(model, top.length, "length")
    language.check_pads(model, tokenizer)


def has_head(name):
    """Tell whether a model is a sequence classifier, with a head that was trained."""
    named = AutoConfig.from_pretrained(resolve(name)).architectures or ()
    return any(each.endswith("ForSequenceClassification") for each in named)


def load(top, name):
    """Return a classifier: with a new head for the task where it shall be the teacher, or is a
    student that has none."""
    new = name == top.student and not has_head(name)
    if not new and (top.teacher.model or name != top.model):
        model = load_model(name, dtype="float32")[0]
        glue.check_model(model, top.task)
        return model
    task = glue.TASKS[top.task]
    names = dict(enumerate(task.labels or ("score",)))
    if top.teacher.model:  # a student has its order
        theirs = AutoConfig.from_pretrained(resolve(top.teacher.model)).id2label
        names = theirs if len(theirs) == task.outputs else names
    with quiet():
        return AutoModelForSequenceClassification.from_pretrained(
            resolve(name), dtype=torch.float32, num_labels=task.outputs, id2label=names,
            label2id={label: number for number, label in names.items()})


def encode(tokenizer, inputs, labels, top):
    """Return rows of tokens with their labels in the order of the model's outputs."""
    if top.teacher.model and glue.TASKS[top.task].labels:
        config = AutoConfig.from_pretrained(resolve(top.teacher.model))
        order = glue.label_order(SimpleNamespace(config=config), top.task)
        labels = [order[label] for label in labels]
    encoded = tokenizer(*map(list, zip(*inputs)), truncation=True, max_length=top.length)
    return [{"labels": label, **{name: values[row] for name, values in encoded.items()}}
            for row, label in enumerate(labels)]


if __name__ == "__main__":
    from bitlm.cli.distill import script

    script(__file__)
