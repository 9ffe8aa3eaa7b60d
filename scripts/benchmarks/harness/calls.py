"""What a call costs: the op on a tiny weight, its kernel alone, an empty C call, a torch op."""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from bitlm.ops import library, structs

from .packed import Prepared, linear
from .timing import Calls


def engine(what: str, weight: Prepared, x: Tensor) -> Calls:
    """Return the engine "call WHAT" on a prepared weight."""
    native = library.load().library
    if what == "bitlm op":
        call = linear(weight.form, weight.copies[0], x, "int8")
    elif what == "bitlm kernel":
        y = x.new_empty(1, weight.form.rows)
        struct = structs.Linear(
            weight=weight.copies[0].data_ptr(), x=x.data_ptr(), y=y.data_ptr(), tokens=1,
            activation=structs.ACTIVATIONS.index("int8"), threads=1)
        call = partial(native.bitlm_cpu_linear, ctypes.addressof(struct))
        call.keep = struct, x, y
    elif what == "C function":
        call = native.bitlm_abi_version
    else:
        call = partial(torch.ops.aten.neg.default, x)
    return Calls(f"call {what}", 1, [call])
