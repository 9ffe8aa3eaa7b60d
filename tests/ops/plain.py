"""What a packed weight means, in plain Python loops over the format table; and random examples.

Reads bytes and numbers only: nothing of bitlm.ops but the fields of a Form. Everything is computed
in double precision, entry by entry: slow, and meant to be.
"""

from __future__ import annotations

import random
from math import ceil

import torch
from torch import Tensor

from bitlm.ops.form import Form

# --- meaning -------------------------------------------------------------------------------------


def dense(form: Form, named: dict[str, Tensor]) -> Tensor:
    """Return the dense weight as float64 [N, K], or [E, N, K]."""
    if not form.experts:
        return torch.tensor(_matrix(form, {n: t.tolist() for n, t in named.items()}),
                            dtype=torch.float64)
    return torch.stack([torch.tensor(_matrix(form, {n: t[e].tolist() for n, t in named.items()}),
                                     dtype=torch.float64) for e in range(form.experts)])


def linear(form: Form, weight: Tensor, x: Tensor, bias: Tensor | None = None,
           offsets: list[int] | None = None) -> Tensor:
    """Return x @ W.T + bias in float64; rows of x past the last offset give 0."""
    flat = x.double().reshape(-1, form.columns).tolist()
    result = [[0.0] * form.rows for _ in flat]
    for t, row in enumerate(flat):
        own, shift = weight, bias
        if offsets is not None:
            expert = next((e for e, end in enumerate(offsets) if t < end), None)
            if expert is None:
                continue
            own, shift = weight[expert], None if bias is None else bias[expert]
        for n, line in enumerate(own.tolist()):
            result[t][n] = sum(a * b for a, b in zip(row, line, strict=True))
            if shift is not None:
                result[t][n] += float(shift[n])
    return torch.tensor(result, dtype=torch.float64).reshape(*x.shape[:-1], form.rows)


