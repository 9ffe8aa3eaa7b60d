"""`Scheme`: what one weight becomes, as plain data. Presets are named schemes.

This module imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

CENTERS = ("none", "threshold", "drop", "shift")
LEVELS = ("tbt", "twn", "absmean")
SCALE_DTYPES = ("float16", "float32")
# How a layer rounds its inputs, as in `bitlm_activation` of native/bitlm.h. The low-bit ones are
# alphabets of models that were trained with them, with one step a for a token:
LOW_BIT_ACTIVATIONS = (
    "int2",  # -3a/2, -a/2, a/2, 3a/2
    "uint2",  # 0, a, 2a, 3a
    "int1",  # -a, a
    "uint1",  # 0, a
)
ACTIVATIONS = ("float", "int16", "int8", *LOW_BIT_ACTIVATIONS)


class SchemeError(ValueError):
    """A scheme that cannot be: the message names the field and what it may be."""


@dataclass(frozen=True)
class Scheme:
    """How one weight [N, K] is turned into packed planes.

    method: name in the registry: binary, ternary, salient, grid.
    planes: planes of codes, 1 to 8. For `grid` the number of bits: plane p has the scale of
        plane 0 divided by 2**p.
    group_size: columns that share a scale, or "row", or "tensor" (one scale, stored for each row).
    center: what happens to the mean of a group: "none"; "threshold", it only moves the sign's
        threshold (BWN, BiPFT); "drop", removed and lost (TBT's paper form); "shift", removed and
        stored. A grid with "shift" spans min..max, with "none" -max|w|..max|w|.
    levels: ternary rule: "tbt" (4/3 mean|W|, cut at half), "twn" (cut at 0.7 mean|W|), "absmean"
        (BitNet: mean|W|, cut at half).
    refit: rounds of least squares over scales and codes in turn; 0 keeps the greedy residual.
    compensate: spread each column's rounding error over the later columns (GPTQ); needs a Hessian.
    scales_from: with compensation, fit a group's scales on the "original" weight (PB-LLM) or on the
        "compensated" one, as the loop reaches it (GPTQ). At one plane the latter can run away: the
        errors that a group receives inflate its scale, and that its errors in turn.
    damp: Hessian damping, as a fraction of its mean diagonal.
    salient: fraction of weights kept at 8 bits (method salient).
    salient_layout: "elements" or whole "columns".
    salient_metric: choose by "magnitude" or by "hessian", w^2 / U_jj^2.
    salient_scope: choose within each "group" of columns or over the whole "tensor".
    salient_statistics: scales from the binarized entries only ("masked"), or PB-LLM's released
        form that divides by the group width ("diluted").
    trits: store ternary planes base 3 (1.6 bits) in place of sign and mask bits (2 bits).
    scale_dtype: "float16" or "float32". A tensor whose scales do not fit float16 gets float32.
    activation: how the layer rounds its inputs before the product: "float" (as exact as float32),
        "int16" (error <= 1e-4), "int8" (one scale a token), or one of LOW_BIT_ACTIVATIONS. It does
        not change what is stored, and can be changed later (activations.set_activation).

    Raises SchemeError for values that are not allowed. Sources: ../README.md, "Methods".
    """

    method: str = "binary"
    planes: int = 1
    group_size: int | str = 128
    center: str = "none"
    levels: str = "tbt"
    refit: int = 0
    compensate: bool = False
    scales_from: str = "original"
    damp: float = 0.01
    salient: float = 0.0
    salient_layout: str = "elements"
    salient_metric: str = "magnitude"
    salient_scope: str = "group"
    salient_statistics: str = "masked"
    trits: bool = False
    scale_dtype: str = "float16"
    activation: str = "float"

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise SchemeError(f"method is {self.method!r}: use the name of a method")
        _one_of(self, "center", CENTERS)
        _one_of(self, "levels", LEVELS)
        _one_of(self, "scales_from", ("compensated", "original"))
        _one_of(self, "salient_layout", ("elements", "columns"))
        _one_of(self, "salient_metric", ("magnitude", "hessian"))
        _one_of(self, "salient_scope", ("group", "tensor"))
        _one_of(self, "salient_statistics", ("masked", "diluted"))
        _one_of(self, "scale_dtype", SCALE_DTYPES)
        _one_of(self, "activation", ACTIVATIONS)
        _number(self, "planes", int, 1, 8)
        _number(self, "refit", int, 0, 1000)
        _number(self, "damp", float, 0.0, 1.0)
        _number(self, "salient", float, 0.0, 1.0)
        for name in ("compensate", "trits"):
            if not isinstance(getattr(self, name), bool):
                raise SchemeError(f"{name} is {getattr(self, name)!r}: use true or false")
        size = self.group_size
        if size not in ("row", "tensor") and (isinstance(size, bool) or not isinstance(size, int)
                                              or size < 1):
            raise SchemeError(f"group_size is {size!r}: use a positive number of columns, "
                              '"row" or "tensor"')

    @property
    def plane_ratio(self) -> int:
        return 2 if self.method == "grid" else 1

    def columns_per_scale(self, columns: int) -> int:
        """Return the group size in columns for a weight with `columns` in features."""
        return columns if isinstance(self.group_size, str) else min(self.group_size, columns)

    def replace(self, **changes: Any) -> Scheme:
        """Return a copy with the given fields changed; unknown fields raise SchemeError."""
        _known(changes)
        return dataclasses.replace(self, **changes)

    def calibrated(self) -> Scheme:
        """Return the scheme that makes use of calibration text.

        Compensated, salience by Hessian, and scales refitted by the importance of each column;
        a grid keeps its plain min-max range, and what cannot be refitted stays as it is.
        """
        fixed = (self.method == "grid" or self.center == "threshold"
                 or self.salient_statistics == "diluted")
        return self.replace(
            compensate=True, refit=self.refit if fixed else max(self.refit, 10),
            salient_metric="hessian" if self.method == "salient" else self.salient_metric)

    def to_dict(self) -> dict[str, Any]:
        """Return the method and every field that is not at its default (JSON types only)."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                  if getattr(self, f.name) != f.default}
        return {"method": self.method} | fields

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        """Return the Scheme that `to_dict` wrote; unknown keys raise SchemeError."""
        _known(data)
        return cls(**data)


def _known(data: dict[str, Any]) -> None:
    names = [f.name for f in dataclasses.fields(Scheme)]
    for key in data:
        if key not in names:
            raise SchemeError(f"unknown scheme key {key!r}: the keys are {', '.join(names)}")


def _one_of(scheme: Scheme, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(scheme, field)
    if value not in allowed:
        raise SchemeError(f"{field} is {value!r}: use one of {', '.join(allowed)}")


def _number(scheme: Scheme, field: str, kind: type, low: float, high: float) -> None:
    value = getattr(scheme, field)
    right = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        word = "a whole number" if kind is int else "a number"
        raise SchemeError(f"{field} is {value!r}: use {word} from {low:g} to {high:g}")


# Named for what a person wants; their measured quality is in the README.
PRESETS: dict[str, Scheme] = {
    "binary": Scheme(),
    "ternary": Scheme(method="ternary", refit=10),
    "salient": Scheme(method="salient", salient=0.1),
    "chat": Scheme(planes=3, refit=10),
}
DEFAULT_PRESET = "binary"


def preset(name: str) -> Scheme:
    """Return a preset by name; raises SchemeError naming the presets there are."""
    if name not in PRESETS:
        raise SchemeError(f"unknown preset {name!r}: the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def embedding_scheme(bits: int) -> Scheme:
    """Return the scheme of embeddings and head at `bits` bits: 1 = binary, 2 to 8 = uniform grid.

    Raises SchemeError outside 1..8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise SchemeError(f"embeddings at {bits!r} bits: use 1 (binary) or 2 to 8 (uniform grid)")
    return Scheme() if bits == 1 else grid(bits)


def grid(bits: int, group_size: int | str = 128) -> Scheme:
    """Return the uniform min-max grid of `bits` bits."""
    return Scheme(method="grid", planes=bits, group_size=group_size, center="shift")
