"""The CPU implementation of the ops: the native kernels, or the reference with a reason."""

from __future__ import annotations

import struct
from collections.abc import Callable
from ctypes import c_int32
from functools import lru_cache

import torch
from torch import Tensor
from torch.library import Library

from . import binding, cache, reference, structs, tune
from . import library as native
from .form import Form, parse
from .prepare import prepare
from .structs import ACTIVATIONS, NO_MEMORY, OK, TYPES, WRONG_ORDER

# struct bitlm_linear: six pointers, the tokens, and three types, activation, threads, 0.
_LINEAR = struct.Struct("=6Qq6i")
_ACTIVATION_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
# Of struct bitlm_weight: experts, parts, rows, columns.
_Sizes = c_int32 * 4
_SIZES_AT = structs.Weight.experts.offset
_modes = torch._C._len_torch_dispatch_stack
_profiled = torch.autograd._profiler_enabled
_tracing = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack
_DTYPES = tuple(str(dtype).removeprefix("torch.") for dtype in TYPES)


class WrongOrderError(RuntimeError):
    """A weight prepared for an instruction set that is no longer the one in use."""


def unsupported(form: Form, dtype: torch.dtype) -> str | None:
    """Return why a weight of this form goes to the reference for inputs of `dtype`, or None."""
    reason = native.load().reason
    if reason:
        return reason
    if dtype not in TYPES:
        return f"{str(dtype).removeprefix('torch.')} inputs have no kernel"
    return None


def takes(x: Tensor, bias: Tensor | None) -> bool:
    """Tell whether `prepared_linear` can do a call: on the CPU, without gradients or autocast."""
    if not x.is_cpu or x.dtype not in TYPES or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.is_grad_enabled() or not (
        x.requires_grad or bias is not None and bias.requires_grad)


def describe() -> dict[str, object]:
    """Return what `bitlm doctor` shows: library, instruction set and what is computed natively."""
    loaded = native.load()
    facts: dict[str, object] = {
        "library": str(loaded.path) if loaded.library else None,
        "reason": loaded.reason,
        "instruction_set": native.instruction_set(),
        "dtypes": list(_DTYPES),
        "native": "linear layers, experts and embeddings of every form",
        "reference": ["float64", "gradients", "embeddings with chains or low-rank terms"],
    }
    if loaded.library:
        facts |= {
            "order": "a dword a row" if loaded.library.bitlm_cpu_order() else "a byte a row",
            "binding": "libtorch's C interface" if _unbound is None else f"Python ({_unbound})",
            "kernels": tune.choices(native.instruction_set()),
        }
    return facts


_unbound: str | None = "there is no native library"  # why Python stands between torch and kernels


def register(library: Library, schema: str) -> None:
    """Register the CPU implementations with the op library. schema: of `prepared_linear`."""
    global _unbound
    if not native.load().reason:
        _unbound = binding.register(schema, library, _same_as_here)
    if _unbound is not None:
        library.impl("prepared_linear", prepared_linear, "CPU")
    library.impl("packed_linear", packed_linear, "CPU")
    library.impl("packed_embedding", packed_embedding, "CPU")


def _same_as_here(op: Callable[..., Tensor]) -> bool:
    """Try an op of the schema of `prepared_linear` on a small weight, with and without options."""
    form = Form(3, 40, ("plane0.signs", "plane0.scales"), 32)
    signs = torch.arange(15, dtype=torch.uint8).reshape(3, 5).mul_(37)
    scales = torch.tensor([[1.0, 2.0], [0.5, 1.5], [3.0, 0.25]], dtype=torch.float16)
    weight, _ = prepare(form, [signs, scales], native.native().bitlm_cpu_order())
    x = torch.linspace(-1, 1, 160).reshape(40, 2, 2).permute(2, 1, 0)  # three axes, not dense
    bias = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for dtype, activation in ((torch.float32, 0), (torch.float32, 2), (torch.bfloat16, 0)):
        given = x.to(dtype)
        for own in (None, bias):
            if not torch.equal(op(given, weight, 3, own, None, None, activation),
                               prepared_linear(given, weight, 3, own, None, None, activation)):
                return False
    return True


def call(x: Tensor, weight: Tensor, rows: int, bias: Tensor | None, offsets: Tensor | None,
         activation: int) -> Tensor:
    """Call the op `prepared_linear`, past torch's dispatcher where nobody listens there.

    Only where Python stands between the dispatcher and the kernel: then both cost 3 us more.
    """
    if _unbound and type(x) is Tensor and not _modes() and not _profiled() and \
            _tracing() is None and _transforms() is None:
        return prepared_linear(x, weight, rows, bias, offsets, None, activation)
    return _op()(x, weight, rows, bias, offsets, None, activation)


