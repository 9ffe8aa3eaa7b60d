"""A prepared weight read back by its description in native/bitlm.h, in plain torch and float64.

Not by the library: this is the other half of what prepare.py writes.
"""

from __future__ import annotations

from ctypes import sizeof

import torch
from torch import Tensor

from bitlm.ops import structs
from bitlm.ops.structs import BINARY, BYTES, GRID, TERNARY

DTYPES = {0: torch.float32, 1: torch.float16, 2: torch.bfloat16}


def dense(blob: Tensor) -> Tensor:
    """Return the dense weight as float64 [N, K], or [E, N, K]."""
    head = _read(blob, structs.Weight, 0)
    assert head.magic == structs.MAGIC and head.bytes == len(blob)
    whole = torch.zeros(head.experts or 1, head.rows, head.columns, dtype=torch.float64)
    for expert in range(len(whole)):
        for part in range(head.parts):
            number = expert * head.parts + part
            sub = _read(blob, structs.Sub, sizeof(structs.Weight) + number * sizeof(structs.Sub))
            assert sub.columns == head.columns
            whole[expert, sub.row:sub.row + sub.rows] += _sub(blob, sub, head.order)
    return whole if head.experts else whole[0]


def count(blob: Tensor, what: str) -> int:
    """Return how many of `what` (matrices, denses, ..) all sub-weights have together."""
    head = _read(blob, structs.Weight, 0)
    return sum(getattr(_read(blob, structs.Sub, sizeof(structs.Weight) + i * sizeof(structs.Sub)),
                       what) for i in range((head.experts or 1) * head.parts))


def _sub(blob: Tensor, sub: structs.Sub, order: int) -> Tensor:
    inputs = _all(blob, structs.Input, sub.input, sub.inputs)
    lengths = _values(blob, sub.stage_lengths, (sub.stages,), torch.int32).tolist()
    # Everything is linear in x: what it does to the unit vectors, each a row.
    x = torch.eye(sub.columns, dtype=torch.float64)
    stages: list[Tensor | None] = [None] * sub.stages
    for item in _all(blob, structs.Projection, sub.projection, sub.projections):
        assert (item.columns, item.length) == (sub.columns, lengths[item.stage])
        values = _values(blob, item.values, (item.length, item.columns), DTYPES[item.type])
        stages[item.stage] = _scaled(blob, item.scales, x) @ values.double().T
    y = torch.zeros(sub.columns, sub.rows, dtype=torch.float64)
    for matrix in _all(blob, structs.Matrix, sub.matrix, sub.matrices):
        product = _matrix(blob, matrix, inputs[matrix.input], x, stages, order)
        if matrix.output >= 0:
            assert stages[matrix.output] is None and lengths[matrix.output] == matrix.rows
            stages[matrix.output] = product
        else:
            assert matrix.rows == sub.rows
            y += product
    for item in _all(blob, structs.Dense, sub.dense, sub.denses):
        if item.input >= 0:
            read = inputs[item.input]
            assert read.rank == 1 and read.shape.groups == item.length
            source = _input(blob, read, x, stages)[0] @ _one_hot(_groups(read.shape), item.length)
        else:
            source = stages[item.stage]
        y += source @ _by_row(blob, item.values, sub.rows, item.length, item.type).T
    for item in _all(blob, structs.List, sub.list, sub.lists):
        source = _input(blob, inputs[item.input], x, stages)[0]
        y += source @ _list(blob, item, sub.rows, inputs[item.input].shape).T
    return y.T


def _input(blob: Tensor, read: structs.Input, x: Tensor, stages: list[Tensor | None]
           ) -> list[Tensor]:
    """Return the rank inputs [.., columns] that this makes of x or of a stage."""
    source = x if read.source < 0 else stages[read.source]
    found = []
    for j in range(read.rank):
        scales = read.scales and read.scales + 4 * j * source.shape[-1]
        own = _scaled(blob, scales, source)
        if read.columns:
            own = own[:, _values(blob, read.columns, (read.shape.columns,), torch.int32).long()]
        assert own.shape[-1] == read.shape.columns
        found.append(own)
    return found


