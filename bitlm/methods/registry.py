"""The method registry: a method is one function that fits levels to groups of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..scheme import Scheme, SchemeError


class EncodeError(ValueError):
    """A weight that cannot be encoded: the message names it and says why."""


@dataclass
class Fit:
    """Levels of some rows of weights, each row a group: sum_p scales_p * code_p + shift.

    scales: [R, P] float32, already rounded to the stored dtype. shift: [R, 1] likewise, or None.
    assign: weights [R, c] -> int8 codes [P, R, c], any number of columns c.
    """

    scales: Tensor
    shift: Tensor | None
    assign: Callable[[Tensor], Tensor]

    def values(self, codes: Tensor) -> Tensor:
        """Return what codes [P, R, c] stand for, [R, c], summed in the order of `dequantize`."""
        values = codes[0] * self.scales[:, :1]
        for plane in range(1, codes.shape[0]):
            values += codes[plane] * self.scales[:, plane:plane + 1]
        return values if self.shift is None else values.add_(self.shift)


# (weights [R, g] float32; mask [R, g], how much each entry counts, bool or float, None for all
# alike; scheme; dtype the scales are stored in) -> Fit
FitFunction = Callable[[Tensor, Tensor | None, Scheme, torch.dtype], Fit]


@dataclass(frozen=True)
class Method:
    """A registered method: how to fit, and which alphabet its planes have."""

    fit: FitFunction
    codes: str  # "binary" or "ternary"
    check: Callable[[Scheme], str | None]  # why a scheme makes no sense for this method


METHODS: dict[str, Method] = {}


def register(name: str, codes: str, check: Callable[[Scheme], str | None] = lambda scheme: None):
    """Register the decorated fit function as method `name`."""
    def add(fit: FitFunction) -> FitFunction:
        METHODS[name] = Method(fit, codes, check)
        return fit
    return add


def method(scheme: Scheme) -> Method:
    """Return the method of a scheme; raises SchemeError when unknown or misused."""
    if scheme.method not in METHODS:
        raise SchemeError(f"unknown method {scheme.method!r}: the methods are "
                          f"{', '.join(sorted(METHODS))}")
    found = METHODS[scheme.method]
    problem = found.check(scheme)
    if scheme.trits and found.codes != "ternary":
        problem = f"trits stores ternary planes: method {scheme.method} has none"
    if problem:
        raise SchemeError(problem)
    return found


def needs_hessian(scheme: Scheme) -> bool:
    """Return whether `encode` needs the Hessian of the weight's inputs."""
    return scheme.compensate or (scheme.salient > 0 and scheme.salient_metric == "hessian")


def statistics_needed(scheme: Scheme) -> str:
    """Return "hessian" or "none": what `encode` needs to know of a weight's inputs."""
    return "hessian" if needs_hessian(scheme) else "none"


def no_salient(scheme: Scheme) -> str | None:
    """The check of methods that keep no salient weights."""
    if scheme.salient > 0:
        return f"salient is {scheme.salient:g}: use method salient, {scheme.method} keeps none"
    return None
