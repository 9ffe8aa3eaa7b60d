"""What CUDA launches a packed weight needs, worked out once from its form and tensors.

Kernels read the stored tensors where they are. Only small things are made here: multipliers of
inputs joined into one, where rows' salient values begin, bit planes gathered for column subsets.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bits import pack_bits, unpack_bits
from .cache import OfTensors, must_fit, undisturbed
from .cuda_structs import (
    MANY_PASSES,
    MAX_PASSES,
    STEP_COLUMNS,
    UNIT_COLUMNS,
    WIDE_BITS,
    WIDE_PASSES,
    Pass,
)
from .form import Form, chains, damaged_columns, parse, planes, row
from .structs import TYPES

Tensors = dict[str, Tensor]


@dataclass(eq=False)
class Source:
    """An input of products: `rank` scaled copies of some columns of x, grouped.

    places: int32 [E, columns] or None: which columns of x. multipliers: fp32 [E, rank, columns] or
    None. E: experts, 1 where there are none.
    """

    columns: int
    group_size: int
    places: Tensor | None = None
    multipliers: Tensor | None = None
    rank: int = 1


@dataclass(eq=False)
class Product:
    """Passes over the columns of one source, at most MAX_PASSES; perhaps none.

    expert_rows: from an expert's rows of the tensors to the next one's. few: whether many tokens of
    1 and 2 bits have a kernel of their own (bitlm_cuda_few).
    """

    source: Source
    rows: int
    expert_rows: int
    passes: list[Pass]
    few: bool = field(init=False)

    def __post_init__(self) -> None:
        own = self.source
        self.few = bool(self.passes) and _in_steps(own.columns, own.group_size, UNIT_COLUMNS) and \
            all(_plain(each, 16) for each in self.passes)


@dataclass(eq=False)
class Ranked:
    """A plane with rank-k scales: `product` has a result for each of k copies of x."""

    product: Product
    row_scales: int
    scale_type: int


@dataclass(eq=False)
class Salient:
    """Salient entries; mask and starts are 0 where whole columns are salient."""

    source: Source
    mask: int
    values: int
    starts: int
    scales: int
    scale_type: int
    zeros: int


@dataclass(eq=False)
class LowRank:
    """A low-rank term; multipliers: fp32 [E, K] or None, of x."""

    rank: int
    u: int
    u_type: int
    v: int
    v_type: int
    multipliers: Tensor | None


@dataclass(eq=False)
class Part:
    """The terms of rows [first, first + rows). The last product writes y."""

    first: int
    rows: int
    products: list[Product] = field(default_factory=list)
    ranked: list[Ranked] = field(default_factory=list)
    chains: list[tuple[Product, Product]] = field(default_factory=list)  # right, left
    salient: Salient | None = None
    low_rank: LowRank | None = None


def unsupported(form: Form) -> str | None:
    """Return why weights of this form have no kernels, or None."""
    return None if form.columns else "a weight without columns has no kernel"


class Terms(OfTensors):
    """The launches of a weight, and the tensors made for them.

    many: whether products of many tokens of 16 bits have a kernel of their own. wide: the dtypes
    for which sm_90a has another one. input_scales: fp32 [E, P, K] or None.

    Raises RuntimeError naming every tensor that does not fit the form, ValueError for a damaged
    list of columns or salient values.
    """

    def __init__(self, form: Form, tensors: Sequence[Tensor]) -> None:
        must_fit(form, tensors)
        self.form = form
        self.kept: list[Tensor] = []  # nothing but these lives as long as the terms
        named = dict(zip(form.names, tensors))
        problems = damaged_columns(named, form.columns)
        if problems:
            raise ValueError("; ".join(problems))
        by_part = any("P" in row(name, form.names).axes for name in form.names)
        count = form.parts if by_part else 1
        named = self._with_made({name: self._whole(t) for name, t in named.items()}, count)
        self.input_scales = named.get("input_scales")
        self.parts = [self._part(own, part, form.rows // count) for part, own in
                      enumerate(_split(named, form, count))]
        self.many = all(_fits_many(form, part) for part in self.parts)
        self.wide = frozenset(dtype for dtype in (torch.float16, torch.bfloat16) if self.many and
                              all(_fits_wide(part.products[0], dtype) for part in self.parts))
        self.remember(tensors)

    def _whole(self, tensor: Tensor) -> Tensor:
        """Return a tensor in one piece, a copy where it is not, with an experts axis."""
        if not tensor.is_contiguous():
            tensor = self._keep(tensor)
        return tensor if self.form.experts else tensor.unsqueeze(0)

    def _with_made(self, named: Tensors, parts: int) -> Tensors:
        """Add what kernels read beside the tensors of the file, for all rows and experts.

        input_scales: in fp32. salient.starts: int64 [E, N], where a row's values begin.
        planeP.drop: the salient entries among the columns that a plane covers. shift.zones: the
        zones of plane 0 by column of x.
        """
        columns, made = self.form.columns, {}
        if "input_scales" in named:
            made["input_scales"] = self._keep(named["input_scales"].float())
        mask = named.get("salient.mask")
        if mask is not None:
            made["salient.starts"] = self._keep(_starts(mask, named["salient.values"], columns))
            for name, places in named.items():
                if name.startswith("plane") and name.endswith(".columns"):
                    made[name.replace("columns", "drop")] = self._keep(_each_part(
                        mask, places, lambda bits, own: unpack_bits(bits, columns)[:, own]))
        if "shift" in named and "plane0.zones" in named:
            made["shift.zones"] = zones = named["plane0.zones"]
            if "plane0.columns" in named:
                made["shift.zones"] = self._keep(_each_part(
                    zones, named["plane0.columns"],
                    lambda bits, own: _spread(bits, own, columns)))
        return named | made

    def _part(self, named: Tensors, index: int, rows: int) -> Part:
        form, part = self.form, Part(index * rows, rows)
        scales = named.get("input_scales")
        kept_scales = scales  # of what salient columns leave
        if "salient.columns" in named:
            columns = named["salient.columns"].long()
            kept_scales = torch.ones(len(columns), form.columns, dtype=torch.float32,
                                     device=columns.device) if scales is None else scales.clone()
            kept_scales.scatter_(1, columns, 0.0)
        whole = Source(form.columns, form.group_size, None, self._keep(kept_scales))
        drop = named.get("salient.mask")
        passes: dict[Source, list[Pass]] = {whole: []}
        subset: Source | None = None
        for own, factor in scaled_planes(named, form):
            columns, source = own.get("columns"), whole
            if columns is not None and (subset is None or form.plane_ratio == 1):
                picked = None if kept_scales is None else kept_scales.gather(1, columns.long())
                subset = Source(columns.shape[-1], form.group_size, self._keep(columns),
                                self._keep(picked))
            source = whole if columns is None else subset
            dropped = drop if columns is None else own.get("drop")
            if "scales" in own:
                passes.setdefault(source, []).append(_pass(own, factor, dropped))
            else:
                part.ranked.append(self._ranked(own, factor, dropped, source, kept_scales, rows))
        if "shift" in named:
            own = {"scales": named["shift"]}
            if "shift.zones" in named:
                own["zones"] = named["shift.zones"]
            passes[whole].append(_pass(own, 1.0, drop))
        # The widest source comes last, and there is one product at least.
        for source, own in [*((s, p) for s, p in passes.items() if s is not whole),
                            (whole, passes[whole])]:
            part.products += [Product(source, rows, form.rows, own[i:i + MAX_PASSES])
                              for i in range(0, len(own), MAX_PASSES)]
        part.products = part.products or [Product(whole, rows, form.rows, [])]
        for chain in chains(form.names):
            part.chains.append(self._chain(leaves(named, f"chain{chain}."), scales, rows))
        if "salient.values" in named:
            part.salient = self._salient(leaves(named, "salient."), scales, whole)
        if "low_rank.u" in named:
            u, v = named["low_rank.u"], named["low_rank.v"]
            part.low_rank = LowRank(u.shape[-1], u.data_ptr(), TYPES[u.dtype], v.data_ptr(),
                                    TYPES[v.dtype], self._keep(scales) if form.experts else None)
        return part

    def _ranked(self, own: Tensors, factor: float, drop: Tensor | None, source: Source,
                scales: Tensor | None, rows: int) -> Ranked:
        multipliers, columns = own["column_scales"].float(), own.get("columns")
        if scales is not None:
            picked = scales if columns is None else scales.gather(1, columns.long())
            multipliers = multipliers * picked.unsqueeze(1)
        copies = Source(source.columns, source.columns, source.places, self._keep(multipliers),
                        multipliers.shape[1])
        codes = {name: own[name] for name in ("signs", "mask", "trits") if name in own}
        product = Product(copies, rows, self.form.rows, [_pass(codes, factor, drop)])
        return Ranked(product, own["row_scales"].data_ptr(), TYPES[own["row_scales"].dtype])

    def _chain(self, own: Tensors, scales: Tensor | None, rows: int) -> tuple[Product, Product]:
        multipliers = own["column_scales"].float()
        multipliers = multipliers if scales is None else multipliers * scales
        form, rank, columns = self.form, own["right"].shape[-2], self.form.columns
        right = Product(Source(columns, columns, None, self._keep(multipliers)), rank,
                        form.parts * rank, [_pass({"signs": own["right"]}, 1.0, None)])
        between = Source(rank, rank, None, self._keep(own["rank_scales"].float()))
        left = {"signs": own["left"], "scales": own["row_scales"]}
        return right, Product(between, rows, form.rows, [_pass(left, 1.0, None)])

    def _salient(self, own: Tensors, scales: Tensor | None, whole: Source) -> Salient:
        columns, source = own.get("columns"), whole
        if columns is not None:
            picked = None if scales is None else self._keep(scales.gather(1, columns.long()))
            width = columns.shape[-1]
            source = Source(width, max(width, 1), self._keep(columns), picked)
        return Salient(source, _at(own.get("mask")), _at(own["values"]), _at(own.get("starts")),
                       _at(own["scales"]), TYPES[own["scales"].dtype], _at(own["zeros"]))

    def _keep(self, made: Tensor | None) -> Tensor | None:
        """Return a tensor that lives as long as the terms: a copy, unless it is a part of one."""
        if made is None:
            return None
        memory = made.untyped_storage().data_ptr()
        if made.is_contiguous() and memory in {t.untyped_storage().data_ptr() for t in self.kept}:
            return made
        self.kept.append(made.detach().contiguous().clone())
        return self.kept[-1]


_known: dict[int, Terms] = {}  # by the address of the first tensor


def terms(text: str, tensors: Sequence[Tensor]) -> Terms:
    """Return the terms of a weight; makes them at the first call, which waits for the device.

    Raises RuntimeError where that call is in the capture of a graph, which would own what is made.
    """
    address = tensors[0].data_ptr()
    found = _known.get(address)
    if found is None or found.form is not parse(text) or not found.is_of(tensors):
        found = _made(parse(text), tensors)
        _known[address] = found
        weakref.finalize(tensors[0], _forget, address, weakref.ref(found)).atexit = False
    return found


def _made(form: Form, tensors: Sequence[Tensor]) -> Terms:
    """Make terms whose tensors are whole, and no graph's, when this returns."""
    device = tensors[0].device
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        with undisturbed():
            found = Terms(form, tensors)
        if device.type == "cuda" and found.kept:
            raise RuntimeError("a weight is used for the first time while a CUDA graph is captured:"
                               " call the model once before")
        return found

    def make() -> Terms:
        with torch.cuda.device(device):
            found = Terms(form, tensors)
            torch.cuda.current_stream().synchronize()
        return found

    # In a thread of its own, where no pool of a graph that torch.compile warms up is in force.
    torch.cuda.current_stream(device).synchronize()
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def _forget(address: int, entry: weakref.ref[Terms]) -> None:
    found = entry()
    if found is not None and _known.get(address) is found:
        del _known[address]


