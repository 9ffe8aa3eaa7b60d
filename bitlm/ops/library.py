"""Finds and loads the compiled libraries; says why when there is none."""

from __future__ import annotations

import ctypes
import sys
from ctypes import POINTER, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import structs

INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "amx")

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
_PREFIX = "" if sys.platform == "win32" else "lib"


@dataclass(frozen=True)
class Interface:
    """A library's interface: its version, and of every function the result and the arguments.

    missing: why there may be no such library.
    """

    version: int
    version_function: str
    functions: dict[str, tuple]
    missing: str


_LAUNCH = (c_int, c_void_p, c_void_p)  # a struct and a stream
CPU = Interface(2, "bitlm_abi_version", {  # native/bitlm.h
    "bitlm_cpu_instruction_set": (c_char_p,),
    "bitlm_cpu_order": (c_int,),
    "bitlm_cpu_limit_instruction_set": (c_int, c_int),
    "bitlm_cpu_prefer": (c_int, c_int, c_int64, c_int),
    "bitlm_cpu_read": (c_int, c_void_p, c_int64, c_int),
    "bitlm_cpu_linear": (c_int, c_void_p),
    "bitlm_cpu_rows": (c_int, c_void_p, c_void_p, c_int64, c_void_p, c_int),
    "bitlm_codes_bytes": (c_int64, POINTER(structs.Codes)),
    "bitlm_repack": (c_int, POINTER(structs.Codes), c_void_p, c_int),
    "bitlm_unpack": (c_int, c_void_p, POINTER(structs.Codes), c_int),
    "bitlm_torch_register": (c_int, c_void_p, c_char_p, c_char_p),
    "bitlm_salient": (c_int64, c_void_p, c_void_p, c_int64, POINTER(structs.Shape), c_void_p,
                      c_void_p),
}, "there is no compiled library beside the package; reinstall bitlm on a machine with a C++17 "
   "compiler")
CUDA = Interface(3, "bitlm_cuda_abi_version", {  # native/bitlm_cuda.h
    "bitlm_cuda_stage": _LAUNCH,
    "bitlm_cuda_product_launch": _LAUNCH,
    "bitlm_cuda_few_launch": _LAUNCH,
    "bitlm_cuda_order_launch": _LAUNCH,
    "bitlm_cuda_many_launch": _LAUNCH,
    "bitlm_cuda_wide_launch": _LAUNCH,
    "bitlm_cuda_combine_launch": _LAUNCH,
    "bitlm_cuda_thin_launch": _LAUNCH,
    "bitlm_cuda_salient_launch": _LAUNCH,
    "bitlm_cuda_rows_launch": _LAUNCH,
    "bitlm_cuda_error_name": (c_char_p, c_int),
    "bitlm_cuda_error_text": (c_char_p, c_int),
    "bitlm_cuda_architectures": (c_char_p,),
}, "there is no compiled CUDA library beside the package; reinstall bitlm on a machine with nvcc "
   "(scripts/setup.sh builds it only where there is a card)")


@dataclass(frozen=True)
class Loaded:
    """A library and where it is, or the reason why there is none."""

    library: ctypes.CDLL | None
    path: Path | None
    reason: str | None


@cache
def load(name: str = "bitlm_cpu") -> Loaded:
    """Load the library `name` that lies beside the package; never raises."""
    interface = CUDA if name == "bitlm_cuda" else CPU
    path = _find(f"{_PREFIX}{name}{_SUFFIX}")
    if path is None:
        return Loaded(None, None, interface.missing)
    return load_file(path, interface)


def load_file(path: Path, interface: Interface) -> Loaded:
    """Load a library of this interface; never raises."""
    try:
        library = ctypes.CDLL(str(path))
        version = getattr(library, interface.version_function)()
    except (OSError, AttributeError) as error:
        return Loaded(None, path, f"{path} cannot be loaded ({error}); reinstall bitlm")
    if version != interface.version:
        return Loaded(None, path, f"{path} has interface version {version}, this bitlm needs "
                                  f"{interface.version}; reinstall bitlm")
    for function, (result, *arguments) in interface.functions.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return Loaded(library, path, None)


def native() -> ctypes.CDLL:
    """Return the library; raises RuntimeError with the reason when there is none."""
    loaded = load()
    if loaded.library is None:
        raise RuntimeError(loaded.reason)
    return loaded.library


def _find(file: str) -> Path | None:
    """Search the whole package path: an editable install has the library in site-packages."""
    import bitlm

    for folder in bitlm.__path__:
        path = Path(folder) / file
        if path.is_file():
            return path
    return None


def instruction_set() -> str | None:
    """Return the instruction set that the CPU kernels use, None without a library."""
    library = load().library
    return library.bitlm_cpu_instruction_set().decode() if library else None


def limit_instruction_set(name: str | None) -> str | None:
    """Use at most `name` (one of INSTRUCTION_SETS; None: no limit) and return what is then used.

    On ARM "scalar" is NEON. What is prepared for another order of codes is prepared again.
    """
    library = load().library
    if library is None:
        return None
    library.bitlm_cpu_limit_instruction_set(-1 if name is None else INSTRUCTION_SETS.index(name))
    return instruction_set()
