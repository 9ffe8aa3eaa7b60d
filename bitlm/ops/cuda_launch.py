"""Launches of the CUDA kernels: what a call of a linear layer, or rows of a weight, comes to.

Everything is allocated through torch and launched on the current stream of the current device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from ctypes import byref
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from . import cuda_table
from . import library as native
from .cuda_structs import (
    DIGIT_WORDS,
    MANY_PASSES,
    MAX_PASSES,
    Combine,
    Input,
    Many,
    Order,
    Pass,
    Product,
    Rows,
    Salient,
    Thin,
    units_of,
)
from .cuda_table import Settings
from .cuda_terms import Part, Source, Terms, terms
from .cuda_terms import Product as ProductTerm
from .form import Form, planes
from .rounding import LEVELS
from .structs import ACTIVATIONS, TYPES

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
_FLOAT, _INT16 = _NUMBERS["float"], _NUMBERS["int16"]
WIDE_ARCHITECTURE = "90a"
_LEVELS = {_NUMBERS[name] for name in LEVELS}
# Cards whose products of sm_90a were compared with the reference: see cuda.unfit.
wide_cards: set[torch.device] = set()
# Rows of inputs are filled up to whole blocks of tokens.
_MOST_BLOCK_TOKENS = 8


def on(device: torch.device) -> AbstractContextManager:
    """Make a device the current one: kernels run where the current context is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def linear(x: Tensor, tensors: list[Tensor], form: Form, bias: Tensor | None,
           offsets: Tensor | None, activation: str, step: Tensor | None,
           settings: Settings | None = None) -> Tensor:
    """Return the product [tokens, N] of x [tokens, K] by the kernels, on the current device.

    offsets, step: moved to it. settings: None for what suits the card and was compared with the
    reference there.
    Raises RuntimeError for a bias or offsets of another shape, and with the name of a CUDA error.
    """
    weight = terms(form.text, tensors)
    trusted = settings is not None or x.device.type != "cuda" or x.device in wide_cards
    settings = settings or settings_of(x.device)
    work = _work(x, weight, activation, settings, trusted)
    if work == "dense":
        return _dense_linear(x, weight, _bias(bias, form))
    if work in ("many", "wide"):
        return _many_linear(x, weight, _bias(bias, form), _offsets(offsets, form, x.device),
                            settings, work == "wide")
    call = _Call(weight, dict(zip(form.names, tensors)), x, _NUMBERS[activation], step, settings,
                 _offsets(offsets, form, x.device))
    return call.linear(_bias(bias, form))


def no_rows(form: Form) -> str | None:
    """Return why rows of the weight have no kernel, or None."""
    other = ("chain", "low_rank", "salient.columns")
    if any(name.startswith(other) or name.endswith(("columns", "column_scales"))
           for name in form.names):
        return "rows with chains, low-rank terms, column subsets or rank-k scales have no kernel"
    passes = len(planes(form.names)) + ("shift" in form.names)
    if not 0 < passes <= MAX_PASSES:
        return f"rows of no plane, or of more than {MAX_PASSES}, have no kernel"
    return None


def _launch(function: str, struct: object, device: torch.device) -> None:
    """Launch on the current stream. Raises RuntimeError with the name of a CUDA error."""
    library = native.load("bitlm_cuda").library
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    status = getattr(library, function)(byref(struct), stream)
    if status:
        name, text = (getattr(library, f"bitlm_cuda_error_{what}")(status).decode()
                      for what in ("name", "text"))
        raise RuntimeError(f"{function} on {device} failed with {name}: {text}")


class _Staged:
    """A rounded input in device memory: the struct, and the tensors that it points to."""

    def __init__(self, struct: Input, *kept: Tensor | None) -> None:
        self.struct, self.kept = struct, kept


