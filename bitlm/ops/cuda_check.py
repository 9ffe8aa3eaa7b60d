"""Whether the kernels compute on a card what the reference does: a look before they are trusted.

A compiler, a driver or a card that nobody has tried, and that makes wrong numbers or refuses a
launch, must cost speed and a message, not the model. (An address outside of memory would still end
the process: nothing in CUDA can be used after it.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference
from .cuda_table import NEVER, Settings
from .form import Form
from .rounding import LEVELS

# Rows, columns and group of a weight, and what it has: rows of whole 16 bytes with groups of 128,
# the same with masks and one group a row, rows whose codes begin anywhere, the terms that have
# kernels of their own, and experts.
Case = tuple[tuple[int, int, int], tuple[str, ...]]
CASES: tuple[Case, ...] = (
    ((72, 512, 128), ("signs",)), ((48, 384, 384), ("signs", "mask", "shift")),
    ((40, 200, 40), ("trits",)), ((24, 128, 128), ("signs", "salient")),
    ((24, 128, 128), ("signs", "ranked")),
    ((72, 256, 128), ("signs", "mask", "experts", "input_scales", "low_rank")),
    ((24, 128, 128), ("signs", "experts", "columns")), ((24, 128, 64), ("signs", "experts")))
# More than one block of rows, and more steps than a block has stages.
WIDE_CASES: tuple[Case, ...] = (
    ((264, 1024, 128), ("signs",)), ((264, 1024, 1024), ("signs", "mask", "shift")),
    ((264, 1024, 64), ("signs", "second", "shift")), ((72, 128, 64), ("signs", "experts")))
EXPERTS = 3
BITS = Settings((1, 2, 4, 8), NEVER, NEVER, NEVER, few_tokens=NEVER)
# Tokens, dtype, activation and settings: every way to multiply, and those of sm_90a alone.
Way = tuple[int, torch.dtype, str, Settings]
WAYS: list[Way] = [
    (tokens, dtype, activation, BITS) for tokens in (1, 9)
    for dtype in (torch.float32, torch.float16) for activation in ("float", "int8")]
WAYS += [(tokens, torch.float16, "float", BITS) for tokens in (2, 4)]
WAYS += [(10, dtype, "float", Settings(many_tokens=1, dense_tokens=NEVER, many_tiles=tiles))
         for dtype in (torch.float16, torch.bfloat16) for tiles in (1, 2)]
WAYS += [(70, torch.float16, activation, Settings(few_tokens=1)) for activation in LEVELS]
WIDE_WAYS: list[Way] = [
    (tokens, dtype, "float", Settings(dense_tokens_wide=NEVER, wide_tokens=1, wide_tiles=tiles))
    for tokens in (10, 300) for dtype in (torch.float16, torch.bfloat16) for tiles in (1, 2, 4)]
# Of the size of the result; a kernel that is wrong is wrong by about all of it.
TOLERANCE = 2e-2

# (x, tensors, form, offsets, activation, settings) -> y; (tensors, form) -> the dense weight, fp32
Linear = Callable[[Tensor, list[Tensor], Form, Tensor | None, str, Settings], Tensor]
Dense = Callable[[list[Tensor], Form], Tensor]


def disagreement(linear: Linear, dense: Dense, device: torch.device, cases: Sequence[Case],
                 ways: Sequence[Way]) -> str | None:
    """Return how kernels differ from the reference on a device, or None; waits for the device.

    Raises torch.OutOfMemoryError, which says nothing of the kernels.
    """
    random = torch.Generator().manual_seed(0)
    for (rows, columns, group), names in cases:
        form, tensors = _weight(rows, columns, group, names, random)
        there = [tensor.to(device) for tensor in tensors]
        case = f"{rows}x{columns} {'+'.join(names)}"
        try:
            if not {"ranked", "low_rank", "columns"} & set(names):
                expected = reference.dequantize(tensors, form.text, torch.float32)
                if not _error(dense(there, form), expected) <= 1e-5:
                    return f"the CUDA kernels give other dense weights than the reference ({case})"
            for tokens, dtype, activation, settings in ways:
                x = torch.randn(tokens, columns, generator=random).to(dtype)
                offsets = _offsets(form, tokens)
                y = linear(x.to(device), there, form, offsets, activation, settings)
                expected = reference.packed_linear(x.float(), tensors, form.text, None, offsets,
                                                   activation)
                if not _error(y, expected) <= TOLERANCE:
                    return ("the CUDA kernels give other products than the reference "
                            f"({case}, {tokens} tokens, {dtype}, {activation})")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return f"the CUDA kernels failed on {case}: {error}"
    return None


def _weight(rows: int, columns: int, group: int, names: tuple[str, ...], random: torch.Generator
            ) -> tuple[Form, list[Tensor]]:
    """Return a random weight of one plane, with the terms named."""
    experts = EXPERTS if "experts" in names else 0
    lead = (experts,) if experts else ()

    def codes(width: int, most: int = 256) -> Tensor:
        return torch.randint(0, most, (*lead, rows, width), generator=random, dtype=torch.uint8)

    def scales(*shape: int) -> Tensor:
        return (torch.rand((*lead, *shape), generator=random) + 0.5).to(torch.float16)

    groups, width = -(-columns // group), -(-columns // 8)
    named: dict[str, Tensor] = {}
    for name in ("signs", "mask"):
        if name in names:
            named[f"plane0.{name}"] = codes(width)
    if "trits" in names:
        named["plane0.trits"] = codes(-(-columns // 5), 3 ** 5)
    if "ranked" in names:
        named["plane0.row_scales"] = scales(rows, 2)
        named["plane0.column_scales"] = scales(1, 2, columns)
    else:
        named["plane0.scales"] = scales(rows, groups)
    if "second" in names:
        named |= {"plane1.signs": codes(width), "plane1.scales": scales(rows, groups)}
    if "shift" in names:
        named["shift"] = scales(rows, groups)
    if "salient" in names:
        mask = codes(width)
        count = sum(int(byte).bit_count() for byte in mask.flatten())
        named |= {"salient.mask": mask, "salient.values": codes(columns).view(1, -1)[:, :count],
                  "salient.scales": scales(rows) / 64, "salient.zeros": codes(1).view(-1)}
    if "columns" in names:
        picked = [torch.randperm(columns, generator=random)[:9].sort().values
                  for _ in range(experts or 1)]
        places = torch.stack(picked).to(torch.int32)
        named |= {"salient.columns": places.view(*lead, 1, 9), "salient.values": codes(9),
                  "salient.scales": scales(rows) / 64, "salient.zeros": codes(1)[..., 0]}
    if "input_scales" in names:
        named["input_scales"] = scales(1, columns)
    if "low_rank" in names:
        named |= {"low_rank.u": scales(rows, 2) / 2, "low_rank.v": scales(1, 2, columns)}
    return Form(rows, columns, tuple(named), group, 1, 1, experts), list(named.values())


def _offsets(form: Form, tokens: int) -> Tensor | None:
    """Return ends of experts: the second one has no token."""
    if not form.experts:
        return None
    return torch.tensor([tokens // 2, tokens // 2, tokens], dtype=torch.int32)


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of what was expected, NaN where it is."""
    found, expected = found.cpu().double(), expected.double()
    return float((found - expected).norm() / expected.norm())
