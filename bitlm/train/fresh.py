"""Models from nothing: a tokenizer trained on texts, and a small BART of random weights.

For trying an encoder-decoder where no pretrained one can be had.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def new_tokenizer(texts: Iterable[str], vocabulary: int, longest: int) -> Any:
    """Return a byte-level BPE tokenizer of BART's kind, trained on texts.

    vocabulary: tokens, SPECIAL and the 256 bytes among them. longest: tokens of an input.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    numbers = {token: made.token_to_id(token) for token in SPECIAL}
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>",
        special_tokens=[(token, numbers[token]) for token in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=longest, bos_token="<s>", pad_token="<pad>",
        eos_token="</s>", unk_token="<unk>", mask_token="<mask>", cls_token="<s>",
        sep_token="</s>")


def new_bart(tokenizer: Any, *, hidden: int, layers: int, heads: int, longest: int,
             dropout: float = 0.1, seed: int = 0) -> Any:
    """Return a BART for generation with random weights: `layers` in encoder and decoder each.

    longest: positions. The feed-forward width is 4 times `hidden`.
    """
    from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig

    torch.manual_seed(seed)
    start, pad, end = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[:3])
    ends = {"bos_token_id": start, "pad_token_id": pad, "eos_token_id": end,
            "decoder_start_token_id": end}
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=len(tokenizer), d_model=hidden, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * hidden,
        decoder_ffn_dim=4 * hidden, max_position_embeddings=longest, dropout=dropout,
        forced_eos_token_id=end, **ends))
    model.generation_config = GenerationConfig(forced_eos_token_id=end, **ends)
    return model
