"""Embeddings that cannot get more rows or fewer: their model says so."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from ..modules import PackedEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_resizing(model: PreTrainedModel, kind: type[nn.Embedding] = PackedEmbedding) -> None:
    """Let `resize_token_embeddings` say that embeddings of a kind cannot be resized."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return
    if isinstance(embeddings, kind):
        model.resize_token_embeddings = partial(_resize, embeddings)


def _resize(embeddings: nn.Embedding, new_num_tokens: int | None = None,
            pad_to_multiple_of: int | None = None, mean_resizing: bool = True) -> nn.Embedding:
    rows = embeddings.num_embeddings
    if new_num_tokens in (None, rows) and rows % (pad_to_multiple_of or 1) == 0:
        return embeddings
    raise ValueError(f"the {rows} token embeddings of this model are quantized and cannot be "
                     "resized: resize those of the dense model first, or leave embeddings dense")