class _Call:
    """One call of a linear layer: x [tokens, K] and what is launched for it."""

    def __init__(self, weight: Terms, named: dict[str, Tensor], x: Tensor, activation: int,
                 step: Tensor | None, settings: Settings, offsets: Tensor | None = None) -> None:
        self.weight, self.named, self.x, self.offsets = weight, named, x, offsets
        self.experts = weight.form.experts
        self.activation, self.settings = activation, settings
        self.step = None if step is None else step.to(x.device, torch.float32).contiguous()
        self.staged: dict[tuple[Source, bool], _Staged] = {}

    def linear(self, bias: Tensor | None) -> Tensor:
        """Return y [tokens, N]."""
        x, form = self.x, self.weight.form
        new = x.new_zeros if self.experts else x.new_empty
        y = new(x.shape[0], form.rows)
        if not y.numel():
            return y
        parts = self.weight.parts
        sums = None
        if any(len(p.products) != 1 or p.ranked or p.chains or p.salient or p.low_rank
               for p in parts):
            sums = torch.empty(y.shape, dtype=torch.float32, device=x.device)
        for part in parts:
            own = slice(part.first, part.first + part.rows)
            self._part(part, y, sums, None if bias is None else bias[..., own].contiguous())
        return y

    def _part(self, part: Part, y: Tensor, sums: Tensor | None, bias: Tensor | None) -> None:
        """Write the part's columns of y. sums: fp32 like y, for terms before the last one."""
        added = False
        if part.low_rank is not None:
            (self._low_rank_of_experts if self.experts else self._low_rank)(part, sums)
            added = True
        for right, left in part.chains:
            between = self.x.new_empty((len(self.x), right.rows), dtype=torch.float32)
            self._product(right, between, 0)
            self._product(left, sums, part.first, sums if added else None, source=between)
            added = True
        for ranked in part.ranked:
            copies = ranked.product.source.rank
            products = sums.new_empty(len(self.x) * copies, part.rows)
            self._product(ranked.product, products, 0)
            self._combine(part, products, ranked.row_scales, ranked.scale_type, copies, sums, added)
            added = True
        if part.salient is not None:
            self._salient(part, sums, added)
            added = True
        for product in part.products[:-1]:
            self._product(product, sums, part.first, sums if added else None)
            added = True
        self._product(part.products[-1], y, part.first, sums if added else None, bias)

    def _combine(self, part: Part, products: Tensor, row_scales: int, scale_type: int, rank: int,
                 sums: Tensor, add: bool) -> None:
        """Put `rank` products of a token together in the part's sums."""
        _launch("bitlm_cuda_combine_launch", Combine(
            products.data_ptr(), row_scales, self._ends(), sums.data_ptr(), scale_type,
            len(self.x), rank, part.rows, sums.shape[1], part.first, products.shape[1],
            self.experts, self.weight.form.rows, add), sums.device)

    def _ends(self) -> int:
        return 0 if self.offsets is None else self.offsets.data_ptr()

    def _low_rank(self, part: Part, sums: Tensor) -> None:
        """Set the part's sums to x V U^T, by torch: nothing of two thin matrices is packed."""
        index = part.first // part.rows
        u = self.named["low_rank.u"][part.first:part.first + part.rows].float()
        v = self.named["low_rank.v"][index].float()
        x = self.x.float()
        if "input_scales" in self.named:
            x = x * self.named["input_scales"][index].float()
        sums[:, part.first:part.first + part.rows] = (x @ v.T) @ u.T

    def _low_rank_of_experts(self, part: Part, sums: Tensor) -> None:
        own, form = part.low_rank, self.weight.form
        between = sums.new_empty(len(self.x) * own.rank, 1)
        scales = 0 if own.multipliers is None else own.multipliers.data_ptr()
        _launch("bitlm_cuda_thin_launch", Thin(
            self.x.data_ptr(), own.v, scales, self._ends(), between.data_ptr(),
            TYPES[self.x.dtype], own.v_type, len(self.x), own.rank, form.columns, self.experts,
            form.parts), sums.device)
        self._combine(part, between, own.u, own.u_type, own.rank, sums, False)

    def _salient(self, part: Part, sums: Tensor, add: bool) -> None:
        own = part.salient
        if not own.source.columns:
            if not add:
                sums[:, part.first:part.first + part.rows] = 0.0
            return
        x = self._stage(own.source, self.x, rounded=True)
        _launch("bitlm_cuda_salient_launch", Salient(
            own.mask, own.values, own.starts, own.scales, own.zeros, x.struct.rounded, self._ends(),
            sums.data_ptr(), own.scale_type, len(self.x), part.rows, own.source.columns,
            sums.shape[1], part.first, self.experts, self.weight.form.rows, add), sums.device)

    def _product(self, term: ProductTerm, y: Tensor, column: int, addend: Tensor | None = None,
                 bias: Tensor | None = None, source: Tensor | None = None) -> None:
        """Launch a product that writes rows of y from `column` on."""
        rows, experts = len(self.x) * term.source.rank, self.experts
        x = self.x if source is None else source
        digits = self._digits(x)
        memory = cuda_table.staging_bytes(units_of(term.source.columns, term.source.group_size)[0],
                                          digits)
        few = term.few and self.activation in _LEVELS and \
            rows // (experts or 1) >= self.settings.few_tokens
        alone = rows == 1 and not experts and memory <= cuda_table.MOST_STAGING_BYTES and \
            (term.source, True) not in self.staged and bool(term.passes) and not few
        staged = self._stage(term.source, x) if term.passes and not alone else \
            _Staged(self._input(term.source, x, 1))
        call = Product(staged.struct, (Pass * MAX_PASSES)(*term.passes), y.data_ptr(),
                       0 if addend is None else addend.data_ptr(),
                       0 if bias is None else bias.data_ptr(), self._ends(), len(term.passes),
                       term.rows, y.shape[1], column, TYPES[y.dtype],
                       0 if bias is None else TYPES[bias.dtype], experts,
                       self.settings.block(-(-rows // (experts or 1))), alone, term.expert_rows)
        _launch("bitlm_cuda_few_launch" if few else "bitlm_cuda_product_launch", call, y.device)

    def _digits(self, x: Tensor) -> int:
        if self.activation == _FLOAT:
            return 3 if x.dtype == torch.float32 else 2
        return 2 if self.activation == _INT16 else 1

    def _input(self, source: Source, x: Tensor, padded: int) -> Input:
        """Return the struct of an input without its memory."""
        units, by_group = units_of(source.columns, source.group_size)
        digits = self._digits(x)
        by_expert = source.multipliers is not None or source.places is not None
        return Input(
            x.data_ptr(), 0 if source.multipliers is None else source.multipliers.data_ptr(),
            0 if source.places is None else source.places.data_ptr(),
            self._ends() if by_expert else 0, 0 if self.step is None else self.step.data_ptr(),
            0, 0, 0, 0, TYPES[x.dtype], 0, x.shape[1], source.columns,
            min(source.group_size, source.columns), units, by_group, source.rank,
            len(x) * source.rank, padded, self.activation, digits, padded * digits * DIGIT_WORDS,
            self.experts)

    def _stage(self, source: Source, x: Tensor, rounded: bool = False) -> _Staged:
        """Round an input in device memory, once for all that read it."""
        for key in ((source, True), (source, False))[:1 if rounded else 2]:
            if key in self.staged:
                return self.staged[key]
        rows = len(x) * source.rank
        padded = (rows // _MOST_BLOCK_TOKENS + 1 + bool(self.weight.form.experts)) * \
            _MOST_BLOCK_TOKENS
        struct = self._input(source, x, padded)
        memory = x.new_empty(struct.units * (struct.unit_words + padded * (
            9 if struct.digits == 3 else 5)), dtype=torch.int32)
        struct.words = memory.data_ptr()
        struct.sums = struct.words + 4 * struct.units * struct.unit_words
        struct.scales = struct.sums + 16 * struct.units * padded * (1 + (struct.digits == 3))
        seen = None
        if rounded:
            seen = x.new_empty(rows, source.columns, dtype=torch.float32)
            struct.rounded = seen.data_ptr()
        _launch("bitlm_cuda_stage", struct, x.device)
        staged = _Staged(struct, memory, seen)
        if x is self.x:
            self.staged[source, rounded] = staged
        return staged


def _work(x: Tensor, weight: Terms, activation: str, settings: Settings, trusted: bool) -> str:
    """Return how a product is made: see cuda_table.Settings. trusted: wide products are."""
    form = weight.form
    if activation != "float" or x.dtype == torch.float32:
        return "bits"
    return settings.work(len(x) // (form.experts or 1), weight.many,
                         trusted and x.dtype in weight.wide,
                         not form.experts and no_rows(form) is None)


def _many_linear(x: Tensor, weight: Terms, bias: Tensor | None, offsets: Tensor | None,
                 settings: Settings, wide: bool) -> Tensor:
    """Return x @ W.T + bias in the dtype of x, W made of codes in registers.

    wide: by the tensor cores of sm_90a, W rounded to the dtype of x.
    """
    form = weight.form
    y = (x.new_zeros if form.experts else x.new_empty)(len(x), form.rows)
    if not y.numel():
        return y
    if wide:
        launch, tiles = "bitlm_cuda_wide_launch", settings.tiles_wide
        given = x if x.data_ptr() % 16 == 0 else x.clone()
    else:
        launch, tiles = "bitlm_cuda_many_launch", settings.tiles
        given = torch.empty_like(x)
        _launch("bitlm_cuda_order_launch", Order(x.data_ptr(), given.data_ptr(), *x.shape),
                x.device)
    experts = form.experts or 1
    for part in weight.parts:
        product, = part.products
        own = None if bias is None else bias[..., part.first:part.first + part.rows].contiguous()
        _launch(launch, Many(
            (Pass * MANY_PASSES)(*product.passes), given.data_ptr(),
            y.data_ptr(), 0, 0 if own is None else own.data_ptr(),
            0 if offsets is None else offsets.data_ptr(), len(product.passes), part.rows,
            form.columns, form.group_size, len(x), y.shape[1], part.first, TYPES[x.dtype],
            0 if own is None else TYPES[own.dtype], form.experts,
            tiles(part.rows, -(-len(x) // experts), _multiprocessors(x.device), experts)), x.device)
    return y


@cache
def settings_of(device: torch.device) -> Settings:
    """Return what suits a card, of what the library has machine code for."""
    if device.type != "cuda":
        return cuda_table.DEFAULT
    capability = torch.cuda.get_device_capability(device)
    own = cuda_table.settings(capability)
    return own if has_wide(capability) else replace(own, wide_tokens=cuda_table.NEVER)


def has_wide(capability: tuple[int, int]) -> bool:
    """Tell whether a card has the products of sm_90a, and the library has code for them."""
    named = native.load("bitlm_cuda").library.bitlm_cuda_architectures().decode().split()
    return capability == (9, 0) and WIDE_ARCHITECTURE in named


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _dense_linear(x: Tensor, weight: Terms, bias: Tensor | None) -> Tensor:
    """Return x @ W.T + bias with W in the dtype of x, some rows of it at a time."""
    form = weight.form
    y = x.new_empty(len(x), form.rows)
    step = cuda_table.dense_rows(form.columns)
    bias = None if bias is None else bias.to(x.dtype)
    for first in range(0, form.rows, step):
        count = min(step, form.rows - first)
        piece = rows(weight, None, count, x.dtype, first)
        own = y[:, first:first + count]
        if bias is None:
            torch.mm(x, piece.T, out=own)
        else:
            torch.addmm(bias[first:first + count], x, piece.T, out=own)
    return y


def rows(weight: Terms, ids: Tensor | None, count: int, dtype: torch.dtype,
         first: int = 0) -> Tensor:
    """Return rows `ids`, or `count` rows from `first` on, of the dense weight: [count, K]."""
    form, part = weight.form, weight.parts[0]
    device = weight.sources[0][0]().device if ids is None else ids.device
    out = torch.empty(count, form.columns, dtype=dtype, device=device)
    if not out.numel():
        return out
    product, own = part.products[-1], part.salient
    multipliers = weight.input_scales
    call = Rows((Pass * MAX_PASSES)(*product.passes), 0 if ids is None else ids.data_ptr(),
                rows_out=count, first=first, count=len(product.passes),
                rows=form.rows * (form.experts or 1), columns=form.columns,
                group_size=form.group_size, out=out.data_ptr(), out_type=TYPES[dtype])
    if multipliers is not None:
        call.multipliers, call.multiplier_type = multipliers.data_ptr(), TYPES[multipliers.dtype]
        call.multiplier_rows = form.rows // multipliers.shape[1]
    if own is not None:
        call.salient_mask, call.salient_values = own.mask, own.values
        call.salient_starts, call.salient_scales = own.starts, own.scales
        call.salient_zeros, call.salient_type = own.zeros, own.scale_type
    _launch("bitlm_cuda_rows_launch", call, device)
    return out


def _bias(bias: Tensor | None, form: Form) -> Tensor | None:
    wanted = (form.experts, form.rows) if form.experts else (form.rows,)
    if bias is None:
        return None
    if tuple(bias.shape) != wanted:
        raise RuntimeError(f"the bias has shape {list(bias.shape)}, expected {list(wanted)}")
    return (bias if bias.dtype in TYPES else bias.float()).contiguous()


def _offsets(offsets: Tensor | None, form: Form, device: torch.device) -> Tensor | None:
    if not form.experts:
        return None
    if offsets is None or offsets.shape != (form.experts,):
        raise RuntimeError(f"a weight of {form.experts} experts needs {form.experts} offsets")
    return offsets.to(device, torch.int32).contiguous()
