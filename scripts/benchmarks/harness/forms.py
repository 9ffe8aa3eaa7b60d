"""Random packed weights of the forms that the benchmarks time."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from bitlm.ops.bits import pack_bits, pack_trits
from bitlm.ops.form import Form

GROUP = 128
SALIENT = 0.1
RANK = 16

Named = dict[str, Tensor]


def random_form(name: str, rows: int, columns: int) -> tuple[Form, list[Tensor]]:
    """Return a form and its tensors. `name` is a key of FORMS, " g128" behind it for groups."""
    kind = name.removesuffix(f" g{GROUP}")
    size = GROUP if kind != name else columns
    named, ratio = FORMS[kind](rows, columns, ceil(columns / size))
    return Form(rows, columns, tuple(named), size, ratio), list(named.values())


def _scales(rows: int, width: int) -> Tensor:
    return (torch.rand(rows, width) + 0.5).half() / 100


def _signs(rows: int, columns: int) -> Tensor:
    return pack_bits(torch.rand(rows, columns) < 0.5)


def _binary(rows: int, columns: int, groups: int) -> tuple[Named, int]:
    return {"plane0.signs": _signs(rows, columns), "plane0.scales": _scales(rows, groups)}, 1


def _ternary(rows: int, columns: int, groups: int) -> tuple[Named, int]:
    mask = pack_bits(torch.rand(rows, columns) < 2 / 3)
    return {"plane0.signs": _signs(rows, columns) & mask, "plane0.mask": mask,
            "plane0.scales": _scales(rows, groups)}, 1


def _trits(rows: int, columns: int, groups: int) -> tuple[Named, int]:
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    return {"plane0.trits": pack_trits(codes), "plane0.scales": _scales(rows, groups)}, 1


def _planes(rows: int, columns: int, groups: int) -> tuple[Named, int]:
    named = {}
    for plane in range(3):
        named[f"plane{plane}.signs"] = _signs(rows, columns)
        named[f"plane{plane}.scales"] = _scales(rows, groups)
    return named, 1


def _grid(bits: int) -> Callable[[int, int, int], tuple[Named, int]]:
    def make(rows: int, columns: int, groups: int) -> tuple[Named, int]:
        named = {"plane0.signs": _signs(rows, columns), "plane0.scales": _scales(rows, groups)}
        named |= {f"plane{plane}.signs": _signs(rows, columns) for plane in range(1, bits)}
        return named, 2
    return make


def _salient(rows: int, columns: int, groups: int) -> tuple[Named, int]:
    chosen = torch.rand(rows, columns) < SALIENT
    mask = pack_bits(chosen)
    count = int(chosen.sum())
    return {"plane0.signs": _signs(rows, columns) & ~mask, "plane0.scales": _scales(rows, groups),
            "salient.mask": mask,
            "salient.values": torch.randint(256, (1, count), dtype=torch.uint8),
            "salient.scales": _scales(rows, 1).squeeze(1),
            "salient.zeros": torch.randint(256, (rows,), dtype=torch.uint8)}, 1


def _rank(rows: int, columns: int, groups: int) -> tuple[Named, int]:
    return {"plane0.signs": _signs(rows, columns), "plane0.row_scales": _scales(rows, RANK),
            "plane0.column_scales": _scales(RANK, columns).unsqueeze(0)}, 1


FORMS: dict[str, Callable[[int, int, int], tuple[Named, int]]] = {
    "binary": _binary,
    "ternary": _ternary,
    "trits": _trits,
    "3 planes": _planes,
    "2-bit grid": _grid(2),
    "4-bit grid": _grid(4),
    "8-bit grid": _grid(8),
    "salient 10 %": _salient,
    "rank-16": _rank,
}
