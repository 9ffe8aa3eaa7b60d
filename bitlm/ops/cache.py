"""Prepared weights by the stored tensors that they were made from.

A prepared weight belongs to its tensors, not to a module: tied weights share it, and it goes with
the first of them, or is made anew when one of them is changed in place or is another tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import library, tune
from .form import Form, check, parse
from .prepare import prepare


class OfTensors:
    """Something that was made from tensors and stands for them, without keeping them."""

    def remember(self, tensors: Sequence[Tensor]) -> None:
        """Take these for the tensors that it was made from."""
        self.sources = [(weakref.ref(tensor), version(tensor)) for tensor in tensors]
        self.addresses = [tensor.data_ptr() for tensor in tensors]

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether these are its tensors, or others over the same memory, still unchanged."""
        if len(tensors) != len(self.sources):
            return False
        for tensor, (source, at), address in zip(tensors, self.sources, self.addresses,
                                                 strict=True):
            own = source()
            if own is None or version(own) != at or tensor.data_ptr() != address or \
                    own.data_ptr() != address or tensor.shape != own.shape:
                return False
        return True


class Prepared(OfTensors):
    """A prepared weight (prepare.py) and the tensors that it stands for."""

    def __init__(self, form: Form, tensors: Sequence[Tensor]) -> None:
        must_fit(form, tensors)
        self.form = form
        self.order = library.native().bitlm_cpu_order()
        tune.ensure(library.instruction_set())
        self.blob, self.origins = prepare(form, tensors, self.order, torch.get_num_threads())
        self.remember(tensors)


_known: dict[int, Prepared] = {}  # by the address of the first tensor


def prepared(text: str, tensors: Sequence[Tensor]) -> Prepared:
    """Return the prepared weight of tensors on the CPU; makes it at the first call.

    Raises RuntimeError naming every tensor that does not fit the form, ValueError for a damaged
    salient list.
    """
    address = tensors[0].data_ptr()
    found = _known.get(address)
    if found is None or found.form is not parse(text) or not found.is_of(tensors):
        with undisturbed():
            found = Prepared(parse(text), tensors)
            put(found, tensors)
    return found


def put(entry: Prepared, tensors: Sequence[Tensor]) -> None:
    """Keep a prepared weight for as long as the first of its tensors lives."""
    address = tensors[0].data_ptr()
    _known[address] = entry
    known = weakref.ref(entry)
    weakref.finalize(tensors[0], _forget, address, known).atexit = False


def forget(entry: Prepared) -> None:
    """Drop a prepared weight; the next call makes it anew."""
    _forget(entry.addresses[0], weakref.ref(entry))


def _forget(address: int, entry: weakref.ref[Prepared]) -> None:
    found = entry()
    if found is not None and _known.get(address) is found:
        del _known[address]


def must_fit(form: Form, tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError naming every tensor that does not fit the form."""
    problems = check(form, {n: tuple(t.shape) for n, t in zip(form.names, tensors)},
                     {n: t.dtype for n, t in zip(form.names, tensors)})
    if problems:
        raise RuntimeError("; ".join(problems))


def version(tensor: Tensor) -> int:
    """Return how often a tensor was written to; tensors of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def undisturbed() -> Iterator[None]:
    """Make ordinary tensors on the CPU, whatever modes and transforms the caller runs under."""
    with torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch(), _disable_current_modes(), \
            torch.inference_mode(False), torch.no_grad():
        yield
