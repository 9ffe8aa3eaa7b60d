"""The CPU implementation of `packed_linear`: the native kernel, or the reference with a reason."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from math import ceil

import torch
from torch import Tensor
from torch.library import Library

from . import library as native
from . import reference
from .form import TABLE, Form, kind, parse, planes

_MAX_PLANES = 8
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_BIAS_TYPES = (*_TYPES, torch.float64)
# struct bitlm_linear of bitlm.h: its head, and one of its planes.
_HEAD = struct.Struct("=4q4Q8i")
_PLANE = struct.Struct("=4Qif")
_TENSORS = ("plane.signs", "plane.mask", "plane.trits", "plane.scales", "shift")
_REASONS = {
    "plane.columns": "planes that cover some of the columns",
    "plane.zones": "planes with two zones of scales",
    "plane.row_scales": "scales of higher rank",
    "plane.column_scales": "scales of higher rank",
    "input_scales": "scaled inputs",
    "chain": "factorized chains",
    "low_rank": "low-rank terms",
    "salient": "salient entries",
}
_ALGORITHMS = {"auto": 0, "look-up": 1, "expand": 2}


@dataclass(frozen=True)
class _Layout:
    """Where each struct field of a form finds its tensor.

    planes: per plane the positions of signs, mask, trits and scales among the tensors (None:
    absent) and the factor of its scales. shapes, dtypes: what each tensor must be.
    """

    form: Form
    planes: tuple[tuple[int | None, int | None, int | None, int, float], ...]
    shift: int | None
    shapes: tuple[tuple[int, int], ...]
    dtypes: tuple[tuple[torch.dtype, ...], ...]


def unsupported(form: Form, dtype: torch.dtype) -> str | None:
    """Return why a weight of this form goes to the reference for inputs of `dtype`, or None."""
    return _no_library() or _unsupported_dtype(dtype) or _unsupported_form(form)


def describe() -> dict[str, object]:
    """Return what `bitlm doctor` shows: library, instruction set and what is computed natively."""
    loaded = native.load()
    return {
        "library": str(loaded.path) if loaded.library else None,
        "reason": loaded.reason,
        "instruction_set": native.instruction_set(),
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in _TYPES],
        "native": "packed_linear of 1 to 8 binary or ternary planes with group or row scales, "
                  "halving scales, shift and bias",
        "reference": [*dict.fromkeys(_REASONS.values()), "experts", "float64", "gradients",
                      "embeddings"],
    }


def register(library: Library) -> None:
    """Register the CPU implementation with the op library."""
    library.impl("packed_linear", packed_linear, "CPU")


def packed_linear(x: Tensor, tensors: list[Tensor], form: str, bias: Tensor | None = None,
                  offsets: Tensor | None = None, prepared: Tensor | None = None,
                  activation: str = "float", *, algorithm: str = "auto") -> Tensor:
    """Return x @ W.T + bias, natively when the form and dtypes are covered.

    x: float [..., K]. `algorithm` ("auto", "look-up", "expand") is for tests.
    """
    layout = _layout(form)
    x_type = _TYPES.get(x.dtype)
    if layout is None or x_type is None or (bias is not None and bias.dtype not in _BIAS_TYPES):
        return reference.packed_linear(x, tensors, form, bias, offsets, prepared, activation)
    weight = layout.form
    if x.shape[-1] != weight.columns:
        raise RuntimeError(f"the input has {x.shape[-1]} features, the weight {weight.columns}")
    tensors = _checked(layout, tensors)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], weight.rows))
    if not y.numel():
        return y
    bias_type = 0
    if bias is not None:
        if bias.shape != (weight.rows,):
            raise RuntimeError(f"the bias has shape {list(bias.shape)}, expected [{weight.rows}]")
        bias = (bias.float() if bias.dtype == torch.float64 else bias).contiguous()
        bias_type = _TYPES[bias.dtype]
    pointers = [tensor.data_ptr() for tensor in tensors]
    shift = layout.shift
    call = _HEAD.pack(
        weight.rows, weight.columns, weight.group_size, x.numel() // weight.columns,
        x.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if shift is None else pointers[shift], y.data_ptr(),
        x_type, bias_type, 0 if shift is None else _TYPES[tensors[shift].dtype], x_type,
        torch.get_num_threads(), _ALGORITHMS[algorithm], len(layout.planes), 0)
    for signs, mask, trits, scales, factor in layout.planes:
        call += _PLANE.pack(0 if signs is None else pointers[signs],
                            0 if mask is None else pointers[mask],
                            0 if trits is None else pointers[trits],
                            pointers[scales], _TYPES[tensors[scales].dtype], factor)
    # ctypes gives the GIL away meanwhile; the names above keep the tensors alive.
    status = native.load().library.bitlm_packed_linear(call)
    if status == 2:
        raise MemoryError("no memory for the tables of a packed linear; use a smaller batch")
    if status:
        raise RuntimeError(f"the native library refused a weight of form {form!r}; "
                           "please report this")
    return y


def _checked(layout: _Layout, tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, dense; raises when one is not what the kernel would read."""
    for position, (tensor, shape, dtypes) in enumerate(zip(tensors, layout.shapes, layout.dtypes,
                                                           strict=True)):
        if tensor.shape != shape or tensor.dtype not in dtypes:
            name = layout.form.names[position]
            raise RuntimeError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected "
                               f"{' or '.join(map(str, dtypes))} {list(shape)}")
        if not tensor.is_contiguous():
            tensors = [t.contiguous() for t in tensors]
    return tensors


