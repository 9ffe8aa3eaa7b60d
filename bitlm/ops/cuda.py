"""The CUDA implementation of the ops: the native kernels, or the reference with a reason.

A call only allocates through torch and launches on the current stream, so it can be captured in a
CUDA graph once the weight has been used (cuda_terms.py looks at the tensors at the first call).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import Library

from . import cuda_check, cuda_launch, reference
from . import library as native
from .cuda_table import Settings
from .cuda_terms import terms
from .cuda_terms import unsupported as unsupported_form
from .form import Form, parse
from .structs import TYPES

# Why a card cannot run the kernels, None where it can.
_fitness: dict[torch.device, str | None] = {}
# Why a card that has products of sm_90a does not use them.
_not_used: dict[torch.device, str] = {}
_checking = threading.Lock()
# Why calls went to the reference, and how often: what `bitlm doctor` and tests ask for.
handed_back: dict[str, int] = {}


def unsupported(form: Form, dtype: torch.dtype) -> str | None:
    """Return why a weight of this form goes to the reference for inputs of `dtype`, or None."""
    reason = native.load("bitlm_cuda").reason
    if reason:
        return reason
    if dtype not in TYPES:
        return f"{str(dtype).removeprefix('torch.')} inputs have no kernel"
    return unsupported_form(form)


def register(library: Library) -> None:
    """Register the CUDA implementations with the op library, where there are kernels."""
    if native.load("bitlm_cuda").library is None:
        return
    library.impl("packed_linear", packed_linear, "CUDA")
    library.impl("packed_embedding", packed_embedding, "CUDA")
    library.impl("dequantize", dequantize, "CUDA")


def describe() -> dict[str, object]:
    """Return what `bitlm doctor` shows: the library and what is computed natively."""
    loaded = native.load("bitlm_cuda")
    facts: dict[str, object] = {"library": str(loaded.path) if loaded.library else None,
                                "reason": loaded.reason}
    if loaded.library:
        facts |= {"architectures": loaded.library.bitlm_cuda_architectures().decode(),
                  "native": "linear layers and experts of every form, and embeddings",
                  "reference": ["float64", "gradients", "embeddings with chains, low-rank terms, "
                                "column subsets or rank-k scales"]}
    return facts


# --- the ops -------------------------------------------------------------------------------------


def packed_linear(x: Tensor, tensors: list[Tensor], form: str, bias: Tensor | None = None,
                  offsets: Tensor | None = None, activation: str = "float",
                  step: Tensor | None = None) -> Tensor:
    """Return what reference.packed_linear does, natively when there is a kernel.

    A token with an infinity or NaN gives nothing finite. Many tokens of 16 bits are multiplied by
    floats (cuda_table.Settings), as a dense layer does it.
    """
    layout = parse(form)
    reason = unsupported(layout, x.dtype) or unfit(x.device)
    if reason:
        _note(reason)
        return reference.packed_linear(x, tensors, form, bias, offsets, activation, step)
    _must_be_on(x.device, [*tensors, bias])
    flat = x.reshape(-1, layout.columns).contiguous()
    with cuda_launch.on(x.device):
        y = cuda_launch.linear(flat, tensors, layout, bias, offsets, activation, step)
    return y.reshape(*x.shape[:-1], layout.rows)


def packed_embedding(ids: Tensor, tensors: list[Tensor], form: str, dtype: torch.dtype) -> Tensor:
    """Return rows `ids` of the weight; forms whose rows have other terms: reference."""
    layout = parse(form)
    reason = unsupported(layout, dtype) or cuda_launch.no_rows(layout) or unfit(ids.device)
    if reason or layout.experts:
        _note(reason or "rows of experts have no kernel")
        return reference.packed_embedding(ids, tensors, form, dtype)
    _must_be_on(ids.device, tensors)
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    with cuda_launch.on(ids.device):
        return cuda_launch.rows(terms(form, tensors), flat, flat.numel(), dtype).reshape(
            *ids.shape, layout.columns)


def dequantize(tensors: list[Tensor], form: str, dtype: torch.dtype) -> Tensor:
    """Return the dense weight; forms whose rows have other terms: reference."""
    layout = parse(form)
    reason = unsupported(layout, dtype) or cuda_launch.no_rows(layout) or unfit(tensors[0].device)
    if reason:
        _note(reason)
        return reference.dequantize(tensors, form, dtype)
    _must_be_on(tensors[0].device, tensors)
    with cuda_launch.on(tensors[0].device):
        return _dense(tensors, layout, dtype)


def _dense(tensors: list[Tensor], form: Form, dtype: torch.dtype) -> Tensor:
    rows = form.rows * (form.experts or 1)
    dense = cuda_launch.rows(terms(form.text, tensors), None, rows, dtype)
    return dense.view(*((form.experts,) if form.experts else ()), form.rows, form.columns)


def _must_be_on(device: torch.device, tensors: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError for a tensor on another device, whose address would mean nothing."""
    other = next((t.device for t in tensors if t is not None and t.device != device), None)
    if other:
        raise RuntimeError(f"expected all tensors on {device}, one is on {other}: move the model "
                           "or its inputs")