def _fits_many(form: Form, part: Part) -> bool:
    """Tell whether the product of many tokens has a kernel (bitlm_cuda_many)."""
    if part.ranked or part.chains or part.salient or part.low_rank or len(part.products) != 1:
        return False
    own = part.products[0]
    return _in_steps(form.columns, form.group_size, STEP_COLUMNS) and \
        own.source.places is None and own.source.multipliers is None and \
        0 < len(own.passes) <= MANY_PASSES and all(_plain(each, 8) for each in own.passes)


def _fits_wide(product: Product, dtype: torch.dtype) -> bool:
    """Tell whether a product that fits many tokens has a kernel on sm_90a (bitlm_cuda_wide).

    Its weights are of `dtype`, and fp16 does not hold what other types of scales do.
    """
    coded = [each for each in product.passes if each.signs]
    bits = sum(1 + bool(each.mask) for each in coded)
    held = dtype == torch.bfloat16 or all(each.scale_type == TYPES[torch.float16]
                                          for each in product.passes if each.scales)
    return 0 < bits <= WIDE_BITS and len(product.passes) <= WIDE_PASSES and held


def _in_steps(columns: int, group_size: int, step: int) -> bool:
    """Tell whether groups, or the one that there is, are whole steps of columns."""
    return columns % step == 0 and (group_size >= columns or group_size % step == 0)


