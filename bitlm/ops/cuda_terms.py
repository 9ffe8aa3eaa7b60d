"""What CUDA launches a packed weight needs, worked out once from its form and tensors.

Kernels read the stored tensors where they are. Only small things are made here: multipliers of
inputs joined into one, where rows' salient values begin, bit planes gathered for column subsets.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bits import pack_bits, unpack_bits
from .cache import OfTensors, must_fit, undisturbed
from .cuda_structs import MANY_PASSES, MAX_PASSES, STEP_COLUMNS, Pass
from .form import Form, chains, damaged_columns, parse, planes, row
from .structs import TYPES

Tensors = dict[str, Tensor]


@dataclass(eq=False)
class Source:
    """An input of products: `rank` scaled copies of some columns of x, grouped.

    places: int32 [columns] or None: which columns of x. multipliers: fp32 [rank, columns] or None.
    """

    columns: int
    group_size: int
    places: Tensor | None = None
    multipliers: Tensor | None = None
    rank: int = 1


@dataclass(eq=False)
class Product:
    """Passes over the columns of one source, at most MAX_PASSES."""

    source: Source
    rows: int
    passes: list[Pass]


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
class Part:
    """The terms of rows [first, first + rows)."""

    first: int
    rows: int
    products: list[Product] = field(default_factory=list)
    ranked: list[Ranked] = field(default_factory=list)
    chains: list[tuple[Product, Product]] = field(default_factory=list)  # right, left
    salient: Salient | None = None
    low_rank: bool = False


def unsupported(form: Form) -> str | None:
    """Return why weights of this form have no kernels, or None."""
    if not form.columns:
        return "a weight without columns has no kernel"
    if form.experts:
        simple = all(name == "shift" or name.startswith("plane") and not
                     name.endswith(("columns", "row_scales", "column_scales"))
                     for name in form.names)
        if not simple or len(form.names) == 0:
            return "fused experts with anything but planes and shift have no kernel"
        if len(planes(form.names)) + ("shift" in form.names) > MAX_PASSES:
            return f"fused experts with more than {MAX_PASSES} planes have no kernel"
    return None


class Terms(OfTensors):
    """The launches of a weight, and the tensors made for them.

    many: whether products of many tokens of 16 bits have a kernel of their own.

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
        rows = form.rows // count
        self.parts = [self._part(own, i * rows, rows) for i, own in
                      enumerate(_split(named, form, count))]
        self.many = all(_fits_many(form, part) for part in self.parts)
        self.remember(tensors)

    def _part(self, named: Tensors, first: int, rows: int) -> Part:
        form, part = self.form, Part(first, rows)
        scales = named["input_scales"].float() if "input_scales" in named else None
        kept_scales = scales  # of what salient columns leave
        if "salient.columns" in named:
            kept_scales = torch.ones(form.columns, dtype=torch.float32,
                                     device=named["salient.columns"].device) \
                if scales is None else scales.clone()
            kept_scales[named["salient.columns"].long()] = 0.0
        whole = Source(form.columns, form.group_size, None, self._keep(kept_scales))
        drop = named.get("salient.mask")
        passes: dict[Source, list[Pass]] = {whole: []}
        subset: Source | None = None
        for own, factor in scaled_planes(named, form):
            columns, dropped, source = own.get("columns"), drop, whole
            if columns is not None:
                if drop is not None:
                    bits = unpack_bits(drop, form.columns)
                    dropped = self._keep(pack_bits(bits[:, columns.long()]))
                if subset is None or form.plane_ratio == 1:
                    picked = None if kept_scales is None else kept_scales[columns.long()]
                    subset = Source(len(columns), form.group_size, self._keep(columns),
                                    self._keep(picked))
                source = subset
            if "scales" in own:
                passes.setdefault(source, []).append(self._pass(own, factor, dropped))
            else:
                part.ranked.append(self._ranked(own, factor, dropped, source, kept_scales, rows))
        if "shift" in named:
            zones = named.get("plane0.zones")
            if zones is not None and "plane0.columns" in named:
                zones = self._keep(_spread(zones, named["plane0.columns"], form.columns))
            own = {"scales": named["shift"]} | ({} if zones is None else {"zones": zones})
            passes[whole].append(self._pass(own, 1.0, drop))
        # The last product writes y, so the widest source comes last.
        for source, own in [*((s, p) for s, p in passes.items() if s is not whole),
                            (whole, passes[whole])]:
            part.products += [Product(source, rows, own[i:i + MAX_PASSES])
                              for i in range(0, len(own), MAX_PASSES)]
        for chain in chains(form.names):
            part.chains.append(self._chain(leaves(named, f"chain{chain}."), scales, rows))
        if "salient.values" in named:
            part.salient = self._salient(named, scales, whole, rows)
        part.low_rank = "low_rank.u" in named
        return part

    def _pass(self, own: Tensors, factor: float, drop: Tensor | None) -> Pass:
        scales = own.get("scales")
        return Pass(self._at(own.get("signs")), self._at(own.get("mask")),
                    self._at(own.get("trits")), self._at(own.get("zones")), self._at(drop),
                    self._at(scales), 0 if scales is None else TYPES[scales.dtype], factor)

    def _ranked(self, own: Tensors, factor: float, drop: Tensor | None, source: Source,
                scales: Tensor | None, rows: int) -> Ranked:
        multipliers = own["column_scales"].float()
        if scales is not None:
            columns = own.get("columns")
            multipliers = multipliers * (scales if columns is None else scales[columns.long()])
        copies = Source(source.columns, source.columns, source.places,
                        self._keep(multipliers.contiguous()), len(multipliers))
        codes = {name: own[name] for name in ("signs", "mask", "trits") if name in own}
        return Ranked(Product(copies, rows, [self._pass(codes, factor, drop)]),
                      self._at(own["row_scales"]), TYPES[own["row_scales"].dtype])

    def _chain(self, own: Tensors, scales: Tensor | None, rows: int) -> tuple[Product, Product]:
        multipliers = own["column_scales"].float()
        multipliers = multipliers if scales is None else multipliers * scales
        rank, columns = own["right"].shape[0], len(multipliers)
        right = Product(Source(columns, columns, None, self._keep(multipliers)), rank,
                        [self._pass({"signs": own["right"]}, 1.0, None)])
        between = Source(rank, rank, None, self._keep(own["rank_scales"].float()))
        left = {"signs": own["left"], "scales": own["row_scales"]}
        return right, Product(between, rows, [self._pass(left, 1.0, None)])

    def _salient(self, named: Tensors, scales: Tensor | None, whole: Source, rows: int) -> Salient:
        mask, starts, source = named.get("salient.mask"), None, whole
        if mask is None:
            columns = named["salient.columns"]
            picked = None if scales is None else self._keep(scales[columns.long()])
            source = Source(len(columns), max(len(columns), 1), self._keep(columns), picked)
        else:
            counts = unpack_bits(mask, self.form.columns).sum(-1)
            ends = counts.cumsum(0)
            if rows and int(ends[-1]) > named["salient.values"].shape[-1]:
                raise ValueError("salient.mask has more bits than salient.values has values")
            starts = self._keep((ends - counts).to(torch.int32))
        return Salient(source, self._at(mask), self._at(named["salient.values"]), self._at(starts),
                       self._at(named["salient.scales"]), TYPES[named["salient.scales"].dtype],
                       self._at(named["salient.zeros"]))

    def _keep(self, made: Tensor | None) -> Tensor | None:
        """Return a copy that lives as long as the terms, of memory that is nobody else's."""
        if made is None:
            return None
        self.kept.append(made.detach().contiguous().clone())
        return self.kept[-1]

    def _at(self, tensor: Tensor | None) -> int:
        """Return where a tensor lies, 0 for none; a copy where it is not in one piece."""
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            tensor = self._keep(tensor)
        return tensor.data_ptr()


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
    grouped = form.group_size >= form.columns or form.group_size % STEP_COLUMNS == 0
    return grouped and form.columns % STEP_COLUMNS == 0 and own.source.places is None and \
        own.source.multipliers is None and \
        0 < len(own.passes) <= MANY_PASSES and \
        not any(p.trits or p.zones or p.drop or (p.signs or 0) % 8 or (p.mask or 0) % 8
                for p in own.passes)


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
                                          "columns") if n in own}
            yield own, 1.0
        else:
            yield own | shared, float(form.plane_ratio) ** -plane


def _split(named: Tensors, form: Form, parts: int) -> Iterator[Tensors]:
    """Yield the tensors of each part, without their parts axis."""
    rows = form.rows // parts
    for i in range(parts):
        own = {}
        for name, tensor in named.items():
            axes = row(name, form.names).axes
            own[name] = tensor[i] if axes[0] == "P" else \
                tensor if parts == 1 else tensor[i * rows:(i + 1) * rows]
        yield own


def _spread(bits: Tensor, places: Tensor, columns: int) -> Tensor:
    """Return packed bits of some columns as bits of all columns, 0 elsewhere."""
    own = unpack_bits(bits, len(places))
    spread = own.new_zeros(len(own), columns)
    spread[:, places.long()] = own
    return pack_bits(spread)
