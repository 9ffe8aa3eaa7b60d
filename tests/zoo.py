"""Tiny random models of many architectures, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from bitlm.hf import BitlmConfig, attach
from bitlm.modules import install, packed_weights
from bitlm.packing import pack_weight
from bitlm.plan import make_plan

VOCABULARY = 99


@dataclass(frozen=True)
class Animal:
    """One tiny architecture. make: config class name, model class name and the config's values."""

    config: str
    model: str
    values: dict[str, Any]
    kind: str = "decoder"  # decoder, encoder, seq2seq, speech, image, pair
    auto: str = "AutoModelForCausalLM"
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        return self.kind in ("decoder", "seq2seq", "speech")


SMALL = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
GROUPED = SMALL | dict(num_key_value_heads=2)
EXPERTS = GROUPED | dict(num_experts_per_tok=2)
SEQ2SEQ = dict(vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
               encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
               decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
               eos_token_id=2, decoder_start_token_id=1)
T5 = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
          decoder_start_token_id=0)


def _classifier(family: str, **values: Any) -> Animal:
    return Animal(f"{family}Config", f"{family}ForSequenceClassification",
                  SMALL | dict(num_labels=3) | values, "encoder",
                  "AutoModelForSequenceClassification")


ZOO: dict[str, Animal] = {
    "llama": Animal("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "llama_tied": Animal("LlamaConfig", "LlamaForCausalLM",
                         GROUPED | dict(tie_word_embeddings=True)),
    "gpt2": Animal("GPT2Config", "GPT2LMHeadModel",
                   dict(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                        bos_token_id=1, eos_token_id=2, pad_token_id=0)),
    "opt": Animal("OPTConfig", "OPTForCausalLM",
                  dict(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                       num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=16,
                       pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "gpt_neox": Animal("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL),
    "bloom": Animal("BloomConfig", "BloomForCausalLM",
                    dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4,
                         pad_token_id=0)),
    "falcon": Animal("FalconConfig", "FalconForCausalLM",
                     SMALL | dict(new_decoder_architecture=True, num_kv_heads=2)),
    "phi3": Animal("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "gemma3": Animal("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | dict(head_dim=8)),
    "qwen3": Animal("Qwen3Config", "Qwen3ForCausalLM", GROUPED | dict(head_dim=8)),
    "mamba": Animal("MambaConfig", "MambaForCausalLM",
                    dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4,
                         pad_token_id=0, eos_token_id=2)),
    "mamba2": Animal("Mamba2Config", "Mamba2ForCausalLM",
                     dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8,
                          num_heads=8, head_dim=8, n_groups=1, chunk_size=8, pad_token_id=0,
                          eos_token_id=2)),
    "mixtral": Animal("MixtralConfig", "MixtralForCausalLM", EXPERTS | dict(num_local_experts=4)),
    "qwen3_moe": Animal("Qwen3MoeConfig", "Qwen3MoeForCausalLM",
                        EXPERTS | dict(num_experts=4, moe_intermediate_size=24, head_dim=8)),
    "gpt_oss": Animal("GptOssConfig", "GptOssForCausalLM",
                      EXPERTS | dict(num_local_experts=4, head_dim=8)),
    "deepseek_v3": Animal("DeepseekV3Config", "DeepseekV3ForCausalLM", SMALL | dict(
        num_key_value_heads=4, num_experts_per_tok=2, n_routed_experts=4, n_group=2, topk_group=1,
        moe_intermediate_size=24, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)),
    "bert": _classifier("Bert"),
    "roberta": _classifier("Roberta"),
    "albert": _classifier("Albert", embedding_size=16),
    "distilbert": Animal("DistilBertConfig", "DistilBertForSequenceClassification",
                         dict(vocab_size=VOCABULARY, dim=32, hidden_dim=48, n_layers=2, n_heads=4,
                              max_position_embeddings=64, num_labels=3),
                         "encoder", "AutoModelForSequenceClassification"),
    "modernbert": _classifier("ModernBert", global_attn_every_n_layers=2, cls_token_id=1,
                              sep_token_id=2),
    "deberta_v2": _classifier("DebertaV2", relative_attention=True, position_buckets=8,
                              pos_att_type=["p2c", "c2p"]),
    "xlm": Animal("XLMConfig", "XLMForSequenceClassification",
                  dict(vocab_size=VOCABULARY, emb_dim=32, n_layers=3, n_heads=4, num_labels=3,
                       max_position_embeddings=64, pad_index=0),
                  "encoder", "AutoModelForSequenceClassification"),
    "t5_relu": Animal("T5Config", "T5ForConditionalGeneration", T5, "seq2seq",
                      "AutoModelForSeq2SeqLM"),
    "t5_gated": Animal("T5Config", "T5ForConditionalGeneration",
                       T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
                       "seq2seq", "AutoModelForSeq2SeqLM"),
    "bart": Animal("BartConfig", "BartForConditionalGeneration",
                   SEQ2SEQ | dict(forced_eos_token_id=2, scale_embedding=True), "seq2seq",
                   "AutoModelForSeq2SeqLM"),
    "pegasus": Animal("PegasusConfig", "PegasusForConditionalGeneration", SEQ2SEQ, "seq2seq",
                      "AutoModelForSeq2SeqLM"),
    "whisper": Animal("WhisperConfig", "WhisperForConditionalGeneration", SEQ2SEQ | dict(
        num_mel_bins=8, max_source_positions=16, max_target_positions=32,
        begin_suppress_tokens=None, suppress_tokens=None), "speech", "AutoModelForSpeechSeq2Seq"),
    "vit": Animal("ViTConfig", "ViTForImageClassification",
                  SMALL | dict(image_size=16, patch_size=8, num_labels=3), "image",
                  "AutoModelForImageClassification"),
    "clip": Animal("CLIPConfig", "CLIPModel", dict(
        text_config=SMALL, projection_dim=16,
        vision_config=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, image_size=16, patch_size=8)),
        "pair", "AutoModel"),
}
MOE = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def make(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a tiny random dense model; `changes` replace values of its config."""
    animal = ZOO[name]
    torch.manual_seed(seed)
    config = getattr(transformers, animal.config)(**animal.values | changes)
    model = getattr(transformers, animal.model)(config).eval()
    with torch.no_grad():
        # Fresh models have zero biases and ones in norms: let them matter.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif not torch.isfinite(parameter).all():
                parameter.normal_(std=0.1)
    return model


def inputs(name: str) -> dict[str, Tensor]:
    """Return inputs that the model of that name takes."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 7))
    pixels = torch.randn(2, 3, 16, 16)
    return {
        "decoder": lambda: {"input_ids": ids},
        "encoder": lambda: {"input_ids": ids},
        "seq2seq": lambda: {"input_ids": ids, "decoder_input_ids": ids[:, :5]},
        "speech": lambda: {"input_features": torch.randn(2, 8, 32),
                           "decoder_input_ids": ids[:, :5]},
        "image": lambda: {"pixel_values": pixels},
        "pair": lambda: {"input_ids": torch.cat([ids[:, :-1], torch.full((2, 1), 2)], 1),
                         "pixel_values": pixels},
    }[ZOO[name].kind]()


@torch.no_grad()
def output(model: PreTrainedModel, name: str) -> Tensor:
    """Return the logits of the model on `inputs`."""
    result = model(**inputs(name))
    return result.logits if "logits" in result else result.logits_per_image


def auto_class(name: str) -> Callable:
    """Return the Auto class that opens a checkpoint of that name."""
    return getattr(transformers, ZOO[name].auto)


def pack(model: PreTrainedModel, config: BitlmConfig | None = None) -> PreTrainedModel:
    """Pack a dense model in memory, as `bitlm.pack` does, and return it."""
    config = config or BitlmConfig("binary")
    for entry in make_plan(model, config.request).entries:
        path, _, leaf = entry.name.rpartition(".")
        owner = model.get_submodule(path)
        dense = getattr(owner, leaf).detach()
        install(model, entry.name, pack_weight(entry, dense).weight)
    attach(model, config)
    return model


def same_tensors(one: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    """Return the names of tensors in which two models differ, in content, dtype or presence."""
    first, second = one.state_dict(), other.state_dict()
    return sorted(set(first) ^ set(second)) + [
        name for name in first if name in second
        and (first[name].dtype != second[name].dtype or not torch.equal(first[name], second[name]))]


@cache
def _packed(name: str, scheme: str) -> PreTrainedModel:
    return pack(make(name), BitlmConfig(scheme))


def packed(name: str, scheme: str = "binary") -> PreTrainedModel:
    """Return a packed tiny model that is shared between tests: do not change it."""
    return _packed(name, scheme)


def count(model: PreTrainedModel) -> int:
    """Return how many packed weights a model has."""
    return len(packed_weights(model))
