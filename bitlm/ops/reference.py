"""The pure-torch implementation that defines what every packed weight means.

W = ( sum_p S_p * B_p + shift, salient entries replaced, + sum_q diag(a) L diag(c) R diag(b)
      + U V^T ) diag(input_scales)

Every other backend is tested against this one. It dequantizes and multiplies, in float32 (float64
for float64 inputs): right everywhere, fast nowhere. An activation mode other than "float" rounds
what each code matrix reads (rounding.py), so there the terms multiply one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from .bits import unpack_bits, unpack_trits
from .form import Form, chains, parse, planes, row
from .rounding import rounded

Tensors = dict[str, Tensor]


def dequantize(tensors: list[Tensor], form: str, dtype: torch.dtype) -> Tensor:
    """Return the dense weight: [N, K], or [E, N, K] with experts, in `dtype`."""
    layout = parse(form)
    named = dict(zip(layout.names, tensors))
    if layout.experts:
        dense = [_dense({n: t[e] for n, t in named.items()}, layout, dtype)
                 for e in range(layout.experts)]
        return torch.stack(dense)
    return _dense(named, layout, dtype)


def packed_linear(x: Tensor, tensors: list[Tensor], form: str, bias: Tensor | None = None,
                  offsets: Tensor | None = None, activation: str = "float",
                  step: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias.

    x: float [..., K]. bias: [N], with experts [E, N]. offsets: int [E] ends of the experts' slices
    when x is [T, K] sorted by expert; rows past the last end belong to no expert and give 0.
    activation, step: how x is rounded, see rounding.rounded.
    """
    layout = parse(form)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    named = dict(zip(layout.names, tensors))
    if not layout.experts:
        return _linear(x.to(compute), named, layout, bias, activation, step).to(x.dtype)
    y = x.new_zeros(*x.shape[:-1], layout.rows)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            y[start:end] = _linear(x[start:end].to(compute), {n: t[expert] for n, t in
                                                              named.items()}, layout,
                                   None if bias is None else bias[expert], activation, step)
        start = end
    return y


def _linear(x: Tensor, named: Tensors, form: Form, bias: Tensor | None, activation: str,
            step: Tensor | None) -> Tensor:
    """Return x @ W.T + bias of one expert in the dtype of x."""
    bias = None if bias is None else bias.to(x.dtype)
    if activation == "float":
        return linear(x, _dense(named, form, x.dtype), bias)
    y = torch.cat([_rounded_terms(x, own, form, starts, activation, step)
                   for own, starts in _parts(named, form)], dim=-1)
    return y if bias is None else y + bias


def packed_linear_dx(grad: Tensor, tensors: list[Tensor], form: str,
                     offsets: Tensor | None = None) -> Tensor:
    """Return grad @ W, the gradient of `packed_linear` with respect to x."""
    layout = parse(form)
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if not layout.experts:
        return (grad.to(compute) @ dequantize(tensors, form, compute)).to(grad.dtype)
    named = dict(zip(layout.names, tensors))
    dx = grad.new_zeros(*grad.shape[:-1], layout.columns)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            weight = _dense({n: t[expert] for n, t in named.items()}, layout, compute)
            dx[start:end] = (grad[start:end].to(compute) @ weight).to(grad.dtype)
        start = end
    return dx


def packed_embedding(ids: Tensor, tensors: list[Tensor], form: str, dtype: torch.dtype) -> Tensor:
    """Return rows `ids` (any integer shape) of the dense weight, [*ids.shape, K] in `dtype`."""
    layout = parse(form)
    flat = ids.reshape(-1)
    picked, starts = {}, None
    for name, tensor in zip(layout.names, tensors):
        by_row = row(name, layout.names).axes[0] == "N"
        picked[name] = tensor[flat] if by_row else tensor
        if name == "salient.mask":
            starts = _salient_starts(unpack_bits(tensor, layout.columns))[flat]
    if layout.parts != 1:
        raise ValueError("an embedding has one part")
    dense = _terms(picked, layout, dtype, starts)
    return dense.reshape(*ids.shape, layout.columns)


def _dense(named: Tensors, form: Form, dtype: torch.dtype) -> Tensor:
    """Dequantize one expert: sum the terms of each part, join the parts along N."""
    dense = [_terms(own, form, dtype, starts) for own, starts in _parts(named, form)]
    return dense[0] if form.parts == 1 else torch.cat(dense)


