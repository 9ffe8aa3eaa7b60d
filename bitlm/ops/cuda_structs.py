"""The structs of native/bitlm_cuda.h for Python."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

from .structs import fields

MAX_PASSES = 9
MANY_PASSES = 4
WIDE_BITS, WIDE_PASSES = 2, 3
STEP_COLUMNS = 64  # of a product of many tokens
UNIT_COLUMNS, UNIT_WORDS, DIGIT_WORDS = 128, 4, 32


class Input(Structure):
    _fields_ = [*fields("x multipliers places offsets step words sums scales rounded", c_void_p),
                *fields("x_type multiplier_type source_columns columns group_size units "
                        "group_units rank rows padded_rows activation digits unit_words experts",
                        c_int32)]


class Pass(Structure):
    _fields_ = [*fields("signs mask trits zones drop scales", c_void_p),
                ("scale_type", c_int32), ("factor", c_float)]


class Product(Structure):
    _fields_ = [("input", Input), ("passes", Pass * MAX_PASSES),
                *fields("y addend bias offsets", c_void_p),
                *fields("count rows y_columns y_column y_type bias_type experts block_tokens "
                        "stages expert_rows", c_int32)]


class Order(Structure):
    _fields_ = [*fields("x ordered", c_void_p), *fields("tokens columns", c_int32)]


class Many(Structure):
    _fields_ = [("passes", Pass * MANY_PASSES), *fields("x y addend bias offsets", c_void_p),
                *fields("count rows columns group_size tokens y_columns y_column type bias_type "
                        "experts tiles reserved", c_int32)]


class Combine(Structure):
    _fields_ = [*fields("products row_scales offsets y", c_void_p),
                *fields("type tokens rank rows y_columns y_column product_rows experts "
                        "expert_rows add", c_int32)]


class Thin(Structure):
    _fields_ = [*fields("x v multipliers offsets y", c_void_p),
                *fields("x_type v_type tokens rank columns experts parts reserved", c_int32)]


class Salient(Structure):
    _fields_ = [*fields("mask values starts scales zeros x offsets y", c_void_p),
                *fields("type tokens rows columns y_columns y_column experts expert_rows add",
                        c_int32)]


class Rows(Structure):
    _fields_ = [("passes", Pass * MAX_PASSES),
                *fields("ids salient_mask salient_values salient_starts salient_scales "
                        "salient_zeros multipliers out", c_void_p),
                *fields("rows_out first", c_int64),
                *fields("count rows columns group_size salient_type multiplier_type out_type "
                        "multiplier_rows", c_int32)]


def units_of(columns: int, group_size: int) -> tuple[int, int]:
    """Return the units of an input, and those of each group but the last one."""
    size = min(group_size, columns)
    groups = -(-columns // size)
    last = columns - (groups - 1) * size
    by_group = -(-size // UNIT_COLUMNS)
    return (groups - 1) * by_group + -(-last // UNIT_COLUMNS), by_group
