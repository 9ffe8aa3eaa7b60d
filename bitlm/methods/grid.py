"""A uniform grid of 2 to 8 bits by binary planes whose scales halve: the plain yardstick.

    W ~ s * sum_p 2^-p B_p + shift,  2^P levels from shift - s (2 - 2^(1-P)) upwards

center shift spans min..max of a group (asymmetric round-to-nearest), none -max|W|..max|W| (BEBR's
codes, arXiv 2302.08714, mid-rise). `refit` > 0 tries as many smaller ranges, down to half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..scheme import Scheme
from .levels import stored
from .registry import Fit, no_salient, register

SMALLEST_RANGE = 0.5


def check(scheme: Scheme) -> str | None:
    if scheme.planes == 1:
        return "a grid has 2 to 8 planes (bits): use method binary for 1"
    if scheme.center not in ("none", "shift"):
        return f"a grid's center is none or shift, not {scheme.center}"
    return no_salient(scheme)


@register("grid", codes="binary", check=check)
def fit(weights: Tensor, mask: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Fit:
    """Fit a uniform grid to rows of weights."""
    low, high = torch.aminmax(weights, dim=1, keepdim=True)
    shift = None
    if scheme.center == "shift":
        shift = stored(low / 2 + high / 2, dtype)
        half = high / 2 - low / 2
    else:
        half = torch.maximum(high, -low)
    best = _grid(half, shift, scheme.planes, dtype)
    error = _error(best, weights, mask) if scheme.refit else None
    for turn in range(1, scheme.refit + 1):
        part = 1 - (1 - SMALLEST_RANGE) * turn / scheme.refit
        other = _grid(half * part, shift, scheme.planes, dtype)
        other_error = _error(other, weights, mask)
        better = other_error < error
        error = torch.where(better, other_error, error)
        best = _from_top(torch.where(better, other.scales[:, :1], best.scales[:, :1]), shift,
                         scheme.planes)
    return best


def _grid(half: Tensor, shift: Tensor | None, planes: int, dtype: torch.dtype) -> Fit:
    return _from_top(stored(half / (2 - 2.0 ** (1 - planes)), dtype), shift, planes)


def _from_top(top: Tensor, shift: Tensor | None, planes: int) -> Fit:
    """Return the grid whose plane 0 has scale `top` [R, 1]."""
    step = top * 2.0 ** (2 - planes)
    divisor = torch.where(step > 0, step, 1)
    middle = (2 ** planes - 1) / 2
    ratios = top.new_tensor([2.0 ** -plane for plane in range(planes)])

    def assign(weights: Tensor) -> Tensor:
        place = (weights if shift is None else weights - shift) / divisor
        level = place.add_(middle).round_().clamp_(0, 2 ** planes - 1).to(torch.uint8)
        bits = [(level >> (planes - 1 - plane)) & 1 for plane in range(planes)]
        return torch.stack(bits).to(torch.int8).mul_(2).sub_(1)

    return Fit(top * ratios, shift, assign)


def _error(fit: Fit, weights: Tensor, mask: Tensor | None) -> Tensor:
    squares = (fit.values(fit.assign(weights)) - weights).square_()
    return (squares if mask is None else squares * mask).sum(1, keepdim=True)
