"""`Plan`: every weight of a model with its scheme, and what that costs, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import nn

from .methods import registry
from .ops.form import Form, axis_lengths, row
from .scheme import LOW_BIT_ACTIVATIONS, Attention, Scheme
from .targets import Skipped, Target, compile_pattern, find


@dataclass(frozen=True)
class Entry:
    """One packed weight: the target and its scheme."""

    target: Target
    scheme: Scheme

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def activation(self) -> str:
        """The mode of its inputs; "" for an embedding, which is looked up and has none."""
        return "" if self.target.role == "embedding" else self.scheme.activation

    @property
    def form(self) -> Form:
        """The form as the scheme plans it (dtypes of scales and salient counts may still vary)."""
        target, scheme = self.target, self.scheme
        return Form(target.rows, target.columns, tensor_names(scheme),
                    scheme.columns_per_scale(target.columns), scheme.plane_ratio, target.parts,
                    target.experts)

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the planned dtype and shape of each tensor; the salient count is the asked one."""
        return planned_tensors(self.form, self.scheme)

    def nbytes(self) -> int:
        """Return the planned bytes; 0 for a weight tied to another."""
        if self.target.tied:
            return 0
        return sum(prod(shape) * dtype.itemsize for dtype, shape in self.tensors().values())


@dataclass(frozen=True)
class Plan:
    """The packed weights of a model, the dense ones with the reason, and the size of the rest.

    dense_bytes: bytes of everything that stays dense. source_bytes: bytes of the dense model.
    """

    entries: tuple[Entry, ...]
    skipped: tuple[Skipped, ...]
    dense_bytes: int
    dense_numel: int
    source_bytes: int

    def __getitem__(self, name: str) -> Entry:
        return self.by_name()[name]

    def by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    @property
    def packed_bytes(self) -> int:
        return sum(entry.nbytes() for entry in self.entries)

    @property
    def packed_numel(self) -> int:
        return sum(entry.target.numel for entry in self.entries if not entry.target.tied)

    @property
    def packed_bits(self) -> float:
        """Bits per weight of the packed layers, everything counted."""
        return 8 * self.packed_bytes / max(self.packed_numel, 1)

    @property
    def file_bits(self) -> float:
        """Bits per weight of the whole file."""
        return 8 * self.total_bytes / max(self.packed_numel + self.dense_numel, 1)

    @property
    def total_bytes(self) -> int:
        return self.packed_bytes + self.dense_bytes


@dataclass(frozen=True)
class Request:
    """What a user asks of a whole model; the part of `quantization_config` that makes the plan.

    scheme: of every linear weight. overrides: regular expression -> scheme fields that replace
    those of `scheme` where it is found in a name; later ones win. skip: regular expressions of
    names that stay dense. embeddings: scheme of token embeddings and output head, or None.
    attention: regular expression -> how the attention modules in whose name it is found round their
    operands, None: not; later ones win.
    """

    scheme: Scheme
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    skip: tuple[str, ...] = ()
    embeddings: Scheme | None = None
    attention: dict[str, Attention | None] = field(default_factory=dict)

    def scheme_for(self, target: Target) -> Scheme:
        """Return the scheme of one target, overrides applied."""
        scheme = self.scheme
        if target.role in ("embedding", "head"):
            scheme = self.embeddings
        for pattern, changes in self.overrides.items():
            if compile_pattern(pattern).search(target.name):
                scheme = scheme.replace(**changes)
        return scheme

    def with_activation(self, mode: str, pattern: str | None = None) -> Request:
        """Return the request with an activation mode for all weights, whatever it said before.

        With `pattern`, a regular expression, only where it is found in a name: an override. Raises
        SchemeError for an unknown mode, ValueError for a low-bit mode of a whole model whose
        embeddings are packed.
        """
        if pattern is not None:
            Scheme(activation=mode)
            # The last override wins, and one of more fields must keep its place among the others.
            others = {p: c for p, c in self.overrides.items()
                      if p != pattern or set(c) != {"activation"}}
            while pattern in others:
                pattern = f"(?:{pattern})"
            return replace(self, overrides=others | {pattern: {"activation": mode}})
        scheme = self.scheme.replace(activation=mode)
        if mode in LOW_BIT_ACTIVATIONS and self.embeddings is not None:
            raise ValueError(f"activation {mode} cannot hold for a whole model whose embeddings "
                             "and head are packed: give it to the layers trained with it, by a "
                             "pattern (bitlm.set_activation, or --override when quantizing)")
        overrides = {pattern: {k: v for k, v in changes.items() if k != "activation"}
                     for pattern, changes in self.overrides.items()}
        return replace(
            self, scheme=scheme, overrides={p: c for p, c in overrides.items() if c},
            embeddings=self.embeddings and self.embeddings.replace(activation=mode))


