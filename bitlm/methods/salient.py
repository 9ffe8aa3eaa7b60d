"""Partial binarization (PB-LLM, arXiv 2310.00034): a salient fraction at 8 bits, the rest binary.

`salience.py` chooses the salient entries and rounds them; this file fits the binary rest:

    masked   a = mean over binarized entries of |W - mean|          the paper's form (center none)
    diluted  mean and a divide by the group width, salient entries as zeros that count: the
             released code, mu = sum W / g, a = sum |Z - mu| / g with Z = W or 0
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import Scheme
from . import binary
from .registry import Fit, register


def check(scheme: Scheme) -> str | None:
    if scheme.salient == 0:
        return "method salient keeps a fraction of the weights at 8 bits: set salient above 0"
    if scheme.center not in ("none", "shift"):
        return f"method salient has center none or shift, not {scheme.center}"
    if scheme.salient_statistics == "diluted" and (scheme.refit or scheme.planes > 1):
        return "salient_statistics diluted is one plane's closed form: use refit 0 and 1 plane"
    return None


@register("salient", codes="binary", check=check)
def fit(weights: Tensor, mask: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Fit:
    """Fit binary planes to the entries of rows of weights that are not salient."""
    if mask is not None and scheme.salient_statistics == "diluted":
        weights, mask = weights * mask, None
    return binary.fit(weights, mask, scheme, dtype)