def _plain(given: Pass, alignment: int) -> bool:
    """Tell whether a pass is a shift, or signs and perhaps a mask at multiples of `alignment`."""
    return not (given.trits or given.zones or given.drop or (given.signs or 0) % alignment
                or (given.mask or 0) % alignment)


def leaves(named: Tensors, prefix: str) -> Tensors:
    """Return the tensors of one term by the last piece of their names."""
    return {name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)}


def scaled_planes(named: Tensors, form: Form) -> Iterator[tuple[Tensors, float]]:
    """Yield the tensors of each plane, with the scales that it uses, and their factor."""
    shared: Tensors = {}
    for plane in planes(form.names):
        own = leaves(named, f"plane{plane}.")
        if form.plane_ratio == 1 or plane == 0:
            shared = {n: own[n] for n in ("scales", "row_scales", "column_scales", "zones",
                                          "columns", "drop") if n in own}
            yield own, 1.0
        else:
            yield own | shared, float(form.plane_ratio) ** -plane


def _pass(own: Tensors, factor: float, drop: Tensor | None) -> Pass:
    scales = own.get("scales")
    return Pass(_at(own.get("signs")), _at(own.get("mask")), _at(own.get("trits")),
                _at(own.get("zones")), _at(drop), _at(scales),
                0 if scales is None else TYPES[scales.dtype], factor)


