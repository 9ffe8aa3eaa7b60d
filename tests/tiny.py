"""Tiny random models with a byte-level tokenizer, written to a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<pad>", "<s>", "</s>")
VOCABULARY = 256 + len(SPECIAL)
TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 40


def make_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte, 3 special ones first, and optionally a bos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>", model_max_length=128)


def make_llama(folder: Path, seed: int = 0, **changes) -> Path:
    """Write a random Llama (2 layers, hidden 64, MLP 96, context 128) with its tokenizer."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                 pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.1)
    LlamaForCausalLM(LlamaConfig(**(sizes | changes))).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Path(folder)


def make_bert(folder: Path, labels: int = 0, seed: int = 0, **changes) -> Path:
    """Write a random BERT (2 layers, hidden 64) with its tokenizer; a classifier with `labels`."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                 num_attention_heads=4, max_position_embeddings=128, pad_token_id=0)
    config = BertConfig(**(sizes | changes))
    if labels:
        config.num_labels = labels
    cls = BertForSequenceClassification if labels else BertModel
    cls(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Path(folder)
