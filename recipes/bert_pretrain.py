"""Pre-train a binary BERT: masked language modelling with hidden states from its dense self.

    bitlm distill bert_pretrain model=bert-base-uncased data=text.jsonl out=OUT          # BiPFT
    bitlm distill bert_pretrain model=DIR data=text.txt teacher.epochs=1 profile=small out=OUT

OUT/packed is a masked language model. OUT/w1a1-estimators/model, which is still in training, is
what a task is fine-tuned from, and then packed; BiPFT (arXiv 2312.08937) has no teacher for that:

    bitlm distill glue task=sst2 model=OUT/w1a1-estimators/model scheme= out=OUT2
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM, default_data_collator

from bitlm.calibration.text import TextError, check_ids, read_texts, token_windows
from bitlm.evaluate.batches import evaluating
from bitlm.evaluate.language import check_reads, vocabulary
from bitlm.evaluate.load import load_model
from bitlm.source import quiet, resolve
from bitlm.train import rows, stages


def run(settings, say=None):
    """Run the recipe; returns what it writes to out/result.json."""
    top, _ = stages.check(settings)
    if not top.data:
        raise TextError("say what to train on: data=FILE.txt, FILE.jsonl or a hub id")
    texts = read_texts(top.data, field=top.field)
    held = read_texts(top.valid, field=top.field) if top.valid else None
    tokenizer = stages.tokenizer(top)
    if tokenizer.mask_token_id is None:
        raise TextError("the tokenizer has no mask token: take an encoder's, as BERT's")
    noise = partial(rows.mask_tokens, mask=tokenizer.mask_token_id, vocabulary=len(tokenizer),
                    special=tokenizer.all_special_ids, share=top.share)
    train, valid = blocks(top, tokenizer, texts, held)
    return stages.run(settings, stages.Job(
        load=partial(load, top), tokenizer=tokenizer, headline="perplexity", lower=True,
        rows=rows.Noised(train, noise, top.seed),
        collate=lambda model: default_data_collator,
        check=partial(check, top, tokenizer),
        measure=partial(measure, top, rows.Noised(valid, noise, top.seed))), say)


def blocks(top, tokenizer, texts, held):
    """Return blocks to train on and to measure on, the last twentieth where there is no other
    text."""
    found = token_windows(tokenizer, texts, top.length)
    if held is not None:
        valid = token_windows(tokenizer, held, top.length)
    elif len(found) < 2:
        raise TextError(f"{top.data} has one block of {top.length} tokens: use a longer text, a "
                        "smaller length, or name another text to measure on, valid=FILE")
    else:
        cut = max(1, len(found) // 20)
        found, valid = found[:-cut], found[-cut:]
    return found[:top.limit or None], valid[:top.blocks or None]


def check(top, tokenizer, model):
    """Raise for a model that reads less than a block, or has not all tokens."""
    check_reads(model, top.length, "length")
    # Masking draws from all of them.
    check_ids(torch.tensor([len(tokenizer) - 1]), vocabulary(model), tokenizer)


def load(top, name):
    """Return a masked language model; the head of one that shall be the teacher may be new."""
    if name != top.model or not (top.teacher.epochs or top.teacher.steps):
        return load_model(name, dtype="float32")[0]
    with quiet():
        return AutoModelForMaskedLM.from_pretrained(resolve(name), dtype=torch.float32)


def measure(top, valid, model, quick):
    """Return perplexity and accuracy on masked tokens, always the same ones."""
    number = min(len(valid), top.eval_limit) if quick and top.eval_limit else len(valid)
    loss = hits = count = 0
    with evaluating(model):
        for start in range(0, number, top.eval_batch):
            batch = default_data_collator([valid[row] for row in
                                           range(start, min(start + top.eval_batch, number))])
            labels = batch.pop("labels").to(model.device)
            chosen = labels != -100
            logits = model(**{name: ids.to(model.device) for name, ids in batch.items()}
                           ).logits[chosen].float()
            loss += float(cross_entropy(logits, labels[chosen], reduction="sum"))
            hits += int((logits.argmax(-1) == labels[chosen]).sum())
            count += len(logits)
    return {"perplexity": math.exp(min(loss / count, 700)), "accuracy": hits / count}


if __name__ == "__main__":
    from bitlm.cli.distill import script

    script(__file__)
