"""How a layer rounds its inputs: the activation modes of native/bitlm.h, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

INT8, INT16 = 127, 32512
# Levels of x / a, a the step: what models that were trained with them compute.
LEVELS: dict[str, Callable[[Tensor], Tensor]] = {
    "int2": lambda u: u.floor().clamp(-2, 1) + 0.5,
    "uint2": lambda u: u.round().clamp(0, 3),
    "int1": lambda u: signs(u),
    "uint1": lambda u: (u - 0.5).sign().clamp(min=0),
}
# The step for an input without one of its own, as a multiple of mean|x|.
STEPS = {"int2": 1.0, "uint2": 2 / 3 ** 0.5, "int1": 1.0, "uint1": 2.0}


def rounded(x: Tensor, activation: str, step: Tensor | None = None) -> Tensor:
    """Return x [..., K] as the codes' product sees it, in the dtype of x.

    float: as it is. int8, int16: integers times max|x| / 127 or / 32512 of the token. int2, uint2,
    int1, uint1: levels times `step` (one number) or a multiple of mean|x| of the token. Tokens with
    infinities or NaN stay as they are.
    """
    if activation == "float" or not x.shape[-1]:
        return x
    largest = x.abs().amax(-1, keepdim=True)  # NaN where there is one
    if activation in ("int8", "int16"):
        scale = largest / (INT8 if activation == "int8" else INT16)
        result = (x / _positive(scale)).round() * scale
    else:
        a = STEPS[activation] * x.abs().mean(-1, keepdim=True) if step is None else \
            step.to(x.dtype).reshape(())
        result = LEVELS[activation](x / _positive(a)) * a
    return finite_else(largest, result, x)


def signs(x: Tensor) -> Tensor:
    """Return sign(x) in the dtype of x, sign(0) = +1."""
    return torch.copysign(x.new_ones(()), x + 0.0)  # which makes +0 of -0


def finite_else(largest: Tensor, result: Tensor, x: Tensor) -> Tensor:
    """Return `result` where `largest` (of each token, [..., 1]) is finite, elsewhere x."""
    finite = largest.isfinite()
    # On a CPU `where` takes as long as all of the rounding does, and a look is free.
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and bool(finite.all()):
        return result
    return torch.where(finite, result, x)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
