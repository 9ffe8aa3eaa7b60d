"""Train a decoder with binary or ternary weights, by its own text or by its dense self.

    bitlm distill causal_lm model=org/decoder data=text.jsonl out=OUT                    # PB-LLM
    bitlm distill causal_lm model=DIR data=text.txt scheme=w1.58a8 profile=small out=OUT

The dense model is the teacher as it is; with teacher.steps it is fine-tuned on the text first.
"""

from __future__ import annotations

from transformers import default_data_collator

from bitlm.calibration.text import TextError, check_ids, read_texts, token_windows
from bitlm.evaluate import language
from bitlm.evaluate.load import load_model
from bitlm.train import rows, stages


def run(settings, say=None):
    """Run the recipe; returns what it writes to out/result.json."""
    top, _ = stages.check(settings)
    if not top.data:
        raise TextError("say what to train on: data=FILE.txt, FILE.jsonl or a hub id")
    texts = read_texts(top.data, field=top.field)
    held = read_texts(top.valid, field=top.field) if top.valid else None
    tokenizer = stages.tokenizer(top)
    train, valid = windows(top, tokenizer, texts, held)

    def measure(model, quick):
        own = valid[:top.eval_limit or None] if quick else valid
        check_ids(own, language.vocabulary(model), tokenizer)
        return {"perplexity": language.perplexity(model, own).perplexity}

    return stages.run(settings, stages.Job(
        load=lambda name: load_model(name, dtype="float32")[0],  # small steps need it
        check=lambda model: language.check_reads(model, top.length, "length"),
        tokenizer=tokenizer, measure=measure, lower=True,
        rows=rows.Windows(train),
        collate=lambda model: default_data_collator, headline="perplexity"), say)


def windows(top, tokenizer, texts, held):
    """Return windows to train on and to measure on, the last twentieth where there is no other
    text."""
    found = token_windows(tokenizer, texts, top.length)
    if held is not None:
        valid = token_windows(tokenizer, held, top.length)
    else:
        if len(found) < 2:
            raise TextError(f"{top.data} has one window of {top.length} tokens: use a longer text, "
                            "a smaller length, or name another text to measure on, valid=FILE")
        cut = min(max(1, len(found) // 20), 500)
        found, valid = found[:-cut], found[-cut:]
    return found[:top.limit or None], valid[:top.windows or None]


if __name__ == "__main__":
    from bitlm.cli.distill import script

    script(__file__)
