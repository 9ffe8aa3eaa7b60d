"""bitlm inside transformers: `from_pretrained`, `save_pretrained` and everything built on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.quantizers import auto
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from .config import BitlmConfig
from .experts import register_experts
from .quantizer import BitlmQuantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def register() -> None:
    """Register bitlm with transformers; done already, it does nothing."""
    if "bitlm" not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config("bitlm")(BitlmConfig)
    if "bitlm" not in AUTO_QUANTIZER_MAPPING:
        register_quantizer("bitlm")(BitlmQuantizer)
    # The configurations of which `from_pretrained(quantization_config=...)` takes something for a
    # checkpoint that has its own: a constant, which transformers gives no function to add to.
    known = getattr(auto, "LOADING_ATTRIBUTES_CONFIG_TYPES", ())
    if BitlmConfig not in known:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*known, BitlmConfig)
    register_experts()


def attach(model: PreTrainedModel, config: BitlmConfig) -> None:
    """Make a model whose weights were packed in memory one that can be saved and generate.

    The model then is as if `from_pretrained` had returned it. `config` must be the one that its
    weights were packed by: it is what the checkpoint will say of itself.
    """
    BitlmQuantizer(config, pre_quantized=True).attach(model)


register()

__all__ = ["BitlmConfig", "BitlmQuantizer", "attach", "register"]