def _matrix(blob: Tensor, matrix: structs.Matrix, read: structs.Input, x: Tensor,
            stages: list[Tensor | None], order: int) -> Tensor:
    rows, shape = matrix.rows, read.shape
    codes = decode(blob[matrix.codes:], order, matrix.kind, matrix.bits, bool(matrix.trits), shape,
                   rows).double()
    if matrix.scales:
        assert read.rank == 1
        scales = _by_row(blob, matrix.scales, rows, shape.groups, matrix.scale_type)
        codes = codes * scales[:, _groups(shape)]
    padded = -(-rows // 64) * 64
    total = torch.zeros(x.shape[0], rows, dtype=torch.float64)
    for j, own in enumerate(_input(blob, read, x, stages)):
        term = own @ codes.T
        if matrix.row_scales:
            term *= _values(blob, matrix.row_scales + 4 * j * padded, (rows,), torch.float32)
        total += term
    return total * matrix.factor


def decode(codes: Tensor, order: int, kind: int, bits: int, trits: bool, shape: structs.Shape,
           rows: int) -> Tensor:
    """Return the values [rows, columns] of codes in kernel order: layout.h, `value_at`."""
    row = torch.arange(rows).unsqueeze(-1)
    column = torch.arange(shape.columns)
    group, inside = column // shape.group_size, column % shape.group_size
    block, tile, lane = row // 64, row % 64 // 16, row % 16
    if trits:
        last = shape.columns - (shape.groups - 1) * shape.group_size
        per_group = -(-shape.group_size // 20)
        size = 256 * ((shape.groups - 1) * per_group + -(-last // 20))
        cell, k = group * per_group + inside // 20, inside % 20
        byte = codes[block * size + cell * 256 + tile * 64 + 4 * lane + k % 4].long()
        power = torch.tensor([1, 3, 9, 27, 81])[k // 4]
        return (byte * power % 256 * 3 >> 8) - 1
    word = group * -(-shape.group_size // 32) + inside // 32
    k = inside % 32
    width = bits if bits <= 2 else 4 if bits <= 4 else 8
    if order != BYTES:
        span = 32 // width
        at = block * shape.words * 256 * width + (word * width + k // span) * 256 + tile * 64 \
            + 4 * lane + k % 4
        u = codes[at].long() >> k % span // 4 * width & (1 << width) - 1
        return {BINARY: 2 * u - 1, TERNARY: u - 1, GRID: 2 * u - (1 << bits) + 1}[kind]
    half, r = row % 64 // 32, row % 32
    place = (r & 7) * 4 + (r >> 3 & 1) * 2 + (r >> 4)
    value = torch.zeros(rows, shape.columns, dtype=torch.int64)
    for plane in range(bits):
        at = block * shape.words * 256 * bits + ((word * 4 + k // 8) * bits + plane) * 64 \
            + half * 32 + place
        sign = 2 * (codes[at].long() >> k % 8 & 1) - 1
        value += sign << plane if kind == GRID else sign
    return value // 2 if kind == TERNARY else value


def _list(blob: Tensor, item: structs.List, rows: int, shape: structs.Shape) -> Tensor:
    """Return what the salient entries add to the weight, [rows, columns]."""
    tiles, chunks = -(-rows // 64) * 4, structs.chunks(shape)
    starts = _values(blob, item.starts, (tiles, chunks + 1), torch.int32).tolist()
    scales = _values(blob, item.scales, (tiles * 16,), torch.float32).double()
    correction = _by_row(blob, item.correction, rows, shape.groups, 0)
    first = [g * shape.group_size + 128 * c for g in range(shape.groups) for c in
             range(-(-min(shape.group_size, shape.columns - g * shape.group_size) // 128))]
    assert len(first) == chunks
    added = torch.zeros(tiles * 16, shape.columns, dtype=torch.float64)
    for tile in range(tiles):
        for chunk in range(chunks):
            for unit in range(starts[tile][chunk], starts[tile][chunk + 1]):
                lines = blob[item.entries + 128 * unit:][:128].view(2, 16, 4).tolist()
                for lane in range(16):
                    for place, value in zip(lines[0][lane], lines[1][lane], strict=True):
                        if place < 128:
                            n, k = 16 * tile + lane, first[chunk] + place
                            assert n < rows and not added[n, k]
                            added[n, k] = scales[n] * value + correction[n, k // shape.group_size]
    return added[:rows]


def _groups(shape: structs.Shape) -> Tensor:
    return torch.arange(shape.columns) // shape.group_size


def _one_hot(groups: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(groups, count).double()


def _by_row(blob: Tensor, offset: int, rows: int, length: int, kind: int) -> Tensor:
    """Return [rows, length] from [blocks][length][64]."""
    blocks = -(-rows // 64)
    values = _values(blob, offset, (blocks, length, 64), DTYPES[kind])
    whole = values.transpose(1, 2).reshape(-1, length).double()
    assert not whole[rows:].any(), "rows past the end are 0"
    return whole[:rows]


def _scaled(blob: Tensor, offset: int, source: Tensor) -> Tensor:
    if not offset:
        return source
    return source * _values(blob, offset, (source.shape[-1],), torch.float32)


def _values(blob: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    assert offset >= sizeof(structs.Weight) or not size
    assert len(blob[offset:offset + size]) == size
    return blob[offset:offset + size].clone().view(dtype).reshape(shape)


def _all(blob: Tensor, kind: type, offset: int, number: int) -> list:
    assert offset % 64 == 0 or not number
    return [_read(blob, kind, offset + i * sizeof(kind)) for i in range(number)]


def _read(blob: Tensor, kind: type, offset: int):
    return kind.from_buffer_copy(bytes(blob[offset:offset + sizeof(kind)].tolist()))
