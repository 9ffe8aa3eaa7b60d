"""Where the published recipes round activations, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .scheme import Attention, Quantizer, SchemeError

# Weights of the second linear layer of a feed-forward block, behind the activation function: BERT,
# RoBERTa, older ViT; DistilBERT; BART, mBART, OPT, Whisper, ViT, CLIP; T5; GPT-2; GPT-NeoX; ALBERT.
SECOND = (r"(?:(?<!attention\.)\boutput\.dense|\blin2|\bfc2|\bDenseReluDense\.wo|\bmlp\.c_proj"
          r"|\bdense_4h_to_h|\bffn_output)\.weight$")
# Where a gate multiplies behind the activation function (Llama, T5 v1.1), what enters the second
# layer has both signs, and is like any other input.
GATES = r"\b(?:gate_proj|gate_up_proj|wi_0|wi_1)\.weight$"


@dataclass(frozen=True)
class Placement:
    """The quantizers of a recipe.

    inputs: of all linear layers. second: of the second linear layer of feed-forward blocks without
    a gate; None: as all. attention: of all attention modules.
    """

    inputs: Quantizer
    second: Quantizer | None
    attention: Attention

    def overrides(self, weights: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return what `second` overrides in a model with these weights (see plan.Request)."""
        weights = list(weights)
        gated = any(re.search(GATES, name) for name in weights)
        if self.second is None or gated or not any(re.search(SECOND, name) for name in weights):
            return {}
        return {SECOND: {"input": self.second.to_dict()}}


def _attention(operands: Quantizer, probabilities: Quantizer, **fields: Any) -> Attention:
    return Attention(operands, operands, operands, probabilities, **fields)


_SIGNED8 = Quantizer("dynamic", 8)
_UNSIGNED8 = Quantizer("dynamic", 8, signed=False)


def _tbt(bits: int) -> Placement:
    signed = Quantizer(bits=bits)
    # GELU goes below 0, probabilities do not.
    return Placement(signed, Quantizer(bits=bits, signed=False, minimum=bits == 2),
                     _attention(signed, Quantizer(bits=bits, signed=False), scale_query=True))


def _bit(bits: int) -> Placement:
    moved = Quantizer(bits=bits, ranges="bit", move=True)
    second = Quantizer(bits=bits, signed=False, ranges="bit", move=True, minimum=bits == 2)
    return Placement(moved, second, _attention(
        moved, Quantizer(bits=bits, signed=False, ranges="bit")))


def _bipft(bits: int) -> Placement:
    return Placement(Quantizer(bits=bits, ranges="bit", move=True), None, _attention(
        Quantizer(bits=bits, ranges="bit"), Quantizer(bits=bits, signed=False, ranges="bit"),
        estimators=1))


def _bivit() -> Placement:
    signed = Quantizer(bits=1)
    # The paper trains from random weights and leaves out what a 1 is worth: a dense checkpoint
    # needs it.
    kept = Quantizer("threshold", bits=1, rescale="mean")
    return Placement(signed, Quantizer(bits=1, signed=False), _attention(signed, kept))


def _minmax(bits: int) -> Placement:
    rounded = Quantizer("dynamic", bits, signed=False)
    return Placement(rounded, None, _attention(rounded, rounded))


# By recipe and bits of the activations. At 8 bits all inputs are symmetric, for the kernels' sake.
PLACEMENTS: dict[str, dict[int, Placement]] = {
    # BART-like models (arXiv 2306.01841).
    "tbt": {1: _tbt(1), 2: _tbt(2), 8: Placement(
        _SIGNED8, None, _attention(_SIGNED8, _UNSIGNED8, scale_query=True))},
    # BERT-like models with ReLU (arXiv 2205.13016).
    "bit": {1: _bit(1), 2: _bit(2), 8: Placement(
        _SIGNED8, None, _attention(_SIGNED8, _UNSIGNED8))},
    # BERT-like models with GELU (arXiv 2312.08937).
    "bipft": {1: _bipft(1), 2: _bipft(2), 8: Placement(
        _SIGNED8, None, _attention(_SIGNED8, _UNSIGNED8, estimators=1))},
    # Vision transformers (arXiv 2211.07091): probabilities by a threshold of their row.
    "bivit": {1: _bivit(), 8: Placement(_SIGNED8, None, _attention(_SIGNED8, _UNSIGNED8))},
    # What learned steps are compared with: equal ones between the smallest and the largest value.
    "minmax": {1: _minmax(1), 2: _minmax(2), 8: Placement(
        _SIGNED8, None, _attention(_SIGNED8, _UNSIGNED8))},
}


def placement(name: str, bits: int) -> Placement:
    """Return a recipe's quantizers at 1, 2 or 8 bits.

    Raises SchemeError for an unknown name or another number of bits.
    """
    if name not in PLACEMENTS:
        raise SchemeError(f"unknown placement {name!r}: use one of {', '.join(PLACEMENTS)}")
    if bits not in PLACEMENTS[name]:
        raise SchemeError(f"activations at {bits!r} bits: use "
                          f"{', '.join(map(str, PLACEMENTS[name]))}")
    return PLACEMENTS[name][bits]
