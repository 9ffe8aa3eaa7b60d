"""Whether the kernels compute on a card what the reference does: a look before they are trusted.

A compiler, a driver or a card that nobody has tried must cost speed and a message, not the model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .form import Form

# A kernel of each kind: rows of whole 16 bytes with groups of 128, the same with masks and one
# group a row, and rows whose codes begin anywhere.
CASES = (((48, 512, 128), ("signs",)), ((48, 384, 384), ("signs", "mask", "shift")),
         ((40, 200, 40), ("trits",)))
MANY = 70
TRIED = [(tokens, dtype, activation) for tokens in (1, 9)
         for dtype in (torch.float32, torch.float16) for activation in ("float", "int8")]
TRIED += [(MANY, torch.float16, "float"), (MANY, torch.bfloat16, "float")]
# Of the size of the result; a kernel that is wrong is wrong by about all of it.
TOLERANCE = 2e-2

# (x, tensors, form, activation) -> y, and (tensors, form) -> the dense weight in float32
Linear = Callable[[Tensor, list[Tensor], Form, str], Tensor]
Dense = Callable[[list[Tensor], Form], Tensor]


def disagreement(linear: Linear, dense: Dense, device: torch.device) -> str | None:
    """Return how kernels differ from the reference on a device, or None; waits for the device."""
    random = torch.Generator().manual_seed(0)
    for (rows, columns, group), names in CASES:
        form, tensors = _weight(rows, columns, group, names, random)
        there = [tensor.to(device) for tensor in tensors]
        case = f"{rows}x{columns} {'+'.join(names)}"
        try:
            if _error(dense(there, form), reference.dequantize(tensors, form.text,
                                                               torch.float32)) > 1e-5:
                return f"the CUDA kernels give other dense weights than the reference ({case})"
            for tokens, dtype, activation in TRIED:
                x = torch.randn(tokens, columns, generator=random).to(dtype)
                y = linear(x.to(device), there, form, activation)
                expected = reference.packed_linear(x.float(), tensors, form.text, None, None,
                                                   activation)
                if not _error(y, expected) <= TOLERANCE:
                    return ("the CUDA kernels give other products than the reference "
                            f"({case}, {tokens} tokens, {dtype}, {activation})")
        except RuntimeError as error:
            return f"the CUDA kernels failed on {case}: {error}"
    return None


def _weight(rows: int, columns: int, group: int, names: tuple[str, ...], random: torch.Generator
            ) -> tuple[Form, list[Tensor]]:
    """Return a random weight of one plane."""
    def codes(width: int, most: int) -> Tensor:
        return torch.randint(0, most, (rows, width), generator=random, dtype=torch.uint8)

    def scales() -> Tensor:
        values = torch.rand(rows, -(-columns // group), generator=random) + 0.5
        return values.to(torch.float16)

    planes = {"signs": (-(-columns // 8), 256), "mask": (-(-columns // 8), 256),
              "trits": (-(-columns // 5), 3 ** 5)}
    named = {f"plane0.{name}": codes(*planes[name]) for name in names if name in planes}
    named["plane0.scales"] = scales()
    if "shift" in names:
        named["shift"] = scales()
    return Form(rows, columns, tuple(named), group, 1), list(named.values())


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of what was expected, NaN where it is."""
    found, expected = found.cpu().double(), expected.double()
    return float((found - expected).norm() / expected.norm())