def _no_library() -> str | None:
    return native.load().reason


def _unsupported_dtype(dtype: torch.dtype) -> str | None:
    if dtype in _TYPES:
        return None
    return f"{str(dtype).removeprefix('torch.')} inputs have no kernel"


@cache
def _unsupported_form(form: Form) -> str | None:
    if form.experts:
        return "experts have no kernel yet"
    for name in form.names:
        key = kind(name)
        if key not in _TENSORS:
            what = _REASONS.get(key) or _REASONS.get(key.split(".")[0], name)
            return f"{what} have no kernel yet"
    numbers = planes(form.names)
    if not 1 <= len(numbers) <= _MAX_PLANES:
        return f"{len(numbers)} planes have no kernel, 1 to {_MAX_PLANES} have"
    for number in numbers:
        names = [name for name in form.names if name.startswith(f"plane{number}.")]
        shared = form.plane_ratio != 1 and number != 0
        codes = {name.split(".")[1] for name in names} - {"scales"}
        if codes not in ({"signs"}, {"signs", "mask"}, {"trits"}):
            return f"plane {number} has neither signs nor trits"
        if not shared and f"plane{number}.scales" not in names:
            return f"plane {number} has no scales"
    if form.plane_ratio != 1 and numbers[0] != 0:
        return "plane 0, which has the scales, is missing"
    return None


@cache
def _layout(text: str) -> _Layout | None:
    """Return where the tensors of a form go, or None when it goes to the reference."""
    form = parse(text)
    if _no_library() or _unsupported_form(form):
        return None
    place = {name: position for position, name in enumerate(form.names)}
    layouts = []
    for number in planes(form.names):
        shared = form.plane_ratio != 1 and number != 0
        codes = (place.get(f"plane{number}.{part}") for part in ("signs", "mask", "trits"))
        layouts.append((*codes, place[f"plane{0 if shared else number}.scales"],
                        float(form.plane_ratio) ** -number if shared else 1.0))
    widths = {"plane.signs": ceil(form.columns / 8), "plane.mask": ceil(form.columns / 8),
              "plane.trits": ceil(form.columns / 5), "plane.scales": form.groups,
              "shift": form.groups}
    shapes = tuple((form.rows, widths[kind(name)]) for name in form.names)
    dtypes = tuple(TABLE[kind(name)].dtypes for name in form.names)
    return _Layout(form, tuple(layouts), place.get("shift"), shapes, dtypes)
