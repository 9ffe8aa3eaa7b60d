"""Batches of inputs of similar length, a model in eval mode, how much it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .language import context_length


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield the numbers of all inputs in batches of similar length, the longest first.

    The first batch then shows whether memory is enough.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch_size):
        yield order[start:start + batch_size]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode and without gradients, and give it its mode back."""
    training = model.training
    try:
        model.eval()
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def reads(model: nn.Module, tokenizer: Any, most: int) -> int:
    """Return how many tokens of input a model gets: what it and its tokenizer allow, up to `most`.
    """
    return min(most, context_length(model) or most, tokenizer.model_max_length)
