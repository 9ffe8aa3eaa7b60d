"""bitlm's own engines: a prepared weight in copies, products with it, and reading its bytes."""

from __future__ import annotations

import ctypes
from functools import partial
from math import ceil

import torch
from torch import Tensor

from bitlm import ops
from bitlm.ops import library
from bitlm.ops.arena import Arena
from bitlm.ops.form import Form
from bitlm.ops.prepare import prepare
from bitlm.ops.structs import ACTIVATIONS

from .forms import random_form
from .timing import Calls

ERRORS = {"float": 1e-5, "int16": 1e-4}  # what a mode promises


class Prepared:
    """A random weight as the kernels read it, in `cold_bytes` of copies (at least one)."""

    def __init__(self, name: str, rows: int, columns: int, cold_bytes: int) -> None:
        self.name = name
        self.form, self.tensors = random_form(name, rows, columns)
        first, _ = prepare(self.form, self.tensors, library.native().bitlm_cpu_order())
        arena = Arena()
        self.copies = [first]
        for _ in range(ceil(cold_bytes / first.nbytes) - 1):
            self.copies.append(arena.allocate(first.nbytes).copy_(first))

    @property
    def nbytes(self) -> int:
        return self.copies[0].nbytes

    def product(self, activation: str, x: Tensor) -> Calls:
        calls = [linear(self.form, copy, x, activation) for copy in self.copies]
        return Calls(f"bitlm {self.name} {activation}", x.shape[0], calls)

    def read(self, threads: int) -> Calls:
        """A pass that only reads the bytes."""
        function = library.load().library.bitlm_cpu_read
        calls = [partial(function, ctypes.c_void_p(copy.data_ptr()), ctypes.c_int64(copy.nbytes),
                         threads) for copy in self.copies]
        return Calls(f"read {self.name}", 1, calls)

    def prepare(self, threads: int) -> Calls:
        """Bring the stored tensors into kernel order, as loading a model does."""
        order = library.native().bitlm_cpu_order()
        return Calls(f"prepare {self.name}", 1,
                     [partial(prepare, self.form, self.tensors, order, threads)])

    def error(self, activation: str) -> float:
        """Return the relative error (RMS) of a product against the weight in float64."""
        x = torch.randn(4, self.form.columns)
        dense = ops.dequantize(self.tensors, self.form.text, torch.float64)
        exact = x.double() @ dense.T
        found = linear(self.form, self.copies[-1], x, activation)()
        return ((found - exact).norm() / exact.norm()).item()


def linear(form: Form, prepared: Tensor, x: Tensor, activation: str) -> partial[Tensor]:
    """Return the call that a packed layer makes."""
    return partial(torch.ops.bitlm.prepared_linear.default, x, prepared, form.rows, None, None,
                   None, ACTIVATIONS.index(activation))
