"""Tiny random encoder-decoders with the byte-level tokenizer, in memory and in folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.tiny import VOCABULARY, make_tokenizer


def bart(seed: int = 0, **changes) -> PreTrainedModel:
    """Return a random BART (1 layer each, width 32, 128 positions) whose output varies."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1,
                 encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                 decoder_ffn_dim=48, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
                 eos_token_id=2, decoder_start_token_id=1, init_std=0.6)
    return BartForConditionalGeneration(BartConfig(**(sizes | changes))).eval()


def t5(seed: int = 0) -> PreTrainedModel:
    """Return a random T5 (1 layer each, width 32)."""
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)).eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model with the byte-level tokenizer."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
