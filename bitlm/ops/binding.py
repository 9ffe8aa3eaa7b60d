"""The short way from torch's dispatcher to the kernel: libtorch's C interface, without Python.

torch offers C functions for kernels that do not depend on its headers. They are looked up in the
loaded torch and handed to the native library, which registers `prepared_linear` through them. Where
one is missing, or a call does not give what it should, Python and ctypes do the same, slower.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch.library import Library

from . import library as native

# Those of struct Torch in native/torch_binding.cpp; the last three may be missing, see there.
_NEEDED = (
    "aoti_torch_library_init_impl", "aoti_torch_library_impl", "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim", "aoti_torch_get_sizes", "aoti_torch_get_numel", "aoti_torch_get_dtype",
    "aoti_torch_is_contiguous", "aoti_torch_empty_strided", "aoti_torch_copy_",
    "aoti_torch_delete_tensor_object",
)
_OPTIONAL = "torch_delete_stable_ivalue", "torch_get_num_threads", "_ZN2at15get_num_threadsEv"
_PROBE = "probe"  # an op of the same schema, registered first and tried


def register(schema: str, probe_library: Library, check) -> str | None:
    """Register `prepared_linear` through the C interface; return why not, or None.

    schema: of the op, "prepared_linear(...)". check(op) raises or returns False when the op does
    not do what it should; it is tried under another name first.
    """
    try:
        table = _functions()
        probe_library.define(schema.replace("prepared_linear", _PROBE, 1))
        _register(table, _PROBE)
        if not check(torch.ops.bitlm.probe):
            return "a call through torch's C interface gave a wrong result"
        _register(table, "prepared_linear")
    except (OSError, AttributeError, RuntimeError) as error:
        return f"torch's C interface cannot be used ({error})"
    return None


@cache
def _functions() -> ctypes.Array:
    """Return the addresses for struct Torch; raises AttributeError naming one that is missing."""
    # torch's own extension is linked to libtorch_cpu, so its symbols are found through it.
    torch_library = ctypes.CDLL(torch._C.__file__)
    found = [_address(torch_library, name) for name in _NEEDED]
    for name, address in zip(_NEEDED, found):
        if not address:
            raise AttributeError(f"{name} is not in torch {torch.__version__}")
    optional = [_address(torch_library, name) for name in _OPTIONAL]
    if not any(optional[1:]):
        raise AttributeError(f"torch {torch.__version__} does not tell its number of threads")
    return (ctypes.c_void_p * (len(found) + len(optional)))(*found, *optional)


def _address(library: ctypes.CDLL, name: str) -> int | None:
    function = getattr(library, name, None)
    return ctypes.cast(function, ctypes.c_void_p).value if function else None


def _register(table: ctypes.Array, name: str) -> None:
    status = native.native().bitlm_torch_register(table, b"bitlm", name.encode())
    if status:
        raise RuntimeError(f"torch refused to register {name}")
