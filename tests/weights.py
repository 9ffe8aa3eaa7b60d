"""Random packed weights of any plain form, for the tests of the kernels."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from bitlm.ops.bits import pack_bits, pack_trits
from bitlm.ops.form import Form


def random_weight(rows: int, columns: int, group: int | None, kinds: tuple[str, ...],
                  plane_ratio: int = 1, shift: bool = False,
                  scales: torch.dtype = torch.float16, seed: int = 0) -> tuple[Form, list[Tensor]]:
    """Return a form and its tensors; `kinds` names each plane binary, ternary or trits."""
    random = torch.Generator().manual_seed(seed)
    size = min(group or columns, columns)
    groups = ceil(columns / size)
    named: dict[str, Tensor] = {}
    for plane, what in enumerate(kinds):
        signs = torch.rand(rows, columns, generator=random) < 0.5
        mask = torch.rand(rows, columns, generator=random) < 0.6
        if what == "trits":
            codes = (signs.to(torch.int8) * 2 - 1) * mask
            named[f"plane{plane}.trits"] = pack_trits(codes.to(torch.int8))
        else:
            named[f"plane{plane}.signs"] = pack_bits(signs)
            if what == "ternary":
                named[f"plane{plane}.mask"] = pack_bits(mask)
        if plane == 0 or plane_ratio == 1:
            values = torch.rand(rows, groups, generator=random) + 0.5
            named[f"plane{plane}.scales"] = values.to(scales)
    if shift:
        named["shift"] = torch.randn(rows, groups, generator=random).to(scales)
    return Form(rows, columns, tuple(named), size, plane_ratio), list(named.values())
