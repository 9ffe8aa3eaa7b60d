"""The packed weight form as data: which tensors it may hold, their types and shapes.

This table is file format version 1 (README, "The file format"). The reference ops, the reader's
checks, the writer and the kernels all read it; nothing else knows a tensor's shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil

import torch

FLOATS = (torch.float16, torch.float32)
BYTES = (torch.uint8,)
INDICES = (torch.int32,)


@dataclass(frozen=True)
class Row:
    """One row of the format table: allowed dtypes and the axes, named.

    Axes: ``N`` out features, ``K`` in features, ``C`` columns that a plane covers (K unless it has
    ``columns``), ``C/8``, ``C/5``, ``K/8``, ``R/8`` packed widths rounded up, ``G`` column groups,
    ``P`` parts of a fused layer, ``k`` scale rank, ``r`` low rank, ``R`` chain rank, ``S`` salient
    columns, ``M`` stored salient values of a part. Lower-case and R, S, M, C come from the data.
    """

    dtypes: tuple[torch.dtype, ...]
    axes: tuple[str, ...]


TABLE: dict[str, Row] = {
    "plane.signs": Row(BYTES, ("N", "C/8")),
    "plane.mask": Row(BYTES, ("N", "C/8")),
    "plane.trits": Row(BYTES, ("N", "C/5")),
    "plane.columns": Row(INDICES, ("P", "C")),
    "plane.zones": Row(BYTES, ("N", "C/8")),
    "plane.scales": Row(FLOATS, ("N", "G")),
    "plane.row_scales": Row(FLOATS, ("N", "k")),
    "plane.column_scales": Row(FLOATS, ("P", "k", "C")),
    "shift": Row(FLOATS, ("N", "G")),
    "input_scales": Row(FLOATS, ("P", "K")),
    "chain.left": Row(BYTES, ("N", "R/8")),
    "chain.right": Row(BYTES, ("P", "R", "K/8")),
    "chain.row_scales": Row(FLOATS, ("N",)),
    "chain.rank_scales": Row(FLOATS, ("P", "R")),
    "chain.column_scales": Row(FLOATS, ("P", "K")),
    "low_rank.u": Row(FLOATS, ("N", "r")),
    "low_rank.v": Row(FLOATS, ("P", "r", "K")),
    "salient.mask": Row(BYTES, ("N", "K/8")),
    "salient.columns": Row(INDICES, ("P", "S")),
    "salient.values": Row(BYTES, ("P", "M")),
    "salient.scales": Row(FLOATS, ("N",)),
    "salient.zeros": Row(BYTES, ("N",)),
}
# With `salient.columns` the values are a dense [N, S] matrix instead of a padded list.
SALIENT_COLUMN_VALUES = Row(BYTES, ("N", "S"))

_NUMBERED = re.compile(r"^(plane|chain)(\d+)\.(\w+)$")


def kind(name: str) -> str:
    """Return the table key of a tensor name: ``plane3.signs`` -> ``plane.signs``."""
    match = _NUMBERED.match(name)
    return f"{match[1]}.{match[3]}" if match else name


def row(name: str, names: tuple[str, ...] | list[str] | set[str]) -> Row:
    """Return the format row of `name` in a weight that holds `names`.

    Raises KeyError when format version 1 has no such tensor.
    """
    if name == "salient.values" and "salient.columns" in names:
        return SALIENT_COLUMN_VALUES
    return TABLE[kind(name)]


def planes(names: tuple[str, ...] | list[str] | set[str]) -> list[int]:
    """Return the sorted plane numbers among tensor names."""
    return sorted({int(m[2]) for n in names if (m := _NUMBERED.match(n)) and m[1] == "plane"})


def chains(names: tuple[str, ...] | list[str] | set[str]) -> list[int]:
    """Return the sorted chain numbers among tensor names."""
    return sorted({int(m[2]) for n in names if (m := _NUMBERED.match(n)) and m[1] == "chain"})


@dataclass(frozen=True)
class Form:
    """Everything about a packed weight that its tensors do not say themselves.

    rows, columns: N and K of the dense weight (of one expert). group_size: columns that share a
    scale, at most `columns`; the last group may be short. plane_ratio: 1 = every plane has its own
    scales, 2 = plane p has those of plane 0 divided by 2**p. parts: layers fused along N (2 for
    gate|up). experts: 0, or the length of a leading axis on every tensor. names: the tensors, in
    the order in which the ops receive them.
    """

    rows: int
    columns: int
    names: tuple[str, ...]
    group_size: int
    plane_ratio: int = 1
    parts: int = 1
    experts: int = 0

    @property
    def groups(self) -> int:
        return ceil(self.columns / self.group_size)

    @property
    def text(self) -> str:
        """The form as one string: an op schema has no structured constants."""
        return _text(self)


@cache
def _text(form: Form) -> str:
    numbers = (form.rows, form.columns, form.group_size, form.plane_ratio, form.parts, form.experts)
    return " ".join(map(str, numbers)) + " " + ",".join(form.names)


@cache
def parse(text: str) -> Form:
    """Return the Form that `Form.text` wrote."""
    *numbers, names = text.split(" ")
    rows, columns, group_size, plane_ratio, parts, experts = map(int, numbers)
    return Form(rows, columns, tuple(filter(None, names.split(","))), group_size, plane_ratio,
                parts, experts)


def axis_lengths(form: Form, shapes: dict[str, tuple[int, ...]]
                 ) -> dict[str, dict[str, int | None]]:
    """Return, for every tensor, what each axis letter of its row must be (None: free).

    `shapes` (without the expert axis) tells the sizes that come from the data: the covered columns
    of a plane, ranks, salient counts. A size is free where it is first defined.
    """
    base: dict[str, int | None] = {
        "N": form.rows, "K": form.columns, "P": form.parts, "K/8": ceil(form.columns / 8),
    }
    lengths: dict[str, dict[str, int | None]] = {}
    for name in form.names:
        sizes = dict(base)
        prefix = name.rsplit(".", 1)[0]
        if kind(name).startswith("plane."):
            # Planes that share the scales of plane 0 cover its columns.
            scaled = prefix if form.plane_ratio == 1 else "plane0"
            columns = shapes.get(f"{scaled}.columns")
            covered = columns[-1] if columns else form.columns
            zones = 2 if f"{prefix}.zones" in form.names else 1
            rank = shapes.get(f"{prefix}.row_scales")
            sizes |= {"C": None if name.endswith(".columns") else covered,
                      "C/8": ceil(covered / 8), "C/5": ceil(covered / 5),
                      "G": zones * ceil(covered / form.group_size),
                      "k": rank[-1] if rank and name.endswith("column_scales") else None}
        elif kind(name).startswith("chain."):
            right = shapes.get(f"{prefix}.right")
            rank = right[-2] if right and len(right) > 1 else None
            sizes |= {"R": None if name.endswith(".right") else rank,
                      "R/8": None if rank is None else ceil(rank / 8)}
        elif name == "shift":
            sizes["G"] = form.groups * (2 if "plane0.zones" in form.names else 1)
        elif kind(name).startswith("low_rank."):
            u = shapes.get("low_rank.u")
            sizes["r"] = u[-1] if u and name != "low_rank.u" else None
        elif kind(name).startswith("salient."):
            columns = shapes.get("salient.columns")
            sizes |= {"S": columns[-1] if columns and name == "salient.values" else None, "M": None}
        lengths[name] = sizes
    return lengths


# A term is whole when it has all tensors of one of these sets.
WHOLE: dict[str, tuple[set[str], ...]] = {
    "chain": ({"left", "right", "row_scales", "rank_scales", "column_scales"},),
    "low_rank": ({"u", "v"},),
    "salient": ({"mask", "values", "scales", "zeros"}, {"columns", "values", "scales", "zeros"}),
    "plane": tuple(codes | scales for codes in ({"signs"}, {"trits"})
                   for scales in ({"scales"}, {"row_scales", "column_scales"})),
    "plane that halves": ({"signs"}, {"trits"}),
}


def incomplete(form: Form) -> list[str]:
    """Return which terms of a form lack tensors that they need, one sentence each."""
    terms: dict[str, set[str]] = {}
    for name in form.names:
        term, _, leaf = name.rpartition(".")
        if term:
            terms.setdefault(term, set()).add(leaf)
    problems = []
    for term, leaves in terms.items():
        kind_of = term.rstrip("0123456789")
        if kind_of == "plane" and form.plane_ratio != 1 and term != "plane0":
            kind_of = "plane that halves"
        if not any(whole <= leaves for whole in WHOLE[kind_of]):
            ways = " or ".join(", ".join(sorted(whole)) for whole in WHOLE[kind_of])
            problems.append(f"{term} has {', '.join(sorted(leaves))}, it needs {ways}")
    return problems


# Tensors of a plane that cannot stand side by side.
APART = (("signs", "trits"), ("mask", "trits"), ("scales", "row_scales"), ("zones", "row_scales"))
# What plane 0 alone has where the others halve its scales.
OF_FIRST = ("scales", "row_scales", "column_scales", "zones", "columns")


def contradictory(form: Form) -> list[str]:
    """Return what of a form cannot be together, one sentence each."""
    problems = []
    if form.rows % form.parts:
        problems.append(f"{form.rows} rows do not divide into {form.parts} parts")
    for plane in planes(form.names):
        own = {n.rpartition(".")[2] for n in form.names if n.startswith(f"plane{plane}.")}
        problems += [f"plane{plane} has {one} and {other}: it can have one of them"
                     for one, other in APART if {one, other} <= own]
        if plane and form.plane_ratio != 1:
            problems += [f"plane{plane} has {name}, but its scales are those of plane0"
                         for name in OF_FIRST if name in own]
    return problems


def check(form: Form, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]
          ) -> list[str]:
    """Return what is wrong with the given tensors of a weight, one sentence each; [] when right.

    `shapes` and `dtypes` are keyed by tensor name; shapes include the expert axis if there is one.
    """
    problems = incomplete(form) + contradictory(form)
    lead = (form.experts,) if form.experts else ()
    inner = {n: tuple(s[len(lead):]) for n, s in shapes.items()}
    lengths = axis_lengths(form, inner)
    for name in form.names:
        if name not in shapes:
            problems.append(f"{name} is missing")
            continue
        spec = row(name, form.names)
        want = lead + tuple(lengths[name][axis] for axis in spec.axes)
        shape = tuple(shapes[name])
        fits = len(want) == len(shape) and all(w is None or w == s for w, s in zip(want, shape))
        if not fits:
            wanted = [spec.axes[i - len(lead)] if w is None else w for i, w in enumerate(want)]
            problems.append(f"{name} has shape {list(shape)}, expected {wanted}")
        if dtypes[name] not in spec.dtypes:
            found, *allowed = (str(d).removeprefix("torch.") for d in (dtypes[name], *spec.dtypes))
            problems.append(f"{name} is {found}, expected {' or '.join(allowed)}")
    problems += [f"{name} is not part of this weight" for name in shapes if name not in form.names]
    return problems


def damaged_columns(named: Mapping[str, torch.Tensor], columns: int) -> list[str]:
    """Return what is wrong with the lists of column numbers among the tensors of a weight [N, K].

    They are read as places in memory, so everything that reads them asks here first.
    """
    def fits(numbers: torch.Tensor) -> bool:
        rising = (numbers[..., 1:] > numbers[..., :-1]).all()
        return bool(rising and (numbers >= 0).all() and (numbers < columns).all())

    return [f"{name} is not sorted or not within 0..{columns - 1}"
            for name, numbers in named.items() if name.endswith(".columns") and not fits(numbers)]