@lru_cache(maxsize=1)
def _op() -> Callable[..., Tensor]:
    """Return the op without the Python around it, which finds it anew in every call."""
    return torch.ops.bitlm.prepared_linear.default._op


def prepared_linear(x: Tensor, weight: Tensor, rows: int, bias: Tensor | None = None,
                    offsets: Tensor | None = None, step: Tensor | None = None,
                    activation: int = 0) -> Tensor:
    """Return x @ W.T + bias for a prepared weight (prepare.py).

    x: float32, float16 or bfloat16 [..., K]. activation: a number of structs.ACTIVATIONS. The rest
    is as in reference.packed_linear. Raises WrongOrderError when the weight must be prepared again.
    """
    x_type = TYPES.get(x.dtype)
    if x_type is None:
        raise RuntimeError(f"a prepared weight takes {', '.join(_DTYPES)}, not {x.dtype}")
    address = weight.data_ptr()
    experts, _, real_rows, columns = _Sizes.from_address(address + _SIZES_AT)
    *lead, features = x.shape
    if features != columns or rows != real_rows:
        raise RuntimeError(f"the input has {features} features and {rows} are asked for; the "
                           f"weight is [{real_rows}, {columns}]")
    x = x.contiguous()
    lead.append(rows)
    y = x.new_empty(lead)
    tokens = x.numel() // columns
    if not tokens:
        return y
    bias_at = bias_type = offsets_at = step_at = 0
    if bias is not None:
        bias = _bias(bias, rows, experts)
        bias_at, bias_type = bias.data_ptr(), TYPES[bias.dtype]
    if experts:
        offsets = _offsets(offsets, experts)
        offsets_at = offsets.data_ptr()
    if step is not None:
        step = step.to(torch.float32).contiguous()
        step_at = step.data_ptr()
    # ctypes gives the GIL away meanwhile; the names above keep the tensors alive.
    status = native.load().library.bitlm_cpu_linear(_LINEAR.pack(
        address, x.data_ptr(), bias_at, y.data_ptr(), offsets_at, step_at, tokens, x_type,
        bias_type, x_type, activation, torch.get_num_threads(), 0))
    if status != OK:
        _raise(status)
    return y


def packed_linear(x: Tensor, tensors: list[Tensor], form: str, bias: Tensor | None = None,
                  offsets: Tensor | None = None, activation: str = "float",
                  step: Tensor | None = None) -> Tensor:
    """Return what reference.packed_linear does, natively when there is a kernel."""
    if unsupported(parse(form), x.dtype):
        return reference.packed_linear(x, tensors, form, bias, offsets, activation, step)
    number = _ACTIVATION_NUMBERS[activation]
    while True:
        weight = cache.prepared(form, tensors)
        try:
            return prepared_linear(x, weight.blob, weight.form.rows, bias, offsets, step, number)
        except WrongOrderError:
            cache.forget(weight)


def packed_embedding(ids: Tensor, tensors: list[Tensor], form: str, dtype: torch.dtype) -> Tensor:
    """Return rows `ids` of the weight; forms whose rows have no terms of their own: reference."""
    layout = parse(form)
    staged = any(name.startswith(("chain", "low_rank")) for name in layout.names)
    if staged or layout.experts or layout.parts != 1 or unsupported(layout, dtype):
        return reference.packed_embedding(ids, tensors, form, dtype)
    weight = cache.prepared(form, tensors)
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    out = torch.empty((*ids.shape, layout.columns), dtype=dtype)
    if not flat.numel():
        return out
    status = native.load().library.bitlm_cpu_rows(
        weight.blob.data_ptr(), flat.data_ptr(), flat.numel(), out.data_ptr(), TYPES[dtype])
    if status != OK:
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= layout.rows:
            raise IndexError(f"ids from {low} to {high}, but the embedding has {layout.rows} rows")
        _raise(status)
    return out


def _bias(bias: Tensor, rows: int, experts: int) -> Tensor:
    if bias.numel() != rows * (experts or 1) or bias.ndim != 1 + (experts > 0):
        wanted = (experts, rows) if experts else (rows,)
        raise RuntimeError(f"the bias has shape {list(bias.shape)}, expected {list(wanted)}")
    return (bias if bias.dtype in TYPES else bias.float()).contiguous()


def _offsets(offsets: Tensor | None, experts: int) -> Tensor:
    if offsets is None or offsets.shape != (experts,):
        raise RuntimeError(f"a weight of {experts} experts needs {experts} offsets")
    return offsets.to(torch.int32).contiguous()


def _raise(status: int) -> None:
    if status == WRONG_ORDER:
        raise WrongOrderError("the weight was prepared for another instruction set than the one "
                              "in use: prepare it again")
    if status == NO_MEMORY:
        raise MemoryError("no memory for the tables of a packed linear; use a smaller batch")
    raise RuntimeError(f"the native library refused a call (status {status}); please report this")
