"""Binary planes: W ~ sum_p a_p sign(rest_p) [+ shift].

One plane, per tensor, row or group:

    none       a = mean|W|,       codes sign(W)         XNOR-Net scale; TBT's code, arXiv 2306.01841
    threshold  a = mean|W|,       codes sign(W - mean)  BWN; BiPFT, arXiv 2312.08937
    drop       a = mean|W - mean|, codes sign(W - mean), the mean is lost     TBT's paper
    shift      the same, the mean is stored                  BiLLM's atom, arXiv 2402.04291

More planes repeat this on the residual, `refit` replaces the means by least squares. sign(0) = +1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import Scheme
from .levels import BINARY, fit_planes, mean
from .registry import Fit, no_salient, register


def rule(rest: Tensor, mask: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    cut = mean(rest, mask) if scheme.center == "threshold" else None
    return mean(rest.abs(), mask), cut


def check(scheme: Scheme) -> str | None:
    if scheme.center == "threshold" and scheme.refit:
        return "center threshold moves signs away from their nearest level: use refit 0"
    return no_salient(scheme)


@register("binary", codes="binary", check=check)
def fit(weights: Tensor, mask: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Fit:
    """Fit binary planes to rows of weights."""
    return fit_planes(weights, mask, scheme, dtype, BINARY, rule)