def _parts(named: Tensors, form: Form) -> Iterator[tuple[Tensors, Tensor | None]]:
    """Yield the tensors of each part, and where its rows' salient values begin in the list."""
    rows = form.rows // form.parts
    for part in range(form.parts):
        own = {}
        for name, tensor in named.items():
            by_row = row(name, form.names).axes[0] == "N"
            own[name] = (tensor[part * rows:(part + 1) * rows] if by_row else
                         tensor[part:part + 1])
        starts = None
        if "salient.mask" in own:
            starts = _salient_starts(unpack_bits(own["salient.mask"], form.columns))
        yield own, starts


def _terms(named: Tensors, form: Form, dtype: torch.dtype, starts: Tensor | None) -> Tensor:
    """Sum all terms of one part. `starts`: where each row's salient values begin in the list."""
    compute = dtype if dtype == torch.float64 else torch.float32
    rows = next(t.shape[0] for n, t in named.items() if row(n, form.names).axes[0] == "N")
    device = next(iter(named.values())).device
    dense = torch.zeros(rows, form.columns, dtype=compute, device=device)
    for own, ratio in _scaled_planes(named, form):
        term = _plane(own, form, compute).mul_(ratio)
        if "columns" in own:
            dense[:, own["columns"][0].long()] += term
        else:
            dense += term
    if "shift" in named:
        dense += _per_column(named["shift"].to(compute), form.columns, form.group_size,
                             _shift_zones(named, form))
    _replace_salient(dense, named, form, starts)
    for chain in chains(form.names):
        dense += _chain({n.split(".", 1)[1]: t for n, t in named.items()
                         if n.startswith(f"chain{chain}.")}, form, compute)
    if "low_rank.u" in named:
        dense += named["low_rank.u"].to(compute) @ named["low_rank.v"][0].to(compute)
    if "input_scales" in named:
        dense *= named["input_scales"][0].to(compute)
    return dense.to(dtype)


def _scaled_planes(named: Tensors, form: Form) -> Iterator[tuple[Tensors, float]]:
    """Yield the tensors of each plane, with the scales that it uses, and their factor."""
    scales: Tensors = {}
    for plane in planes(form.names):
        own = {n.split(".", 1)[1]: t for n, t in named.items() if n.startswith(f"plane{plane}.")}
        if form.plane_ratio == 1 or plane == 0:
            scales = {n: own[n] for n in ("scales", "row_scales", "column_scales", "zones",
                                          "columns") if n in own}
            yield own, 1.0
        else:
            yield own | scales, float(form.plane_ratio) ** -plane


def _plane(own: Tensors, form: Form, compute: torch.dtype) -> Tensor:
    """Return codes times scales of one plane, [rows, covered columns]."""
    covered = own["columns"].shape[-1] if "columns" in own else form.columns
    codes = plane_codes(own, covered).to(compute)
    if "scales" in own:
        zones = unpack_bits(own["zones"], covered) if "zones" in own else None
        return codes * _per_column(own["scales"].to(compute), covered, form.group_size, zones)
    return codes * (own["row_scales"].to(compute) @ own["column_scales"][0].to(compute))


def plane_codes(own: Tensors, columns: int) -> Tensor:
    """Return the int8 codes [rows, columns] of a plane given as `signs` [+ `mask`] or `trits`."""
    if "trits" in own:
        return unpack_trits(own["trits"], columns)
    codes = unpack_bits(own["signs"], columns).to(torch.int8) * 2 - 1
    return codes * unpack_bits(own["mask"], columns) if "mask" in own else codes


