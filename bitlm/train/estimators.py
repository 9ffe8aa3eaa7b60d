"""Gradient estimators of sign(), as data: what stands for its derivative in the backward pass.

An estimator is a factor f(x, parameter): the gradient of sign(x) is taken to be f, so that the
incoming gradient is multiplied by it. Those that sharpen in the course of training have a schedule,
progress in [0, 1] -> parameter; step it with the optimizer, long runs have few epochs.

Estimators assume inputs of about unit size, weights of transformers are near 0.02. So the factor is
evaluated at x / unit. The gradient is not divided by the unit: with any estimator it has the scale
that it has with the identity, and the unit only says where the factor rises and falls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, relu

from ..ops.rounding import signs

# --- factors -------------------------------------------------------------------------------------
# (x, parameter) -> f(x), for any float x. Those without a parameter ignore it.


def identity(x: Tensor, parameter: float) -> Tensor:
    """1: Bengio et al., arXiv 1308.3432."""
    return torch.ones_like(x)


def clipped(x: Tensor, parameter: float) -> Tensor:
    """1 for |x| <= 1, else 0."""
    return (x.abs() <= 1).to(x.dtype)


def bireal(x: Tensor, parameter: float) -> Tensor:
    """max(0, 2 - 2|x|): Bi-Real Net, arXiv 1808.00278."""
    return (2 - 2 * x.abs()).clamp(min=0)


def ede(x: Tensor, parameter: float) -> Tensor:
    """k t (1 - tanh(t x)^2), k = max(1/t, 1), the parameter is t: IR-Net, arXiv 1909.10788."""
    return max(1.0, parameter) * (1 - (parameter * x).tanh().square())


FDA_FREQUENCY = 0.1


def fda(x: Tensor, parameter: float) -> Tensor:
    """4w/pi sum_{i=0..n} cos((2i+1) w x) for |x| <= 1, else 0; w = 0.1, the parameter is n.

    The Fourier series of a square wave, arXiv 2103.00841, summed in closed form:
    sin(2(n+1) w x) / (2 sin(w x)). Large n make it negative near |x| = 1.
    """
    terms = int(parameter) + 1
    angle = FDA_FREQUENCY * x.clamp(-1, 1)
    series = torch.where(angle == 0, terms, (2 * terms * angle).sin() / (2 * angle.sin()))
    return series * (4 * FDA_FREQUENCY / math.pi) * (x.abs() <= 1)


def biper(x: Tensor, parameter: float) -> Tensor:
    """w cos(w x), the parameter is w: BiPer, arXiv 2404.01278."""
    return parameter * (parameter * x).cos()


RESTE_FLAT, RESTE_END = 0.1, 1.5


def reste(x: Tensor, parameter: float) -> Tensor:
    """1/o |x|^(1/o - 1) for m < |x| <= 1.5, m^(1/o) / m up to m = 0.1, else 0; the parameter is o.

    The derivative of sign(x) |x|^(1/o): ReSTE, arXiv 2308.06689.
    """
    size = x.abs()
    power = size.clamp(min=RESTE_FLAT) ** (1 / parameter - 1)
    return torch.where(size <= RESTE_FLAT, power, power / parameter) * (size <= RESTE_END)


def smoothsign(x: Tensor, parameter: float) -> Tensor:
    """k (1 - tanh(k x)^2), the parameter is k: LittleBit, arXiv 2506.13771."""
    return parameter * (1 - (parameter * x).tanh().square())


def tanh(x: Tensor, parameter: float) -> Tensor:
    """1.001 - tanh(x)^2: OneBit, arXiv 2402.11295."""
    return 1.001 - x.tanh().square()


# --- schedules -----------------------------------------------------------------------------------
# progress in [0, 1] -> parameter.


def ede_sharpness(progress: float, first: float = 0.1, last: float = 10.0) -> float:
    """Return t of `ede`, which grows geometrically from `first` to `last`.

    `first` is 1e-1 in the paper; released trainings have 1e-2 and 1e-3.
    """
    return 10 ** (math.log10(first) + math.log10(last / first) * progress)


def fda_terms(progress: float, first: int = 9, more: int = 9) -> int:
    """Return n of `fda`: `first` + int(`more` * progress)."""
    return first + int(more * progress)


def fda_noise(progress: float, half: float = 0.05) -> float:
    """Return the amount of `FourierNoise`: half (1 + cos(pi progress)), from 2 * half to 0."""
    return half * (1 + math.cos(math.pi * progress))


def reste_order(progress: float, last: float = 3.0) -> float:
    """Return o of `reste`: 1 + (last - 1)(1 - cos(pi progress / 2)), from 1 to `last`."""
    return 1 + (last - 1) * (1 - math.cos(math.pi * progress / 2))


def biper_coefficient(progress: float, first: float = 0.0, last: float = 0.0) -> float:
    """Return what `biper_penalty` is multiplied by: A exp(progress) + B, from `first` to `last`.

    Off by default. For images the paper ends at 0.037 (real sine) and 0.0468 (binary).
    """
    return first + (last - first) * (math.exp(progress) - 1) / (math.e - 1)


# --- the table -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Estimator:
    """One estimator: its factor, its parameter, and how that changes.

    parameter: the published one, for inputs of the size they have there. normalised: the one for
    inputs that were divided by their mean size. schedule: None where the parameter is fixed.
    wave: for an estimator whose code is not sign(x), (x, parameter) -> what the sign is taken of.
    """

    factor: Callable[[Tensor, float], Tensor]
    parameter: float = 1.0
    normalised: float = 1.0
    schedule: Callable[[float], float] | None = None
    wave: Callable[[Tensor, float], Tensor] | None = None


ESTIMATORS: dict[str, Estimator] = {
    "identity": Estimator(identity),
    "clipped": Estimator(clipped),
    "bireal": Estimator(bireal),
    "ede": Estimator(ede, 0.1, 0.1, ede_sharpness),
    "fda": Estimator(fda, 9, 9, fda_terms),
    # 1 / std of a Gaussian row whose mean size is 1: the first half wave reaches 3 deviations.
    "biper": Estimator(biper, 20.0, math.sqrt(2 / math.pi), wave=lambda x, w: (w * x).sin()),
    "reste": Estimator(reste, 1.0, 1.0, reste_order),
    # 100 at weights of mean size 0.02.
    "smoothsign": Estimator(smoothsign, 100.0, 2.0),
    "tanh": Estimator(tanh),
}


def estimator(name: str) -> Estimator:
    """Return an estimator by name; raises ValueError naming the estimators there are."""
    if name not in ESTIMATORS:
        raise ValueError(f"unknown estimator {name!r}: the estimators are {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def row_unit(x: Tensor) -> Tensor:
    """Return mean|x| of each row, [..., 1] float32, 1 for a row of zeros: the unit of weights."""
    size = x.detach().float().abs().mean(-1, keepdim=True)
    return torch.where(size > 0, size, 1.0)


# --- the autograd function -----------------------------------------------------------------------

class _Estimated(torch.autograd.Function):
    """Values forward; backward the gradient times the factor at x / unit."""

    @staticmethod
    def forward(ctx, x, values, name, parameter, unit, cut):
        ctx.name, ctx.parameter = name, parameter
        if name != "identity":
            ctx.save_for_backward(x, unit, cut)
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        if ctx.name != "identity":
            x, unit, cut = ctx.saved_tensors
            factor = ESTIMATORS[ctx.name].factor
            if cut is None:
                f = factor(_divided(x, unit), ctx.parameter)
            else:
                f = (factor(_divided(x - cut, unit), ctx.parameter)
                     + factor(_divided(x + cut, unit), ctx.parameter)) / 2
            grad = grad * f.to(grad.dtype)
        return grad, None, None, None, None, None


def _divided(x: Tensor, unit: Tensor | None) -> Tensor:
    x = x if x.dtype == torch.float64 else x.float()
    return x if unit is None else x / unit


def straight_through(x: Tensor, values: Tensor, name: str = "identity",
                     parameter: float | None = None, unit: Tensor | None = None,
                     cut: Tensor | None = None) -> Tensor:
    """Return `values` as a function of x, whose gradient is that of sign(x) by an estimator.

    x, values: the same shape and float dtype. name, parameter, unit: see `sign`. cut: for values
    with three levels that change at +-cut (broadcast against x): a ternary code is half the sum of
    sign(x - cut) and sign(x + cut), and so is its gradient. No gradient reaches values, unit, cut.
    """
    known = estimator(name)
    parameter = known.parameter if parameter is None else parameter
    return _Estimated.apply(x, values.detach(), name, parameter, unit, cut)


def sign(x: Tensor, name: str = "identity", parameter: float | None = None,
         unit: Tensor | None = None, real: bool = False) -> Tensor:
    """Return sign(x) in the dtype of x, sign(0) = +1, with the gradient of an estimator.

    The gradient is grad * f(x / unit, parameter), nothing more (see the head of this file).
    For "biper" the code is sign(sin(w x / unit)), and `real` returns the sine itself, as in the
    first of BiPer's two stages.

    x: any float tensor. name: one of ESTIMATORS. parameter: None for the estimator's own. unit:
    broadcast against x, None for 1; `row_unit` for weights.
    Raises ValueError for an unknown estimator, and for `real` with one that has no wave.
    """
    known = estimator(name)
    if real and known.wave is None:
        raise ValueError(f"estimator {name!r} has no real form: it is biper that has one")
    parameter = known.parameter if parameter is None else parameter
    values = x.detach()
    if known.wave is not None:
        values = known.wave(_divided(values, unit), parameter).to(x.dtype)
    if not real:
        values = signs(values).to(x.dtype)
    return straight_through(x, values, name, parameter, unit)


# --- what two of them add ------------------------------------------------------------------------

def biper_penalty(x: Tensor, parameter: float | None = None, unit: Tensor | None = None,
                  saturate: bool = False) -> Tensor:
    """Return mean sin(w x / unit)^2, BiPer's regulariser of one weight, as released.

    Minimising it pulls weights to the zeros of the sine, where codes flip; `saturate` returns
    mean cos^2 in its place, which pulls them to the codes. Average over layers, and multiply by
    `biper_coefficient`.
    """
    w = ESTIMATORS["biper"].parameter if parameter is None else parameter
    angle = w * _divided(x, unit)
    return (angle.cos() if saturate else angle.sin()).square().mean()


class FourierNoise(nn.Module):
    """FDA's learned noise: zeros to add to a sign, with the gradient of what they stand for.

        amount * ( relu(x W1) W2 + 0.1 sin(x) ),  W1 [width, width / reduction]

    It corrects the truncated series while `amount` (`fda_noise`) lasts: arXiv 2103.00841.
    Like the factors it is evaluated at x / unit and its gradient not divided by the unit.
    """

    def __init__(self, width: int, reduction: int = 64, seed: int = 0) -> None:
        super().__init__()
        inner = max(1, width // reduction)
        random = torch.Generator().manual_seed(seed)
        # Drawn on the CPU like its generator, so that the same seed gives the same on any device.
        down = torch.randn(inner, width, generator=random, device="cpu") / math.sqrt(width)
        up = torch.randn(width, inner, generator=random, device="cpu") / math.sqrt(inner)
        device = torch.get_default_device()
        self.down, self.up = nn.Parameter(down.to(device)), nn.Parameter(up.to(device))

    def forward(self, x: Tensor, amount: float, unit: Tensor | None = None) -> Tensor:
        """Return zeros of the shape and dtype of x [..., width]."""
        place = _divided(x.detach(), unit).to(self.down.dtype)
        place = place + (x - x.detach()).to(place.dtype)
        noise = amount * (linear(relu(linear(place, self.down)), self.up) + 0.1 * place.sin())
        return (noise - noise.detach()).to(x.dtype)
