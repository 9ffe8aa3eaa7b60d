"""Which weights stay at 8 bits, and how they are rounded (PB-LLM, arXiv 2310.00034).

    score    |W_ij|, or W_ij^2 / U_jj^2 with U the factor of `compensation.factor`
    8 bits   scale_i = (max(W_i, 0) - min(W_i, 0)) / 255, zero_i = round(-min / scale_i),
             W_ij ~ scale_i (clamp(round(W_ij / scale_i) + zero_i, 0, 255) - zero_i)

Both come from the original weight, whatever compensation does to it later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..scheme import Scheme

# The normal numbers of float16; a smaller scale would lose more than the rounding error.
HALF_RANGE = (6e-5, 65504.0)


@dataclass(frozen=True)
class Salient:
    """The salient entries of one weight.

    mask: bool [N, K]. columns: int64 [S] rising when whole columns were chosen, else None.
    scales, zeros: float32 [N, 1], the scales rounded to `dtype`.
    """

    mask: Tensor
    columns: Tensor | None
    scales: Tensor
    zeros: Tensor
    dtype: torch.dtype

    def codes(self, weights: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return the 8-bit codes of weights [n, c] of the given rows, as float32."""
        scales, zeros = self.scales[rows], self.zeros[rows]
        steps = weights / torch.where(scales > 0, scales, 1)
        return steps.round_().add_(zeros).clamp_(0, 255)

    def values(self, codes: Tensor, rows: slice = slice(None)) -> Tensor:
        return (codes - self.zeros[rows]) * self.scales[rows]


def choose(weight: Tensor, scheme: Scheme, group_size: int,
           diagonal: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the salient mask [N, K] and, for layout "columns", the columns.

    diagonal: U_jj for the metric "hessian". Ties go to the first entry in row-major order.
    """
    columns = weight.shape[1]
    width = columns if scheme.salient_scope == "tensor" else group_size
    whole = scheme.salient_layout == "columns"
    mask = torch.empty(weight.shape[1:] if whole else weight.shape, dtype=torch.bool,
                       device=weight.device)
    for start in range(0, columns, width):
        score = weight[:, start:start + width].to(torch.float32).abs()
        if scheme.salient_metric == "hessian":
            score.div_(diagonal[start:start + width]).square_()
        if whole:
            score = score.sum(0, dtype=torch.float64)
        mask[..., start:start + width] = largest(score, round(scheme.salient * score.numel()))
    if whole:
        return mask.expand(weight.shape), mask.nonzero().squeeze(1)
    return mask, None


def largest(score: Tensor, count: int) -> Tensor:
    """Return a mask of exactly `count` largest entries."""
    flat = score.flatten()
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    chosen = flat > threshold
    missing = count - int(chosen.sum())
    chosen[(flat == threshold).nonzero().squeeze(1)[:missing]] = True
    return chosen.view(score.shape)


def eight_bit(low: Tensor, high: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return scales, zeros [N, 1] of rows that span low..high, and the dtype that holds them."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    exact = (high - low) / 255
    used = exact[exact > 0]
    if bool(((used < HALF_RANGE[0]) | (used > HALF_RANGE[1])).any()):
        dtype = torch.float32
    scales = exact.to(dtype).to(torch.float32)
    zeros = (-low / torch.where(scales > 0, scales, 1)).round_().clamp_(0, 255)
    return scales, zeros, dtype
