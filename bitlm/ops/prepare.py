"""Brings the stored tensors of a packed weight into the one block of memory that kernels read.

A form is a sum of terms; a prepared weight (native/bitlm.h) is a flat program of few primitives:
code matrices and dense products over inputs, stages, lists of salient entries. `prepare` writes
every form as such a program. What is not obvious:

- Planes whose scales halve are one grid: sum_p 2^-p s_p = 2^-(P-1) (2u - (2^P - 1)).
- Zones of binary planes: the scale S0 or S1 by zone bit z = +-1 is (S0+S1)/2 + z (S1-S0)/2, and a
  sign times z is a sign: two binary matrices. Ternary planes are masked by zone instead.
- Salient entries replace planes and shift: sign bits (and zone bits) there are cleared, so that
  every such entry of a row and group has one known value, and the list's correction takes that
  away. Where a row and group has more than one (planes over some columns, scales of rank k), the
  plane becomes ternary with zeros there.
- Salient columns: planes and shift read an input that is 0 there; the values are a grid of 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, sizeof

import torch
from torch import Tensor

from . import library, structs
from .bits import pack_bits, unpack_bits, unpack_trits
from .blob import Blob, padded
from .form import Form, chains, damaged_columns, planes, row
from .restore import Origin
from .structs import BINARY, BLOCK_ROWS, GRID, LIST_BYTES, MAX_BITS, TERNARY, TYPES

Tensors = dict[str, Tensor]


def prepare(form: Form, tensors: Sequence[Tensor], order: int, threads: int = 1
            ) -> tuple[Tensor, list[Origin]]:
    """Return the prepared weight, uint8 [bytes], and where stored tensors can be read back from it.

    tensors: on the CPU, as `form.check` wants them. order: of codes, structs.BYTES or DWORDS.
    Raises ValueError for damaged salient entries or lists of columns, RuntimeError when the native
    library is missing or refuses.
    """
    named = {name: tensor.detach().contiguous()
             for name, tensor in zip(form.names, tensors, strict=True)}
    damaged = damaged_columns(named, form.columns)
    if damaged:
        raise ValueError("; ".join(damaged))
    apart = form.parts if any("P" in row(name, form.names).axes for name in named) else 1
    subs = (form.experts or 1) * apart
    blob = Blob(sizeof(structs.Weight) + subs * sizeof(structs.Sub), order)
    heads = []
    for expert in range(form.experts or 1):
        own = {n: t[expert] for n, t in named.items()} if form.experts else named
        rows = form.rows // apart
        for part in range(apart):
            cut = {n: t[part * rows:(part + 1) * rows] if row(n, form.names).axes[0] == "N"
                   else t[part] for n, t in own.items()}
            blob.stored |= {id(t): (n, t.data_ptr() - named[n].data_ptr()) for n, t in cut.items()}
            heads.append(_Sub(blob, form, cut, rows).head(part * rows))
            blob.stored.clear()
    head = structs.Weight(structs.MAGIC, 0, order, form.experts, apart, form.rows, form.columns)
    return blob.write(head, heads, threads), blob.origins


class _Sub:
    """One sub-weight: the terms of one part of one expert, written as the structs of bitlm.h."""

    def __init__(self, blob: Blob, form: Form, named: Tensors, rows: int) -> None:
        self.blob, self.form, self.named, self.rows = blob, form, named, rows
        self.inputs: list[structs.Input] = []
        self.matrices: list[structs.Matrix] = []
        self.stage_matrices: list[structs.Matrix] = []
        self.denses: list[structs.Dense] = []
        self.projections: list[structs.Projection] = []
        self.lists: list[structs.List] = []
        self.stages: list[int] = []
        self._known: dict[tuple, int] = {}
        self.salient = self._salient_mask()
        # What is taken away at the salient entries of a row and group: [N, G].
        self.correction = torch.zeros(rows, form.groups if self.salient is not None else 0)
        self._planes()
        self._shift()
        self._salient_list()
        self._salient_columns()
        for chain in chains(form.names):
            self._chain({n.split(".", 1)[1]: t for n, t in named.items()
                         if n.startswith(f"chain{chain}.")}, chain)
        self._low_rank()

    def head(self, first_row: int) -> structs.Sub:
        matrices = [*self.stage_matrices, *self.matrices]
        write = self.blob.structs
        return structs.Sub(
            self.rows, self.form.columns, first_row, len(self.stages), len(self.inputs),
            len(matrices), len(self.denses), len(self.projections), len(self.lists), 0,
            write(self.inputs), write(matrices), write(self.denses), write(self.projections),
            write(self.lists), self.blob.array(torch.tensor(self.stages, dtype=torch.int32)))

    # Inputs ---------------------------------------------------------------------------------------

    def _input(self, key: str, group_size: int, columns: Tensor | None = None,
               scales: Tensor | None = None, replaced: bool = False) -> int:
        """Return the number of an input made of x.

        key: tells inputs with different `columns` or `scales` apart. scales: [k, C], for the
        covered columns. replaced: salient columns are 0 in it.
        """
        group_size = min(group_size, self.form.columns if columns is None else len(columns))
        replaced = replaced and "salient.columns" in self.named
        known = (key, group_size, replaced)
        if known in self._known:
            return self._known[known]
        covered = slice(None) if columns is None else columns.long()
        factors = None
        if scales is not None or replaced or "input_scales" in self.named:
            factors = torch.zeros(1 if scales is None else len(scales), self.form.columns)
            factors[:, covered] = torch.ones(()) if scales is None else scales.float()
            if "input_scales" in self.named:
                factors *= self.named["input_scales"].float()
            if replaced:
                factors[:, self.named["salient.columns"].long()] = 0
        self.inputs.append(structs.Input(
            structs.shape(self.form.columns if columns is None else len(columns), group_size),
            0 if factors is None else self.blob.array(factors),
            0 if columns is None else self.blob.array(columns.to(torch.int32)),
            -1, 1 if factors is None else len(factors)))
        self._known[known] = len(self.inputs) - 1
        return self._known[known]

    def _groups(self) -> int:
        """Return the input that planes over all columns, shift and salient entries read."""
        return self._input("", self.form.group_size, replaced=True)

    # Matrices -------------------------------------------------------------------------------------

    def _matrix(self, source: int, factor: float, scales: Tensor | None, kind: int,
                signs: Sequence[Tensor] = (), mask: Tensor | None = None,
                trits: Tensor | None = None, base_3: bool = False, output: int = -1,
                rows: int | None = None) -> None:
        """Add a matrix of codes. scales: [N, G], or [N, k] with an input of rank k."""
        rows = self.rows if rows is None else rows
        read = self.inputs[source]
        by_rank = read.rank > 1
        codes, base_3 = self.blob.codes(kind, rows, read.shape, signs, mask, trits, base_3)
        matrix = structs.Matrix(
            codes=codes, kind=kind, bits=2 if kind == TERNARY else len(signs), trits=base_3,
            rows=rows, input=source, output=output, factor=factor)
        if by_rank:
            matrix.row_scales = self.blob.array(padded(scales.float()).T)
        elif scales is not None:
            matrix.scales, matrix.scale_type = self.blob.by_row(scales), TYPES[scales.dtype]
        (self.matrices if output < 0 else self.stage_matrices).append(matrix)

    def _planes(self) -> None:
        numbers = planes(self.form.names)
        ratio = self.form.plane_ratio
        shared = self._plane(0) if ratio != 1 and 0 in numbers else {}
        scaled = {n: shared[n] for n in ("scales", "row_scales", "column_scales", "zones",
                                         "columns") if n in shared}
        if self._is_grid(numbers, scaled):
            own = [self._plane(p)["signs"] for p in numbers]
            self._scaled_plane("plane0", scaled, 2.0 ** (1 - len(own)), own)
            return
        for p in numbers:
            own = self._plane(p) | scaled
            # Also a plane that halves may cover the columns of plane 0 and no others.
            key = f"plane{p}" if ratio == 1 else "plane0"
            self._scaled_plane(key, own, float(ratio) ** -p if ratio != 1 else 1.0)

    def _plane(self, number: int) -> Tensors:
        return {n.split(".", 1)[1]: t for n, t in self.named.items()
                if n.startswith(f"plane{number}.")}

    def _is_grid(self, numbers: list[int], scaled: Tensors) -> bool:
        """Tell whether the planes are one grid: binary, halving, none missing."""
        irregular = self.salient is not None and not _regular(scaled)
        return (self.form.plane_ratio == 2 and 2 <= len(numbers) <= MAX_BITS
                and numbers == list(range(len(numbers))) and "zones" not in scaled
                and not irregular
                and all(set(self._plane(p)) - set(scaled) == {"signs"} for p in numbers))

    def _scaled_plane(self, key: str, own: Tensors, factor: float,
                      grid: list[Tensor] | None = None) -> None:
        """Add one plane, or one grid of planes, with its scales."""
        columns = own.get("columns")
        covered = self.form.columns if columns is None else len(columns)
        if covered == 0:
            return
        if "scales" in own:
            scales = own["scales"]
            source = self._groups() if columns is None else self._input(
                key, self.form.group_size, columns, replaced=True)
        else:
            scales = own["row_scales"]
            source = self._input(key, covered, columns, own["column_scales"], replaced=True)
        if not scales.shape[-1]:
            return  # rank 0
        salient = self.salient
        if grid is not None:
            if salient is not None:
                grid = [signs & ~salient for signs in grid]
                self.correction += scales.float() * (factor * (2 ** len(grid) - 1))
            self._matrix(source, factor, scales, GRID, grid)
            return
        binary = not {"mask", "trits"} & set(own)
        if salient is not None and not _regular(own):
            keep = ~salient if columns is None else pack_bits(
                ~unpack_bits(salient, self.form.columns)[:, columns.long()])
            binary = False
        else:
            keep = None if salient is None else ~salient
        if binary:
            signs = own["signs"] if keep is None else own["signs"] & keep
            self._binary(source, factor, scales, signs, own.get("zones"), keep)
        elif keep is None and "zones" not in own:
            codes = {"trits": own["trits"]} if "trits" in own else {
                "signs": [own["signs"]], "mask": own["mask"]}
            self._matrix(source, factor, scales, TERNARY, **codes, base_3="trits" in own)
        else:
            self._ternary(source, factor, scales, own, keep, covered)

    def _binary(self, source: int, factor: float, scales: Tensor, signs: Tensor,
                zones: Tensor | None, keep: Tensor | None) -> None:
        if zones is None:
            self._matrix(source, factor, scales, BINARY, [signs])
            first = scales
        else:
            zones = zones if keep is None else zones & keep
            first, second = scales.float().chunk(2, -1)
            self._matrix(source, factor, (first + second) / 2, BINARY, [signs])
            self._matrix(source, factor, (second - first) / 2, BINARY, [~(signs ^ zones)])
        if keep is not None:  # the sign is -1 there, the zone 0
            self.correction += first.float() * factor

    def _ternary(self, source: int, factor: float, scales: Tensor, own: Tensors,
                 keep: Tensor | None, covered: int) -> None:
        """Add a plane as ternary with zeros where `keep` has none, zone by zone."""
        if "trits" in own:
            codes = unpack_trits(own["trits"], covered)
            signs, mask = pack_bits(codes > 0), pack_bits(codes != 0)
        else:
            signs, mask = own["signs"], own.get("mask", torch.full_like(own["signs"], 255))
        if keep is not None:
            mask = mask & keep
        zones = own.get("zones")
        pieces = [(mask, scales)] if zones is None else zip((mask & ~zones, mask & zones),
                                                            scales.chunk(2, -1))
        for kept, by_zone in pieces:
            self._matrix(source, factor, by_zone, TERNARY, [signs & kept], kept,
                         base_3="trits" in own)

    # Shift and salient entries --------------------------------------------------------------------

    def _shift(self) -> None:
        if "shift" not in self.named:
            return
        shift, source = self.named["shift"], self._groups()
        zones = self._shift_zones()
        if zones is not None:
            first, second = shift.float().chunk(2, -1)
            if self.salient is not None:
                zones = zones & ~self.salient
                self.correction -= first
            self._matrix(source, 1.0, (second - first) / 2, BINARY, [zones])
            shift = (first + second) / 2
        elif self.salient is not None:
            self.correction -= shift.float()
        self._sums(source, shift)

    def _sums(self, source: int, values: Tensor) -> None:
        """Add values [N, G] times the sums of an input's groups."""
        self.denses.append(structs.Dense(self.blob.by_row(values), TYPES[values.dtype],
                                         values.shape[-1], source, -1))

    def _shift_zones(self) -> Tensor | None:
        """Return the zone bits of plane 0, which the shift shares; 0 where it has no column."""
        zones, columns = self.named.get("plane0.zones"), self.named.get("plane0.columns")
        if zones is None or columns is None:
            return zones
        whole = torch.zeros(self.rows, self.form.columns, dtype=torch.bool)
        whole[:, columns.long()] = unpack_bits(zones, len(columns))
        return pack_bits(whole)

    def _salient_mask(self) -> Tensor | None:
        """Return the bitmap of salient entries with padding bits 0, None without entries."""
        mask = self.named.get("salient.mask")
        if mask is None or not self.rows:
            return None
        if self.form.columns % 8:
            mask = mask.clone()
            mask[:, -1] &= 2 ** (self.form.columns % 8) - 1
        count = int.from_bytes(mask.numpy().tobytes(), "little").bit_count()
        values = self.named["salient.values"].shape[-1]
        if count > values:
            raise ValueError(f"salient.mask has more bits set than the {values} stored "
                             f"salient.values: {count}")
        return mask if count else None

    def _salient_list(self) -> None:
        if self.salient is None:
            return
        source = self._groups()
        shape = self.inputs[source].shape
        mask, values = self.salient.contiguous(), self.named["salient.values"].contiguous()
        starts = torch.zeros(-(-self.rows // BLOCK_ROWS) * 4, structs.chunks(shape) + 1,
                             dtype=torch.int32)
        call = library.native().bitlm_salient
        fixed = mask.data_ptr(), values.data_ptr(), self.rows, byref(shape), starts.data_ptr()
        entries = torch.empty(call(*fixed, None) * LIST_BYTES, dtype=torch.uint8)
        call(*fixed, entries.data_ptr())
        scales = self.named["salient.scales"].float()
        zeros = scales * self.named["salient.zeros"].float()
        self.correction -= zeros.unsqueeze(-1)
        self.lists.append(structs.List(
            self.blob.array(starts), self.blob.array(entries), self.blob.array(padded(scales)),
            self.blob.by_row(self.correction), source))

    def _salient_columns(self) -> None:
        if not self.named.get("salient.columns", torch.empty(0)).numel():
            return
        columns, values = self.named["salient.columns"], self.named["salient.values"]
        source = self._input("salient", len(columns), columns)
        bits = [pack_bits((values >> bit & 1).bool()) for bit in range(7, -1, -1)]
        scales = self.named["salient.scales"].unsqueeze(-1)
        # u = (2u - 255) / 2 + 127.5
        self._matrix(source, 0.5, scales, GRID, bits)
        zeros = self.named["salient.zeros"].unsqueeze(-1).float()
        self._sums(source, scales.float() * (127.5 - zeros))

    # Stages ---------------------------------------------------------------------------------------

    def _chain(self, own: Tensors, number: int) -> None:
        rank = len(own["rank_scales"])
        if not rank:
            return
        stage = len(self.stages)
        self.stages.append(rank)
        source = self._input(f"chain{number}", self.form.columns,
                             scales=own["column_scales"].unsqueeze(0))
        self._matrix(source, 1.0, own["rank_scales"].unsqueeze(-1), BINARY, [own["right"]],
                     output=stage, rows=rank)
        self.inputs.append(structs.Input(structs.shape(rank, rank), 0, 0, stage, 1))
        self._matrix(len(self.inputs) - 1, 1.0, own["row_scales"].unsqueeze(-1), BINARY,
                     [own["left"]])

    def _low_rank(self) -> None:
        if "low_rank.u" not in self.named or not self.named["low_rank.u"].shape[-1]:
            return
        u, v = self.named["low_rank.u"], self.named["low_rank.v"]
        scales = self.named.get("input_scales")
        self.projections.append(structs.Projection(
            self.blob.array(v), 0 if scales is None else self.blob.array(scales.float()),
            TYPES[v.dtype], len(v), self.form.columns, len(self.stages)))
        self.denses.append(structs.Dense(self.blob.by_row(u), TYPES[u.dtype], len(v), -1,
                                         len(self.stages)))
        self.stages.append(len(v))


def _regular(own: Tensors) -> bool:
    """Tell whether a plane's scales are those of the salient list's rows and groups."""
    return "columns" not in own and "scales" in own