def _at(tensor: Tensor | None) -> int:
    """Return where a tensor lies, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def _split(named: Tensors, form: Form, parts: int) -> Iterator[Tensors]:
    """Yield the tensors of each part, in place: [E, rows of the part, ...], or [E, ...] of those
    with a parts axis. The list of salient values stays whole.
    """
    rows = form.rows // parts
    for part in range(parts):
        own = {}
        for name, tensor in named.items():
            if name == "salient.values" and "salient.mask" in named:
                own[name] = tensor
            elif name.endswith((".drop", ".starts")) or name == "shift.zones" or \
                    row(name, form.names).axes[0] == "N":
                own[name] = tensor[:, part * rows:(part + 1) * rows]
            else:
                own[name] = tensor[:, part]
        yield own


def _starts(mask: Tensor, values: Tensor, columns: int) -> Tensor:
    """Return where in all of values [E, P, M] those of each row of mask [E, N, K / 8] begin."""
    experts, parts, most = values.shape
    counts = torch.stack([unpack_bits(own, columns).sum(-1) for own in mask])
    counts = counts.view(experts, parts, -1)
    ends = counts.cumsum(-1)
    if ends.numel() and int(ends[..., -1].max()) > most:
        raise ValueError("salient.mask has more bits than salient.values has values")
    firsts = torch.arange(experts * parts, device=mask.device).view(experts, parts, 1) * most
    return (firsts + ends - counts).view(experts, -1)


def _each_part(bits: Tensor, places: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return `of` packed bits of a part [rows, ...] and its columns [C], for all parts.

    bits: [E, N, ...] packed. places: [E, P, C]. Returns [E, N, ...], packed.
    """
    parts = bits.unflatten(1, (places.shape[1], -1)).flatten(0, 1)
    made = [pack_bits(of(own, columns.long())) for own, columns in zip(parts, places.flatten(0, 1))]
    return torch.stack(made).view(*bits.shape[:2], -1)


def _spread(bits: Tensor, places: Tensor, columns: int) -> Tensor:
    """Return packed bits of some columns as bits of all columns, 0 elsewhere, unpacked."""
    own = unpack_bits(bits, len(places))
    spread = own.new_zeros(len(own), columns)
    spread[:, places] = own
    return spread