def bit(row: list[int], column: int) -> int:
    return row[column // 8] >> (column % 8) & 1


def trit(row: list[int], column: int) -> int:
    return row[column // 5] // 3 ** (4 - column % 5) % 3 - 1


def _matrix(form: Form, named: dict) -> list[list[float]]:
    rows = form.rows // form.parts
    positions = [0] * form.parts  # of the next salient value of each part
    return [[_entry(form, named, n, k, n // rows, positions) for k in range(form.columns)]
            for n in range(form.rows)]


def _entry(form: Form, named: dict, n: int, k: int, part: int, positions: list[int]) -> float:
    value = _salient(named, n, k, part, positions)
    if value is None:
        value = sum(_plane(form, named, p, n, k, part) for p in range(9)
                    if f"plane{p}.signs" in named or f"plane{p}.trits" in named)
        if "shift" in named:
            value += _grouped(form, named, "shift", "plane0", n, k, k, part)
    for q in range(9):
        if f"chain{q}.left" in named:
            value += _chain(named, f"chain{q}", n, k, part)
    if "low_rank.u" in named:
        value += sum(u * v[k] for u, v in zip(named["low_rank.u"][n], named["low_rank.v"][part],
                                              strict=True))
    if "input_scales" in named:
        value *= named["input_scales"][part][k]
    return value


def _salient(named: dict, n: int, k: int, part: int, positions: list[int]) -> float | None:
    if "salient.mask" in named:
        if not bit(named["salient.mask"][n], k):
            return None
        value = named["salient.values"][part][positions[part]]
        positions[part] += 1
    elif "salient.columns" in named and k in named["salient.columns"][part]:
        value = named["salient.values"][n][named["salient.columns"][part].index(k)]
    else:
        return None
    return named["salient.scales"][n] * (value - named["salient.zeros"][n])


def _plane(form: Form, named: dict, p: int, n: int, k: int, part: int) -> float:
    scaled = f"plane{p}" if form.plane_ratio == 1 else "plane0"  # the plane that has the scales
    c = _place(named, scaled, k, part)
    if c is None:
        return 0.0
    if f"plane{p}.trits" in named:
        code = trit(named[f"plane{p}.trits"][n], c)
    else:
        code = 2 * bit(named[f"plane{p}.signs"][n], c) - 1
        if f"plane{p}.mask" in named:
            code *= bit(named[f"plane{p}.mask"][n], c)
    if f"{scaled}.scales" in named:
        scale = _grouped(form, named, f"{scaled}.scales", scaled, n, c, k, part)
    else:
        scale = sum(a * b[c] for a, b in zip(named[f"{scaled}.row_scales"][n],
                                             named[f"{scaled}.column_scales"][part], strict=True))
    return code * scale / form.plane_ratio ** p


def _place(named: dict, plane: str, k: int, part: int) -> int | None:
    """Return where column k lies in a plane that may cover some columns only."""
    if f"{plane}.columns" not in named:
        return k
    covered = named[f"{plane}.columns"][part]
    return covered.index(k) if k in covered else None


def _grouped(form: Form, named: dict, what: str, plane: str, n: int, c: int, k: int,
             part: int) -> float:
    """Return the scale or shift of column c (of `plane`'s columns, or of all for a shift)."""
    values = named[what][n]
    group = c // form.group_size
    if f"{plane}.zones" not in named:
        return values[group]
    place = _place(named, plane, k, part)
    zone = 0 if place is None else bit(named[f"{plane}.zones"][n], place)
    return values[zone * (len(values) // 2) + group]


def _chain(named: dict, chain: str, n: int, k: int, part: int) -> float:
    total = 0.0
    for r, c in enumerate(named[f"{chain}.rank_scales"][part]):
        left = 2 * bit(named[f"{chain}.left"][n], r) - 1
        right = 2 * bit(named[f"{chain}.right"][part][r], k) - 1
        total += left * c * right
    return named[f"{chain}.row_scales"][n] * total * named[f"{chain}.column_scales"][part][k]


# --- examples ------------------------------------------------------------------------------------


def example(kinds: tuple[str, ...] = ("signs",), terms: tuple[str, ...] = (), rows: int = 5,
            columns: int = 21, group_size: int = 8, plane_ratio: int = 1, parts: int = 1,
            experts: int = 0, seed: int = 0) -> tuple[Form, dict[str, Tensor]]:
    """Return a random weight.

    kinds: signs, mask or trits, for each plane. terms: columns, zones, rank (of the even planes),
    shift, input_scales, chain, chains (three of them), low_rank, salient.mask, salient.columns.
    rows: of each part.
    """
    draw = random.Random(f"{kinds} {terms} {rows} {columns} {group_size} {seed}")
    all_rows, lead = rows * parts, (experts,) if experts else ()
    named: dict[str, Tensor] = {}

    def floats(*shape: int) -> Tensor:
        dtype = draw.choice((torch.float16, torch.float32))
        count = torch.Size(lead + shape).numel()
        return torch.tensor([draw.uniform(-2, 2) for _ in range(count)]).reshape(
            lead + shape).to(dtype)

    def bits(*shape: int, ands: int = 1) -> Tensor:
        *outer, width = lead + shape
        lines = [_packed([all(draw.random() < 0.5 for _ in range(ands)) for _ in range(width)])
                 for _ in range(torch.Size(outer).numel())]
        return torch.tensor(lines, dtype=torch.uint8).reshape(*outer, ceil(width / 8))

    def choice(count: int) -> Tensor:
        lines = [sorted(draw.sample(range(columns), count)) for _ in range(parts * (experts or 1))]
        return torch.tensor(lines, dtype=torch.int32).reshape(*lead, parts, count)

    for p, what in enumerate(kinds):
        scaled = p == 0 or plane_ratio == 1
        covered = ceil(columns * 0.6) if "columns" in terms and (p % 2 or plane_ratio != 1) \
            else columns
        if what == "trits":
            *shape, width = *lead, all_rows, ceil(covered / 5)
            digits = [draw.choices(range(3), k=5) if 5 * i + 5 <= covered else
                      [draw.randrange(3) if 5 * i + j < covered else 0 for j in range(5)]
                      for _ in range(torch.Size(shape).numel()) for i in range(width)]
            named[f"plane{p}.trits"] = torch.tensor(
                [sum(d * 3 ** (4 - j) for j, d in enumerate(five)) for five in digits],
                dtype=torch.uint8).reshape(*shape, width)
        else:
            named[f"plane{p}.signs"] = bits(all_rows, covered)
            if what == "mask":
                named[f"plane{p}.mask"] = bits(all_rows, covered)
                named[f"plane{p}.signs"] &= named[f"plane{p}.mask"]
        if not scaled:
            continue
        if covered != columns:
            named[f"plane{p}.columns"] = choice(covered)
        if "rank" in terms and p % 2 == 0:
            named[f"plane{p}.row_scales"] = floats(all_rows, 3)
            named[f"plane{p}.column_scales"] = floats(parts, 3, covered)
            continue
        zones = "zones" in terms
        if zones:
            named[f"plane{p}.zones"] = bits(all_rows, covered)
        named[f"plane{p}.scales"] = floats(all_rows, (1 + zones) * ceil(covered / group_size))
    if "shift" in terms:
        zones = "plane0.zones" in named
        named["shift"] = floats(all_rows, (1 + zones) * ceil(columns / group_size))
    if "input_scales" in terms:
        named["input_scales"] = floats(parts, columns)
    for q in range(3 if "chains" in terms else "chain" in terms):
        rank = 3 + 5 * q
        named |= {f"chain{q}.left": bits(all_rows, rank),
                  f"chain{q}.right": bits(parts, rank, columns),
                  f"chain{q}.row_scales": floats(all_rows),
                  f"chain{q}.rank_scales": floats(parts, rank),
                  f"chain{q}.column_scales": floats(parts, columns)}
    if "low_rank" in terms:
        named |= {"low_rank.u": floats(all_rows, 2), "low_rank.v": floats(parts, 2, columns)}
    if "salient.mask" in terms:
        named["salient.mask"] = mask = bits(all_rows, columns, ands=2)
        counts = [sum(bin(byte).count("1") for byte in part.flatten().tolist())
                  for part in mask.reshape(-1, rows, mask.shape[-1])]
        values = [[draw.randrange(256) if i < count else 0 for i in range(max(counts))]
                  for count in counts]
        named["salient.values"] = torch.tensor(values, dtype=torch.uint8).reshape(
            *lead, parts, max(counts))
    if "salient.columns" in terms:
        few = ceil(columns * 0.3)
        named["salient.columns"] = choice(few)
        named["salient.values"] = torch.tensor(
            [draw.randrange(256) for _ in range(torch.Size(lead).numel() * all_rows * few)],
            dtype=torch.uint8).reshape(*lead, all_rows, few)
    if "salient.values" in named:
        named["salient.scales"] = floats(all_rows) / 64
        named["salient.zeros"] = torch.tensor(
            [draw.randrange(256) for _ in range(torch.Size(lead).numel() * all_rows)],
            dtype=torch.uint8).reshape(*lead, all_rows)
    return Form(all_rows, columns, tuple(named), min(group_size, columns), plane_ratio, parts,
                experts), named


def any_example(seed: int) -> tuple[Form, dict[str, Tensor]]:
    """Return an example of everything at random."""
    draw = random.Random(seed)
    terms = [term for term in ("columns", "zones", "rank", "shift", "input_scales", "low_rank",
                               "chain", "chains") if draw.random() < 0.4]
    terms += draw.choice(((), ("salient.mask",), ("salient.columns",)))
    columns = draw.choice((1, 3, 5, 7, 8, 9, 16, 23, 40))
    kinds = tuple(draw.choice(("signs", "mask", "trits")) for _ in range(draw.randrange(4)))
    if not kinds:
        terms = [term for term in terms if term != "zones"] + ["low_rank"]
    return example(kinds, tuple(terms), draw.choice((1, 2, 5)), columns,
                   draw.choice((1, 3, 8, columns)), draw.choice((1, 2)), draw.choice((1, 2)),
                   draw.choice((0, 0, 3)), seed)


def _packed(bits: list[bool]) -> list[int]:
    return [sum(bool(b) << j for j, b in enumerate(bits[i:i + 8])) for i in range(0, len(bits), 8)]
