"""Encode one planned weight: cut fused experts and parts apart, encode each, join them again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .methods import encode
from .plan import Entry
from .weight import PackedWeight, from_encoded, stack_experts


@dataclass(frozen=True)
class Packed:
    """A packed weight and how far it is from the dense one.

    relative_error: ||W - What|| / ||W||. output_error: the same of the layer's outputs on the
    calibration text, None without one. Means over experts and parts where there are several.
    """

    weight: PackedWeight
    relative_error: float
    output_error: float | None


def pack_weight(entry: Entry, dense: Tensor, hessians: list[Tensor | None] | None = None
                ) -> Packed:
    """Encode the dense weight of a plan entry.

    dense: [N, K] or [E, N, K], with the last two axes swapped where the target is `transposed`.
    hessians: one [K, K] for a matrix, one for each expert otherwise; None where there is none.
    Raises what methods.encode raises, naming the weight.
    """
    target, scheme = entry.target, entry.scheme
    if target.transposed:
        dense = dense.transpose(-1, -2)
    matrices = dense if target.experts else dense.unsqueeze(0)
    weights, errors, output_errors = [], [], []
    for index, matrix in enumerate(matrices):
        hessian = hessians[index] if hessians else None
        name = f"{target.name}[{index}]" if target.experts else target.name
        for part in matrix.chunk(target.parts):
            encoded = encode(part, scheme, hessian, name)
            weights.append(from_encoded(encoded.tensors, tuple(part.shape), encoded.group_size,
                                        scheme.plane_ratio, dense.dtype))
            errors.append(encoded.relative_error)
            output_errors.append(encoded.output_error)
    weight = stack_experts(weights, target.parts) if target.experts else weights[0]
    weight.activation = scheme.activation
    known = [error for error in output_errors if error is not None]
    return Packed(weight, sum(errors) / len(errors), sum(known) / len(known) if known else None)
