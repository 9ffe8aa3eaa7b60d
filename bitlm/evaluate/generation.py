"""Text generated for many inputs, by encoder-decoders and decoders alike, with its speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.text import check_ids
from ..source import quiet
from .batches import by_length, evaluating, reads
from .language import EvaluationError, Progress, check_pads, context_length, vocabulary
from .peak import peak_bytes

BATCH = 8
INPUT = 1024  # tokens, where a model would read more


@dataclass(frozen=True)
class Settings:
    """How text is generated: greedily with one beam, else by beam search; never sampled.

    min_length, max_length: tokens, counted as transformers does in an encoder-decoder, whose start
    token counts; a decoder writes as many new ones. What is not named here (repeated n-grams,
    forced tokens, early stopping) is as the checkpoint's own generation config says.
    """

    beams: int = 4
    length_penalty: float = 1.0
    min_length: int = 0
    max_length: int = 128

    def __post_init__(self) -> None:
        for name, least in (("beams", 1), ("max_length", 2), ("min_length", 0)):
            if getattr(self, name) < least:
                raise EvaluationError(f"{name} is {getattr(self, name)}: use {least} or more")
        if self.min_length > self.max_length:
            raise EvaluationError(f"min_length is {self.min_length}, max_length {self.max_length}: "
                                  "the smallest length cannot be the larger one")


@dataclass(frozen=True)
class Generated:
    """Texts in the order of their inputs.

    lengths: new tokens of each, the end token counted. seconds: spent in `generate`. peak_bytes:
    peak.peak_bytes at the end.
    """

    texts: list[str]
    lengths: list[int]
    seconds: float
    peak_bytes: int | None

    def facts(self) -> dict[str, Any]:
        """Return speed, memory and mean length as JSON types."""
        tokens = sum(self.lengths)
        return {"mean_length": tokens / len(self.lengths), "seconds": self.seconds,
                "tokens_per_second": tokens / self.seconds if self.seconds else 0.0,
                "peak_bytes": self.peak_bytes}


def generate_texts(model: nn.Module, tokenizer: Any, texts: Sequence[str],
                   settings: Settings | None = None, *, prefix: str = "", suffix: str = "",
                   batch_size: int = BATCH, max_input: int = INPUT,
                   options: Mapping[str, Any] | None = None, progress: Progress | None = None
                   ) -> Generated:
    """Return what a model writes for each text, in the order of the texts.

    prefix, suffix: around each text; only the text is cut where an input has more than max_input
    tokens or more than the model reads. Batches are of similar length. options: more arguments of
    `generate`. `progress` gets (texts done, texts). Raises EvaluationError for a model that does
    not generate, and for lengths that it has no room for, TextError for a tokenizer with more
    tokens than the model has.
    """
    settings = settings or Settings()
    ids = encode(tokenizer, texts, room(model, tokenizer, settings, max_input), prefix, suffix)
    check_pads(model, tokenizer)
    check_ids(torch.tensor([max(each) for each in ids]), vocabulary(model), tokenizer)
    decoder = not model.config.is_encoder_decoder
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id)
                if token is not None), 0)
    start = 0 if decoder else 1
    arguments = {"num_beams": settings.beams, "do_sample": False, "pad_token_id": pad,
                 "max_new_tokens": settings.max_length - start,
                 "min_new_tokens": max(0, settings.min_length - start), **(options or {})}
    if settings.beams > 1:
        arguments["length_penalty"] = settings.length_penalty
    written = [""] * len(ids)
    lengths = [0] * len(ids)
    seconds, done = 0.0, 0
    with evaluating(model), quiet():
        for batch in by_length([len(each) for each in ids], batch_size):
            inputs, mask = _padded([ids[i] for i in batch], pad, left=decoder)
            begin = time.perf_counter()
            outputs = model.generate(input_ids=inputs.to(model.device),
                                     attention_mask=mask.to(model.device), **arguments).cpu()
            seconds += time.perf_counter() - begin
            new = outputs[:, inputs.shape[1] if decoder else 1:]
            for i, tokens in zip(batch, new.tolist()):
                lengths[i] = _length(tokens, _ends(model), pad)
                written[i] = tokenizer.decode(tokens[:lengths[i]], skip_special_tokens=True).strip()
            done += len(batch)
            if progress:
                progress(done, len(ids))
    return Generated(written, lengths, seconds, peak_bytes(model.device))


def encode(tokenizer: Any, texts: Sequence[str], limit: int, prefix: str = "", suffix: str = ""
           ) -> list[list[int]]:
    """Return the token ids of prefix + text + suffix, the text cut so that `limit` tokens do.

    Raises EvaluationError for an input of no tokens, and where prefix and suffix leave no room.
    """
    tail = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    around = len(tokenizer(prefix)["input_ids"]) + len(tail)
    if around >= limit:
        raise EvaluationError(f"there is room for {limit} tokens of input, and what stands around "
                              f"each text has {around}: use a smaller largest length of the output")
    ids = tokenizer([prefix + text for text in texts], truncation=True,
                    max_length=limit - len(tail))["input_ids"]
    for number, each in enumerate(ids, 1):
        if not each and not tail:
            raise EvaluationError(f"text {number} has no tokens: there is nothing to go on from")
    return [[*each, *tail] for each in ids]


def room(model: nn.Module, tokenizer: Any, settings: Settings, max_input: int = INPUT) -> int:
    """Return how many tokens of input there is room for; EvaluationError where there is none."""
    if not model.can_generate():
        raise EvaluationError(f"{type(model).__name__} does not generate text")
    longest = context_length(model)
    limit = reads(model, tokenizer, max_input)
    if not model.config.is_encoder_decoder and longest is not None:
        limit = min(limit, longest - settings.max_length)
    if limit < 1 or (longest is not None and settings.max_length > longest):
        raise EvaluationError(f"{settings.max_length} tokens of output leave no room: the model "
                              f"reads and writes at most {longest}; use a smaller largest length")
    return limit


def _padded(ids: list[list[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, int64 [B, T]; a decoder goes on at the right, so pads left."""
    width = max(map(len, ids))
    rows = [([pad] * (width - len(each)), [0] * (width - len(each)), each, [1] * len(each))
            for each in ids]
    inputs = [space + each if left else each + space for space, _, each, _ in rows]
    mask = [off + on if left else on + off for _, off, _, on in rows]
    return torch.tensor(inputs), torch.tensor(mask)


def _ends(model: nn.Module) -> set[int]:
    """Return the tokens that end a text."""
    end = model.generation_config.eos_token_id
    return set(end if isinstance(end, list) else [] if end is None else [end])


def _length(tokens: list[int], ends: set[int], pad: int) -> int:
    """Return how many tokens were written, the end token counted and padding not."""
    for place, token in enumerate(tokens):
        if token in ends:
            return place + 1
    while tokens and tokens[-1] == pad:
        tokens = tokens[:-1]
    return len(tokens)
