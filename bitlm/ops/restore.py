"""Stored tensors back out of a prepared weight, bit for bit.

Codes and scales that a prepared weight holds as they were stored need not be kept beside it. What
`prepare` had to change (codes under salient entries, zones) cannot be read back and stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass

import torch
from torch import Tensor

from . import library, structs
from .structs import BLOCK_ROWS

Place = tuple[str, int]  # a stored tensor, and bytes from its start


@dataclass(frozen=True)
class CodesOrigin:
    """A matrix of codes at `offset` of the blob that holds these (slices of) stored tensors."""

    offset: int
    codes: structs.Codes
    signs: list[Place]
    mask: Place | None
    trits: Place | None

    def sizes(self) -> list[tuple[str, int]]:
        """Return the bytes that this gives back of each tensor."""
        columns, rows = self.codes.shape.columns, self.codes.rows
        found = [(name, rows * -(-columns // 8)) for name, _ in self.signs]
        found += [(self.mask[0], rows * -(-columns // 8))] if self.mask else []
        return found + ([(self.trits[0], rows * -(-columns // 5))] if self.trits else [])

    def write(self, blob: Tensor, to: dict[str, Tensor], threads: int) -> None:
        codes = structs.Codes(shape=self.codes.shape, rows=self.codes.rows, order=self.codes.order,
                              kind=self.codes.kind, bits=self.codes.bits,
                              trits_in_memory=self.codes.trits_in_memory)
        for i, (name, at) in enumerate(self.signs):
            codes.signs[i] = to[name].data_ptr() + at
        if self.mask:
            codes.mask = to[self.mask[0]].data_ptr() + self.mask[1]
        if self.trits:
            codes.trits = to[self.trits[0]].data_ptr() + self.trits[1]
        status = library.native().bitlm_unpack(blob.data_ptr() + self.offset, byref(codes), threads)
        if status:
            raise RuntimeError(f"the native library cannot unpack codes (status {status}); please "
                               "report this")


@dataclass(frozen=True)
class ValuesOrigin:
    """Values [rows, length] at `offset` of the blob, which has them as [blocks][length][64]."""

    name: str
    at: int
    offset: int
    rows: int
    length: int

    def write(self, blob: Tensor, to: dict[str, Tensor], threads: int) -> None:
        whole = to[self.name]
        blocks = -(-self.rows // BLOCK_ROWS)
        size = blocks * self.length * BLOCK_ROWS * whole.element_size()
        values = blob[self.offset:self.offset + size].view(whole.dtype).view(blocks, self.length,
                                                                             BLOCK_ROWS)
        first, count = self.at // whole.element_size(), self.rows * self.length
        whole.view(-1)[first:first + count] = values.transpose(1, 2).reshape(-1)[:count]


Origin = CodesOrigin | ValuesOrigin


def restorable(origins: Sequence[Origin], tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the tensors that `origins` give back whole."""
    sizes = dict.fromkeys(tensors, 0)
    for origin in origins:
        if isinstance(origin, CodesOrigin):
            for name, size in origin.sizes():
                sizes[name] += size
        else:
            sizes[origin.name] += origin.rows * origin.length * \
                tensors[origin.name].element_size()
    return [name for name, tensor in tensors.items()
            if sizes[name] == tensor.numel() * tensor.element_size() > 0]


def restore(blob: Tensor, origins: Sequence[Origin], like: dict[str, Tensor], threads: int = 1
            ) -> dict[str, Tensor]:
    """Return the stored tensors `like` (shapes and dtypes, maybe on meta) out of a blob."""
    whole = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in like.items()}
    for origin in origins:
        names = [name for name, _ in origin.sizes()] if isinstance(origin, CodesOrigin) else \
            [origin.name]
        if all(name in whole for name in names):
            origin.write(blob, whole, threads)
    return whole