def unfit(device: torch.device) -> str | None:
    """Return why a card cannot run the kernels, or None. The first call on a card waits for it."""
    if device.type != "cuda":
        return None
    if device in _fitness:
        return _fitness[device]
    if torch.cuda.is_current_stream_capturing():
        return None  # nothing may wait here: it is the next call that tells
    with _checking:
        if device not in _fitness:
            major, minor = torch.cuda.get_device_capability(device)
            named = native.load("bitlm_cuda").library.bitlm_cuda_architectures().decode()
            unfit = _no_code(named, major, minor) or disagreement(device)
            if not unfit and cuda_launch.has_wide((major, minor)):
                _try_wide(device)
            _fitness[device] = unfit
    return _fitness[device]


def _try_wide(device: torch.device) -> None:
    """Let a card use its products of sm_90a if they are right; the others do its work if not."""
    asked_not = "BITLM_WGMMA=0" if os.environ.get("BITLM_WGMMA") == "0" else None
    fault = asked_not or disagreement(device, cuda_check.WIDE_CASES, cuda_check.WIDE_WAYS)
    if fault:
        _not_used[device] = fault
    else:
        cuda_launch.wide_cards.add(device)


def disagreement(device: torch.device, cases: Sequence[cuda_check.Case] = cuda_check.CASES,
                 ways: Sequence[cuda_check.Way] = cuda_check.WAYS) -> str | None:
    """Return how the kernels differ from the reference on a device, or None."""
    def linear(x: Tensor, tensors: list[Tensor], form: Form, offsets: Tensor | None,
               activation: str, settings: Settings) -> Tensor:
        return cuda_launch.linear(x, tensors, form, None, offsets, activation, None, settings)

    def dense(tensors: list[Tensor], form: Form) -> Tensor:
        return _dense(tensors, form, torch.float32)

    with cuda_launch.on(device), torch.no_grad():
        return cuda_check.disagreement(linear, dense, device, cases, ways)


def not_used(device: torch.device) -> str | None:
    """Return why kernels that a card could run are left out there, or None; after unfit."""
    return _not_used.get(device)


def _no_code(architectures: str, major: int, minor: int) -> str | None:
    """Machine code runs within its generation, and the newest one's PTX on all later cards; that
    of 90a is for its own card alone, and has no PTX."""
    names, card = architectures.split(), 10 * major + minor
    plain = [int(name) for name in names if name.isdigit()]
    if any(int(name.rstrip("af")) == card for name in names) or \
            any(own // 10 == major and own <= card for own in plain) or \
            (plain and plain[-1] <= card):
        return None
    return f"the CUDA kernels are built for {architectures}, this card has {card}"


def _note(reason: str) -> None:
    handed_back[reason] = handed_back.get(reason, 0) + 1
