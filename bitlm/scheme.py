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


# The kinds of quantizers: how many bits each may have, and which of the other fields it knows.
QUANTIZERS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "elastic": ((1, 2), ("signed", "ranges", "minimum", "move")),
    "dynamic": ((1, 2, 8), ("signed", "per", "clip")),
    "threshold": ((1,), ("threshold", "rescale")),
}


@dataclass(frozen=True)
class Quantizer:
    """How one activation is rounded: the input of a linear layer, or an operand of attention.

    kind: "elastic", levels times one learned step (TBT, arXiv 2306.01841; BiT, arXiv 2205.13016);
        "dynamic", equal steps over the range that the values have; "threshold", 1 where a value is
        at least `threshold` times the largest of its row, else 0 (BiViT, arXiv 2211.07091).
    bits: 1 or 2 (elastic), 8, or unsigned 1 or 2 (dynamic), 1 (threshold).
    signed: elastic: levels around 0, {-a, a} at 1 bit, else from 0 on, {0, a}. dynamic: symmetric
        around 0, else from the smallest to the largest value.
    ranges: elastic at 2 bits: "tbt", three levels -1..1 or 0..2; "bit", all four, -2..1 or 0..3.
    minimum: elastic, unsigned at 2 bits: the levels begin at the smallest value of the batch, and
        in a model that serves at a running mean of those; without it at 0, as fits what is never
        negative (probabilities, a ReLU).
    move: elastic: a learned shift of each channel comes first (BiT).
    per: dynamic: one range for each "token" (the last axis), which is what kernels do, or for the
        whole "tensor" (TBT's code), where a row's result depends on its neighbours.
    clip: dynamic: values are cut off beyond plus and minus this (TBT's code: 2.5); 0 cuts nothing.
    threshold: of kind "threshold", as a fraction of the row's largest value.
    rescale: threshold: what a 1 is worth: "none" 1; "sum" one over their number in the row, so that
        rows add up to 1; "mean" the mean of the values that they stand for, which is nearest.

    Raises SchemeError for values that are not allowed, and for fields that the kind has not.
    """

    kind: str = "elastic"
    bits: int = 1
    signed: bool = True
    ranges: str = "tbt"
    minimum: bool = False
    move: bool = False
    per: str = "token"
    clip: float = 0.0
    threshold: float = 0.25
    rescale: str = "none"

    def __post_init__(self) -> None:
        _one_of(self, "kind", tuple(QUANTIZERS))
        bits, own = QUANTIZERS[self.kind]
        if isinstance(self.bits, bool) or self.bits not in bits:
            raise SchemeError(f"bits is {self.bits!r}: use {' or '.join(map(str, bits))} for kind "
                              f"{self.kind}")
        for name in ("signed", "minimum", "move"):
            _true_or_false(self, name)
        _one_of(self, "ranges", ("tbt", "bit"))
        _one_of(self, "per", ("token", "tensor"))
        _one_of(self, "rescale", ("none", "sum", "mean"))
        _number(self, "clip", float, 0.0, 1e6)
        _number(self, "threshold", float, 0.0, 1.0)
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if field.name not in own and value != field.default:
                raise SchemeError(f"{field.name} is {value!r}: kind {self.kind} has no such field")
        if self.kind == "dynamic" and self.signed and self.bits != 8:
            raise SchemeError(f"signed is True: kind dynamic at {self.bits} bits goes from the "
                              "smallest to the largest value")
        if self.minimum and (self.signed or self.bits != 2):
            raise SchemeError("minimum is True: only unsigned quantizers of 2 bits have one")

    def to_dict(self) -> dict[str, Any]:
        """Return kind, bits and every field that is not at its default (JSON types only)."""
        return {"kind": self.kind, "bits": self.bits} | _changed(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Quantizer:
        """Return the Quantizer that `to_dict` wrote; unknown keys raise SchemeError."""
        _known(cls, data)
        return cls(**data)


OPERANDS = ("query", "key", "value", "probabilities")


@dataclass(frozen=True)
class Attention:
    """How the attention of a module is computed; what is None stays as it is.

    query, key, value, probabilities: their quantizers. Queries and keys are rounded as they enter
        the product (behind rotary positions), probabilities behind softmax and dropout.
    scale_query: the query is rounded after it was multiplied by the scaling, 1/sqrt(d) (TBT), not
        before (BiT).
    estimators: rank of the estimators of what rounding queries, keys and values loses (BiPFT, arXiv
        2312.08937); 0: none.

    Quantizers may be given as their dicts. Raises SchemeError for values that are not allowed.
    """

    query: Quantizer | None = None
    key: Quantizer | None = None
    value: Quantizer | None = None
    probabilities: Quantizer | None = None
    scale_query: bool = False
    estimators: int = 0

    def __post_init__(self) -> None:
        for name in OPERANDS:
            _quantizer(self, name)
        if self.probabilities is not None and self.probabilities.move:
            raise SchemeError("move is True: probabilities have no channels to move")
        _true_or_false(self, "scale_query")
        _number(self, "estimators", int, 0, 1024)

    def to_dict(self) -> dict[str, Any]:
        """Return every field that is not at its default (JSON types only)."""
        return _changed(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Attention:
        """Return the Attention that `to_dict` wrote; unknown keys raise SchemeError."""
        _known(cls, data)
        return cls(**data)


@dataclass(frozen=True)
class Training:
    """How the weights of linear layers are trained: what their scheme does not say.

    Embeddings, output head and grids have measured scales and the identity, whatever this says.

    learned: scales are learned (BiViT, arXiv 2211.07091), with planes 2 those of two bases
        (BinaryDM, arXiv 2404.05662); else they are measured on the weight at every step.
    estimator: of the gradient of codes, one of train.estimators.ESTIMATORS.
    parameter: of the estimator; None: its own.
    unit: what weights are divided by before the estimator; None: mean|W| of each row.
    clip: no gradient where |W - mean| >= scale (TBT's paper form, arXiv 2306.01841); for measured
        scales.
    noise: FDA's learned noise beside its series (arXiv 2103.00841); for measured scales and the
        estimator fda.

    Raises SchemeError for values that are not allowed.
    """

    learned: bool = False
    estimator: str = "identity"
    parameter: float | None = None
    unit: float | None = None
    clip: bool = False
    noise: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.estimator, str):
            raise SchemeError(f"estimator is {self.estimator!r}: use the name of an estimator")
        for name in ("learned", "clip", "noise"):
            _true_or_false(self, name)
        for name in ("parameter", "unit"):
            if getattr(self, name) is not None:
                _number(self, name, float, 1e-9, 1e9)

    def to_dict(self) -> dict[str, Any]:
        """Return every field that is not at its default (JSON types only)."""
        return _changed(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Training:
        """Return the Training that `to_dict` wrote; unknown keys raise SchemeError."""
        _known(cls, data)
        return cls(**data)


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
    input: the quantizer that the layer's inputs go through first, trained with the model, or its
        dict. It is stored, and one that a kernel knows takes the place of `activation` float.

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
    input: Quantizer | None = None

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
            _true_or_false(self, name)
        _quantizer(self, "input")
        if self.input is not None and self.activation in LOW_BIT_ACTIVATIONS:
            raise SchemeError(f"activation is {self.activation!r}: the quantizer of the input says "
                              "which levels there are; use float, int16 or int8")
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
        _known(Scheme, changes)
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
        return {"method": self.method} | _changed(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        """Return the Scheme that `to_dict` wrote; unknown keys raise SchemeError."""
        _known(cls, data)
        return cls(**data)


def _known(cls: type, data: dict[str, Any]) -> None:
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            raise SchemeError(f"unknown {cls.__name__.lower()} key {key!r}: the keys are "
                              f"{', '.join(names)}")


def _changed(scheme: Scheme | Quantizer | Attention | Training) -> dict[str, Any]:
    """Return the fields that are not at their defaults, quantizers as dicts."""
    values = {f.name: getattr(scheme, f.name) for f in dataclasses.fields(scheme)
              if getattr(scheme, f.name) != f.default}
    return {name: value.to_dict() if isinstance(value, Quantizer) else value
            for name, value in values.items()}


def _quantizer(scheme: Scheme | Attention, field: str) -> None:
    """Let a field hold a Quantizer where it was given as a dict."""
    value = getattr(scheme, field)
    if isinstance(value, dict):
        object.__setattr__(scheme, field, Quantizer.from_dict(value))
    elif value is not None and not isinstance(value, Quantizer):
        raise SchemeError(f"{field} is {value!r}: use a Quantizer, its dict or None")


def _true_or_false(scheme: Scheme | Quantizer | Attention | Training, field: str) -> None:
    if not isinstance(getattr(scheme, field), bool):
        raise SchemeError(f"{field} is {getattr(scheme, field)!r}: use true or false")


def _one_of(scheme: Scheme | Quantizer, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(scheme, field)
    if value not in allowed:
        raise SchemeError(f"{field} is {value!r}: use one of {', '.join(allowed)}")


def _number(scheme: Scheme | Quantizer | Attention | Training, field: str, kind: type, low: float,
            high: float) -> None:
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
