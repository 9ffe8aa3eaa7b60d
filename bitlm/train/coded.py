"""A weight as codes and scales: between the dense weight and the packed tensors.

`code` does what `methods.encode` does without compensation, by the methods' own fits, and keeps the
codes unpacked: training needs the dense values at every step, and packs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import EncodeError, Fit, method
from ..methods.levels import DoesNotFit
from ..methods.salience import HALF_RANGE
from ..ops.bits import pack_bits, pack_trits
from ..scheme import Scheme

DIVERGED = "training has diverged, go on from an earlier checkpoint with a lower learning rate"


@dataclass
class Coded:
    """A weight [N, K] as codes and what they stand for: the planes before they are packed.

    codes: int8 [P, N, K]. scales: float32 [P, N, G], and shift [N, G] or None, already rounded to
    `dtype`. group_size: columns per scale.
    """

    codes: Tensor
    scales: Tensor
    shift: Tensor | None
    dtype: torch.dtype
    group_size: int

    def spread(self, values: Tensor) -> Tensor:
        """Return values [N, G] for each column: [N, K], or [N, 1] where there is one group."""
        return spread(values, self.group_size, self.codes.shape[-1])

    def values(self) -> Tensor:
        """Return the dense weight, float32, summed in the order of `ops.dequantize`."""
        total = self.codes[0].to(self.scales.dtype).mul_(self.spread(self.scales[0]))
        for codes, scales in zip(self.codes[1:], self.scales[1:]):
            total += codes * self.spread(scales)
        return total if self.shift is None else total.add_(self.spread(self.shift))

    def tensors(self, scheme: Scheme, counted: Tensor | None = None) -> dict[str, Tensor]:
        """Return the packed planes and shift. Sign bits are 0 where not counted (bool [N, K])."""
        ternary = method(scheme).codes == "ternary"
        packed = {}
        for plane, (codes, scales) in enumerate(zip(self.codes, self.scales)):
            if scheme.trits:
                packed[f"plane{plane}.trits"] = pack_trits(codes)
            else:
                positive = codes > 0 if counted is None else (codes > 0) & counted
                packed[f"plane{plane}.signs"] = pack_bits(positive)
                if ternary:
                    packed[f"plane{plane}.mask"] = pack_bits(codes != 0)
            if plane == 0 or scheme.plane_ratio == 1:
                packed[f"plane{plane}.scales"] = scales.to(self.dtype)
        if self.shift is not None:
            packed["shift"] = self.shift.to(self.dtype)
        return packed


def spread(values: Tensor, group_size: int, columns: int) -> Tensor:
    """Return values [N, G] for each column: [N, columns], or [N, 1] where there is one group."""
    if values.shape[1] == 1:
        return values
    return values.repeat_interleave(group_size, dim=1)[:, :columns]


def code(weight: Tensor, scheme: Scheme, counted: Tensor | None = None,
         name: str = "weight") -> Coded:
    """Fit and code a float32 weight [N, K] by its statistics, as `methods.encode` does.

    counted: bool [N, K], the entries that planes have to represent; None for all.
    Raises EncodeError where the weight has no finite scales.
    """
    for dtype in (getattr(torch, scheme.scale_dtype), torch.float32):
        try:
            return _code(weight, scheme, counted, dtype)
        except DoesNotFit:
            continue
    raise EncodeError(f"{name} has NaN, infinite or too large values: {DIVERGED}")


def _code(weight: Tensor, scheme: Scheme, counted: Tensor | None, dtype: torch.dtype) -> Coded:
    codes, scales, shifts = [], [], []
    for part, mask in groups(weight, scheme, counted):
        fit = _fit(part, mask, scheme, dtype)
        own = fit.assign(part)
        codes.append(own.view(len(own), len(weight), -1))
        scales.append(_by_row(fit.scales, len(weight)))
        if fit.shift is not None:
            shifts.append(_by_row(fit.shift, len(weight))[0])
    return Coded(torch.cat(codes, 2), torch.cat(scales, 2),
                 torch.cat(shifts, 1) if shifts else None, dtype,
                 scheme.columns_per_scale(weight.shape[1]))


def groups(weight: Tensor, scheme: Scheme, counted: Tensor | None = None
            ) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the groups [R, c] of a weight with their masks: first the full ones, then the short.

    R is N times the groups of that width, 1 for group_size "tensor".
    """
    columns = weight.shape[1]
    size = scheme.columns_per_scale(columns)
    full = columns // size * size
    for start, stop, width in ((0, full, size), (full, columns, columns - full)):
        if stop > start:
            shape = (1, -1) if scheme.group_size == "tensor" else (-1, width)
            yield tuple(None if x is None else x[:, start:stop].reshape(shape)
                        for x in (weight, counted))


def _by_row(values: Tensor, rows: int) -> Tensor:
    """Return values [R, P] of groups as [P, rows, groups]; one value for all as a column."""
    if len(values) == 1:
        values = values.expand(rows, -1)
    return values.T.reshape(values.shape[1], rows, -1)


def _fit(weights: Tensor, mask: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Fit:
    """Fit groups; raises DoesNotFit where `methods.encode` would store float32 scales.

    A group fits float16 when its largest scale or shift is a normal number or exactly 0.
    """
    fit = method(scheme).fit
    found = fit(weights, mask, scheme, dtype)
    if dtype == torch.float32:
        return found
    small = _largest(found) < HALF_RANGE[0]
    if bool(small.any()):
        exact = fit(weights[small], None if mask is None else mask[small], scheme, torch.float32)
        if bool(_largest(exact).any()):
            raise DoesNotFit("scales are too small for float16")
    return found


def _largest(fit: Fit) -> Tensor:
    largest = fit.scales.abs().amax(1)
    return largest if fit.shift is None else torch.maximum(largest, fit.shift.abs().squeeze(1))


def measured(weight: Tensor, scheme: Scheme, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a statistic, groups [R, c] -> [R, 1], of each group of a weight: [N, G]."""
    return torch.cat([_by_row(statistic(part), len(weight))[0]
                      for part, _ in groups(weight, scheme)], 1)
