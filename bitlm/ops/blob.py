"""The memory of a prepared weight while it is laid out: every array gets its place, then all are
written at once.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import library, structs
from .arena import Arena
from .restore import CodesOrigin, Origin, ValuesOrigin
from .structs import BLOCK_ROWS, DWORDS, TERNARY

_arena = Arena()


class Blob:
    """The arrays of a prepared weight, each with its place, before there is memory for them."""

    def __init__(self, head: int, order: int) -> None:
        self.order = order
        self.size = 0
        self._arrays: list[tuple[int, Tensor | bytes]] = []
        self._codes: list[tuple[int, structs.Codes, list[Tensor]]] = []
        # Of the tensors that lie in the file as they are, by id: name and place in the whole one.
        self.stored: dict[int, tuple[str, int]] = {}
        self.origins: list[Origin] = []
        self._place(head)

    def array(self, values: Tensor) -> int:
        """Return the offset at which `values` will lie; 0 when there are none."""
        if not values.numel():
            return 0
        values = values.contiguous()
        offset = self._place(values.numel() * values.element_size())
        self._arrays.append((offset, values))
        return offset

    def structs(self, items: list) -> int:
        """Return the offset of an array of structs; 0 when there are none."""
        if not items:
            return 0
        data = b"".join(map(bytes, items))
        offset = self._place(len(data))
        self._arrays.append((offset, data))
        return offset

    def by_row(self, values: Tensor) -> int:
        """Return the offset of values [N, G] as [blocks][G][64]."""
        offset = self.array(padded(values).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2))
        if id(values) in self.stored:
            self.origins.append(ValuesOrigin(*self.stored[id(values)], offset, *values.shape))
        return offset

    def codes(self, kind: int, rows: int, shape: structs.Shape, signs: Sequence[Tensor] = (),
              mask: Tensor | None = None, trits: Tensor | None = None, base_3: bool = False
              ) -> tuple[int, int]:
        """Return the offset of a matrix of codes and whether it is in base 3."""
        base_3 = base_3 and self.order == DWORDS
        given = [*signs, *(t for t in (mask, trits) if t is not None)]
        keep = [tensor.contiguous() for tensor in given]
        codes = structs.Codes(shape=shape, rows=rows, order=self.order, kind=kind,
                              bits=2 if kind == TERNARY else len(signs), trits_in_memory=base_3)
        for i in range(len(signs)):
            codes.signs[i] = keep[i].data_ptr()
        if mask is not None:
            codes.mask = keep[len(signs)].data_ptr()
        if trits is not None:
            codes.trits = keep[-1].data_ptr()
        offset = self._place(library.native().bitlm_codes_bytes(byref(codes)))
        if rows:
            self._codes.append((offset, codes, keep))
        if all(id(tensor) in self.stored for tensor in given):
            self.origins.append(CodesOrigin(
                offset, codes, [self.stored[id(t)] for t in signs],
                self.stored[id(mask)] if mask is not None else None,
                self.stored[id(trits)] if trits is not None else None))
        return offset, int(base_3)

    def write(self, head: structs.Weight, subs: list[structs.Sub], threads: int) -> Tensor:
        head.bytes = self.size
        self._arrays.append((0, b"".join(map(bytes, (head, *subs)))))
        memory = _arena.allocate(self.size)
        for offset, values in self._arrays:
            if isinstance(values, bytes):
                ctypes.memmove(memory.data_ptr() + offset, values, len(values))
            else:
                memory[offset:offset + values.numel() * values.element_size()] = \
                    values.flatten().view(torch.uint8)
        for offset, codes, _ in self._codes:
            status = library.native().bitlm_repack(byref(codes), memory.data_ptr() + offset,
                                                   threads)
            if status:
                raise RuntimeError(f"the native library cannot repack codes (status {status}); "
                                   "please report this")
        return memory

    def _place(self, size: int) -> int:
        offset = self.size
        self.size += -(-size // structs.ALIGNMENT) * structs.ALIGNMENT
        return offset


def padded(values: Tensor) -> Tensor:
    """Pad the rows to whole blocks of 64."""
    missing = -len(values) % BLOCK_ROWS
    return pad(values, (0, 0) * (values.ndim - 1) + (0, missing)) if missing else values
