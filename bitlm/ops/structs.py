"""The structs of native/bitlm.h, and its constants, for Python."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_uint64, c_void_p

import torch

MAGIC = 0x3274686769657742
BYTES, DWORDS = 0, 1  # bitlm_order
BINARY, TERNARY, GRID = 0, 1, 2  # bitlm_kind
MAX_BITS = 8
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # bitlm_type
# bitlm_activation, in its order.
ACTIVATIONS = ("float", "int16", "int8", "int2", "uint2", "int1", "uint1")
OK, BAD_ARGUMENT, NO_MEMORY, WRONG_ORDER = range(4)  # bitlm_status

BLOCK_ROWS, WORD_COLUMNS, CHUNK_WORDS = 64, 32, 4
ALIGNMENT = 64
LIST_BYTES = 128  # a unit of bitlm_list's entries


def fields(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Shape(Structure):
    _fields_ = fields("columns group_size groups words", c_int32)


class Input(Structure):
    _fields_ = [("shape", Shape), *fields("scales columns", c_int64),
                *fields("source rank", c_int32)]


class Matrix(Structure):
    _fields_ = [*fields("codes scales row_scales", c_int64),
                *fields("scale_type kind bits trits rows input output", c_int32),
                ("factor", c_float)]


class Dense(Structure):
    _fields_ = [("values", c_int64), *fields("type length input stage", c_int32)]


class Projection(Structure):
    _fields_ = [*fields("values scales", c_int64), *fields("type length columns stage", c_int32)]


class List(Structure):
    _fields_ = [*fields("starts entries scales correction", c_int64),
                *fields("input reserved", c_int32)]


class Sub(Structure):
    _fields_ = [*fields("rows columns row stages", c_int32),
                *fields("inputs matrices denses projections lists reserved", c_int32),
                *fields("input matrix dense projection list stage_lengths", c_int64)]


class Weight(Structure):
    _fields_ = [("magic", c_uint64), ("bytes", c_int64),
                *fields("order experts parts rows columns", c_int32),
                ("reserved", c_int32 * 7)]


class Linear(Structure):
    _fields_ = [*fields("weight x bias y offsets step", c_void_p), ("tokens", c_int64),
                *fields("x_type bias_type y_type activation threads reserved", c_int32)]


class Codes(Structure):
    _fields_ = [("signs", c_void_p * MAX_BITS), ("mask", c_void_p), ("trits", c_void_p),
                ("shape", Shape), ("rows", c_int64),
                *fields("order kind bits trits_in_memory", c_int32)]


def shape(columns: int, group_size: int) -> Shape:
    """Return the shape of `columns` columns in groups of `group_size`, each in whole words."""
    size = max(min(group_size, columns), 1)
    groups = -(-columns // size)
    last = columns - (groups - 1) * size
    words = (groups - 1) * -(-size // WORD_COLUMNS) + -(-last // WORD_COLUMNS)
    return Shape(columns, size, groups, words)


def chunks(of: Shape) -> int:
    """Return how many chunks of 128 columns a shape has; a chunk never crosses a group."""
    per_chunk = WORD_COLUMNS * CHUNK_WORDS
    last = of.columns - (of.groups - 1) * of.group_size
    return (of.groups - 1) * -(-of.group_size // per_chunk) + -(-last // per_chunk)
