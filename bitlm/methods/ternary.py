"""Ternary planes: W ~ sum_p a_p T_p [+ shift], T in {-1, 0, +1}.

    tbt      a = 4/3 mean|W|, 0 up to a/2: equal thirds for uniform weights   arXiv 2306.01841
    twn      a = mean of |W| beyond 0.7 mean|W|, 0 up to there                arXiv 1605.04711
    absmean  a = mean|W|, 0 up to a/2                           BitNet b1.58, arXiv 2402.17764

More planes repeat this on the residual, `refit` replaces the rules by least squares and the
nearest of the levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import Scheme
from .levels import TERNARY, fit_planes, mean
from .registry import Fit, no_salient, register

MOST_REFITTED = 4  # 3**planes levels per group


def rule(rest: Tensor, mask: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    size = rest.abs()
    average = mean(size, mask)
    if scheme.levels == "twn":
        cut = 0.7 * average
        beyond = size > cut
        return mean(size, beyond if mask is None else beyond * mask), cut
    return average * (4 / 3) if scheme.levels == "tbt" else average, None


def check(scheme: Scheme) -> str | None:
    if scheme.center == "threshold":
        return "center threshold is for binary planes: use none, drop or shift"
    if scheme.refit and scheme.planes > MOST_REFITTED:
        return f"refit takes at most {MOST_REFITTED} ternary planes: use refit 0"
    return no_salient(scheme)


@register("ternary", codes="ternary", check=check)
def fit(weights: Tensor, mask: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Fit:
    """Fit ternary planes to rows of weights."""
    return fit_planes(weights, mask, scheme, dtype, TERNARY, rule)