def make_plan(model: nn.Module, request: Request) -> Plan:
    """Return the plan of a dense model (meta tensors suffice).

    Raises ValueError for a skip or override pattern that matches nothing, for an unknown method,
    for what an embedding cannot be and for a model without any weight to pack.
    """
    targets, skipped = find(model, request.skip, request.embeddings is not None)
    for pattern in request.overrides:
        hits = [target for target in targets if compile_pattern(pattern).search(target.name)]
        if not hits:
            raise ValueError(f"override pattern {pattern!r} matches no packed weight of this "
                             "model: see `bitlm quantize --dry-run` for the names")
        if all(target.tied for target in hits):
            raise ValueError(f"override pattern {pattern!r}: {hits[0].name} is tied to "
                             f"{hits[0].tied}, so name that one")
    if not targets:
        raise ValueError(f"{type(model).__name__} has no linear layer to pack")
    by_name = {target.name: target for target in targets}
    entries = tuple(Entry(target, request.scheme_for(by_name.get(target.tied, target)))
                    for target in targets)
    for entry in entries:
        registry.method(entry.scheme)
        if entry.target.role == "embedding" and registry.statistics_needed(entry.scheme) != "none":
            raise ValueError(f"{entry.name} is looked up, not multiplied: an embedding cannot be "
                             "compensated or chosen from by Hessian")
        if entry.target.role == "embedding" and entry.scheme.activation in LOW_BIT_ACTIVATIONS:
            raise ValueError(f"{entry.name} is looked up, not multiplied: activation "
                             f"{entry.scheme.activation} is for the layers trained with it "
                             f"(--override RE=activation:{entry.scheme.activation})")
        if entry.scheme.input is not None and entry.target.role in ("embedding", "experts"):
            raise ValueError(f"{entry.name} takes no quantizer of its inputs: give it to linear "
                             "layers alone, by the patterns of overrides")
    numel, size = _totals(model, exclude=())
    dense_numel, dense_bytes = _totals(model, exclude=list(by_name))
    return Plan(entries, tuple(skipped), dense_bytes, dense_numel, size)


def tensor_names(scheme: Scheme) -> tuple[str, ...]:
    """Return the tensors that a scheme stores for one weight, in the order of the format table."""
    names: list[str] = []
    ternary = registry.method(scheme).codes == "ternary"
    for plane in range(scheme.planes):
        if ternary and scheme.trits:
            names.append(f"plane{plane}.trits")
        else:
            names += [f"plane{plane}.signs"] + [f"plane{plane}.mask"] * ternary
        if plane == 0 or scheme.plane_ratio == 1:
            names.append(f"plane{plane}.scales")
    if scheme.center == "shift":
        names.append("shift")
    if scheme.method == "salient":
        where = "columns" if scheme.salient_layout == "columns" else "mask"
        names += [f"salient.{where}", "salient.values", "salient.scales", "salient.zeros"]
    return tuple(names)


def planned_tensors(form: Form, scheme: Scheme) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the dtype and shape that a scheme plans for each tensor of a form."""
    columns, count = _salient_counts(form, scheme)
    shapes: dict[str, tuple[int, ...]] = {"salient.columns": (form.parts, columns)}
    if "salient.columns" not in form.names:
        shapes = {}
    lengths = axis_lengths(form, shapes)
    lead = (form.experts,) if form.experts else ()
    planned = {}
    for name in form.names:
        spec = row(name, form.names)
        free = {"S": columns, "M": count}
        sizes = tuple(lengths[name][axis] if lengths[name][axis] is not None else free[axis]
                      for axis in spec.axes)
        floats = spec.dtypes[0].is_floating_point
        dtype = getattr(torch, scheme.scale_dtype) if floats else spec.dtypes[0]
        planned[name] = (dtype, lead + sizes)
    return planned


def _salient_counts(form: Form, scheme: Scheme) -> tuple[int, int]:
    """Return how many columns, or elements of each part, methods.salience.choose keeps."""
    width = form.columns if scheme.salient_scope == "tensor" else form.group_size
    widths = [min(width, form.columns - start) for start in range(0, form.columns, width)]
    rows = form.rows // form.parts
    return (sum(round(scheme.salient * own) for own in widths),
            sum(round(scheme.salient * (rows * own)) for own in widths))


def _totals(model: nn.Module, exclude: Iterable[str]) -> tuple[int, int]:
    """Return elements and bytes of all parameters and saved buffers, tied ones counted once.

    A weight that stays dense while the one that it is tied to is excluded has its own copy.
    """
    exclude = set(exclude)
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {target for target, source in keys.items() if source not in exclude}
    saved = set(model.state_dict())
    numel = size = 0
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if name in exclude or name in tied or name not in saved or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        numel += tensor.numel()
        size += tensor.numel() * tensor.element_size()
    return numel, size
