"""Encoders: a dense weight, its scheme and statistics become packed tensors."""

from . import binary, grid, salient, ternary  # noqa: F401  (they register themselves)
from .encoding import Encoded, encode
from .registry import (
    METHODS,
    EncodeError,
    Fit,
    FitFunction,
    Method,
    method,
    register,
    statistics_needed,
)

__all__ = ["METHODS", "EncodeError", "Encoded", "Fit", "FitFunction", "Method", "encode", "method",
           "register", "statistics_needed"]