def _per_column(values: Tensor, columns: int, group_size: int, zones: Tensor | None) -> Tensor:
    """Spread values [rows, G] (or [rows, 2G] with zones, zone 0 first) over the columns."""
    group = torch.arange(columns, device=values.device) // group_size
    if zones is None:
        return values[:, group]
    return values.gather(1, group + zones * (values.shape[-1] // 2))


def _shift_zones(named: Tensors, form: Form) -> Tensor | None:
    """Return the zones [rows, K] of plane 0, which the shift shares; 0 where it has no column."""
    if "plane0.zones" not in named:
        return None
    if "plane0.columns" not in named:
        return unpack_bits(named["plane0.zones"], form.columns)
    columns = named["plane0.columns"][0].long()
    own = unpack_bits(named["plane0.zones"], len(columns))
    zones = own.new_zeros(len(own), form.columns)
    zones[:, columns] = own
    return zones


def _salient_starts(mask: Tensor) -> Tensor:
    """Return for each row of a bitmap how many set bits come before it."""
    counts = mask.sum(-1)
    return counts.cumsum(0) - counts


def _replace_salient(dense: Tensor, named: Tensors, form: Form, starts: Tensor | None) -> None:
    """Put salient entries, scale * (value - zero), in the place of planes and shift."""
    if "salient.values" not in named:
        return
    scales = named["salient.scales"].to(dense.dtype).unsqueeze(-1)
    zeros = named["salient.zeros"].to(dense.dtype).unsqueeze(-1)
    if "salient.columns" in named:
        columns = named["salient.columns"][0].long()
        dense[:, columns] = scales * (named["salient.values"].to(dense.dtype) - zeros)
        return
    mask = unpack_bits(named["salient.mask"], form.columns)
    position = (starts.unsqueeze(-1) + mask.cumsum(-1) - 1).clamp_(min=0)
    values = named["salient.values"][0]
    if values.numel():
        entries = scales * (values[position.clamp_(max=values.numel() - 1)].to(dense.dtype) - zeros)
        torch.where(mask, entries, dense, out=dense)


def _chain(own: Tensors, form: Form, compute: torch.dtype) -> Tensor:
    """Return diag(a) L diag(c) R diag(b) as a dense matrix."""
    left, right = _chain_signs(own, form, compute)
    left = left * own["row_scales"].to(compute).unsqueeze(-1) * own["rank_scales"][0].to(compute)
    return (left @ right) * own["column_scales"][0].to(compute)


def _chain_signs(own: Tensors, form: Form, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return L [N, R] and R [R, K] as -1 and 1."""
    rank = own["right"].shape[-2]
    left, right = unpack_bits(own["left"], rank), unpack_bits(own["right"][0], form.columns)
    return left.to(compute) * 2 - 1, right.to(compute) * 2 - 1


# With rounded inputs ------------------------------------------------------------------------------


def _rounded_terms(x: Tensor, named: Tensors, form: Form, starts: Tensor | None, activation: str,
                   step: Tensor | None) -> Tensor:
    """Return x @ W.T of one part, what each code matrix reads being rounded.

    The inputs that differ, each with a rounding of its own: x for all that has scales by group
    (planes, shift, salient entries), the covered columns of a plane, x times each of k column
    scales, the salient columns, what goes into a chain and what comes from between its matrices.
    Low-rank terms are not rounded.
    """
    compute = x.dtype
    if "input_scales" in named:
        x = x * named["input_scales"][0].to(compute)

    def product(source: Tensor, matrix: Tensor) -> Tensor:
        return linear(rounded(source, activation, step), matrix)

    terms = []
    if "low_rank.u" in named:
        v = named["low_rank.v"][0].to(compute)
        terms.append(linear(linear(x, v), named["low_rank.u"].to(compute)))
    for chain in chains(form.names):
        own = {n.split(".", 1)[1]: t for n, t in named.items() if n.startswith(f"chain{chain}.")}
        left, right = _chain_signs(own, form, compute)
        stage = product(x * own["column_scales"][0].to(compute), right)
        stage = stage * own["rank_scales"][0].to(compute)
        terms.append(product(stage, left) * own["row_scales"].to(compute))
    mask = None
    if "salient.mask" in named:
        mask = unpack_bits(named["salient.mask"], form.columns)
    if "salient.columns" in named:
        salient = named["salient.columns"][0].long()
        scales, zeros = (named[f"salient.{n}"].to(compute).unsqueeze(-1) for n in ("scales",
                                                                                   "zeros"))
        terms.append(product(x[..., salient], scales * (named["salient.values"] - zeros)))
        x = x.index_fill(-1, salient, 0.0)
    by_group = torch.zeros(terms[0].shape[-1] if terms else form.rows // form.parts, form.columns,
                           dtype=compute, device=x.device)
    for own, ratio in _scaled_planes(named, form):
        columns = own["columns"][0].long() if "columns" in own else slice(None)
        keep = 1 if mask is None else ~mask[:, columns]
        if "scales" in own and "columns" not in own:
            by_group += _plane(own, form, compute) * ratio
        elif "scales" in own:
            terms.append(product(x[..., columns], _plane(own, form, compute) * keep * ratio))
        else:
            source = x[..., columns]
            codes = plane_codes(own, source.shape[-1]).to(compute) * keep * ratio
            for a, b in zip(own["row_scales"].to(compute).unbind(1),
                            own["column_scales"][0].to(compute), strict=True):
                terms.append(product(source * b, codes) * a)
    if "shift" in named:
        by_group += _per_column(named["shift"].to(compute), form.columns, form.group_size,
                                _shift_zones(named, form))
    if mask is not None:
        _replace_salient(by_group, named, form, starts)
    return sum(terms, product(x, by_group))
