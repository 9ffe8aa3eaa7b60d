"""`PackedWeight`: the module that stands where a dense weight Parameter stood.

As a module it owns the packed tensors, so that accelerate's offloading, the state dict, tied
weights and transformers' own expert converters all see them; where model code looks at
`layer.weight` (shape, dtype, matmul) it answers like the dense weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_exporting
from torch.nn.functional import linear

from . import ops
from .ops.cpu import call, takes
from .ops.form import Form, check
from .ops.stored import RELEASES, Stored
from .ops.structs import ACTIVATIONS

_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}
# Tensors that something else than x is multiplied by, or only some columns of it.
_OF_OTHER_INPUTS = ("chain", "low_rank", "input_scales")


class KeepsDtype(nn.Module):
    """A module whose float tensors keep their stored dtype when the model is cast."""

    # transformers' `init.*` functions skip what carries this mark: stored codes are never re-drawn.
    _is_hf_initialized = True

    def _apply(self, fn, recurse: bool = True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class TensorHolder(KeepsDtype):
    """A module whose tensors may be away, on the CPU, while the prepared weight is in use.

    Whoever asks for them, as a parameter, a state or an attribute, brings them back
    (ops/stored.py).
    """

    _stored: Stored | None = None

    if RELEASES:
        @property
        def _parameters(self) -> dict[str, nn.Parameter]:
            if self._stored is not None and self._stored.away:
                self._stored.restore()
            return self.__dict__["_parameters"]

        @_parameters.setter
        def _parameters(self, parameters: dict[str, nn.Parameter]) -> None:
            self.__dict__["_parameters"] = parameters

    def __getattr__(self, name: str):
        if self._stored is not None and self._stored.away and name in self.__dict__["_parameters"]:
            self._stored.restore()
        return super().__getattr__(name)

    def __getstate__(self) -> dict:
        """Return what copies and pickles get: the tensors, and nothing that was made of them."""
        state = self.__dict__ | {"_parameters": self._parameters}
        state.pop("_stored", None)
        if "blob" in state:
            state["blob"] = None
        return state

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        if self._stored is not None:
            self._stored.drop_blob()
        super()._load_from_state_dict(*args, **kwargs)


class Term(TensorHolder):
    """One term of a packed weight (a plane, a chain, the salient entries): its tensors by name."""

    def forward(self) -> dict[str, Tensor]:
        """Return the tensors. Called as a module, so that offload hooks bring them first."""
        return dict(self._parameters)


class PackedWeight(TensorHolder):
    """A weight as a sum of packed terms; the tensors are those of format version 1.

    tensors: by format name without the weight's own name (`plane0.signs`). form: what the tensors
    do not say. dtype: the dtype the dense weight had, which model code may ask for.
    Raises ValueError naming every tensor that does not fit the form.
    """

    def __init__(self, tensors: dict[str, Tensor], form: Form, dtype: torch.dtype) -> None:
        super().__init__()
        problems = check(form, {n: tuple(t.shape) for n, t in tensors.items()},
                         {n: t.dtype for n, t in tensors.items()})
        if problems:
            raise ValueError("; ".join(problems))
        self.form = form
        self._text = form.text  # kept: torch.compile warns of the cached function behind it
        self._dtype = dtype
        self.activation = "float"  # how its inputs are rounded: ops/rounding.py
        # Whether all codes read x itself, so that rounding what they read is rounding x.
        self.reads_x = not any(n.startswith(_OF_OTHER_INPUTS) or n.endswith("columns") or
                               n.endswith("column_scales") for n in form.names)
        self.blob: Tensor | None = None  # the prepared weight, for graphs (ops/stored.py)
        for name in form.names:
            term, _, leaf = name.rpartition(".")
            if term and term not in self._modules:
                self.add_module(term, Term())
            owner = self._modules[term] if term else self
            tensor = tensors[name]
            if not isinstance(tensor, nn.Parameter):  # a tied weight shares the Parameters
                tensor = nn.Parameter(tensor, requires_grad=False)
            owner.register_parameter(leaf, tensor)

    # What model code asks of a weight -----------------------------------------------------------

    @property
    def shape(self) -> torch.Size:
        experts = (self.form.experts,) if self.form.experts else ()
        return torch.Size((*experts, self.form.rows, self.form.columns))

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        stored = self._stored
        if stored is not None and stored.away:
            return torch.device("cpu")
        return next(self.parameters()).device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> Tensor:  # noqa: N802 - torch's own name
        return self.dequantize().T

    @property
    def requires_grad(self) -> bool:
        return False

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.dequantize() @ other

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return other @ self.dequantize()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Dequantize where a torch function gets the weight itself, as in F.linear(x, weight)."""
        args, kwargs = torch.utils._pytree.tree_map_only(cls, lambda weight: weight.dequantize(),
                                                         (args, kwargs or {}))
        return func(*args, **kwargs)

    # What it is ---------------------------------------------------------------------------------

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (format name, stored tensor) in the form's order, as they are (maybe on meta)."""
        for name in self.form.names:
            yield name, self.get_parameter(name)

    def nbytes(self) -> int:
        """Return the bytes of all stored tensors."""
        return sum(t.numel() * t.element_size() for holder in (self, *self._modules.values())
                   for t in holder.__dict__["_parameters"].values())

    def tensors(self) -> list[Tensor]:
        """Return the stored tensors in the form's order, brought in by their offload hooks."""
        terms = {name: module() if hasattr(module, "_hf_hook") else module._parameters
                 for name, module in self._modules.items()}
        own = self._parameters
        if hasattr(self, "_hf_hook") and any(tensor.is_meta for tensor in own.values()):
            own = self()  # outside of a call, as in F.linear(x, weight)
        found = []
        for name in self.form.names:
            term, _, leaf = name.rpartition(".")
            found.append(terms[term][leaf] if term else own[leaf])
        return found

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight, [N, K] or [E, N, K], in `dtype` (default: its own)."""
        away = self._stored is not None and self._stored.away
        tensors = self._stored.borrow() if away else self.tensors()
        return ops.dequantize(tensors, self._text, dtype or self._dtype)

    def forward(self, x: Tensor | None = None, bias: Tensor | None = None,
                offsets: Tensor | None = None, activation: str | None = None,
                step: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Return x @ W.T + bias; for integer x the rows x of W, as an embedding does.

        Without x the weight's own tensors (shift, input_scales), as `Term` does.

        x: float [..., K] or int [...]. bias: [N] ([E, N] with experts). offsets: see
        ops.reference.packed_linear. activation, step: how this call rounds x, in place of the
        weight's own mode: see ops.rounding.rounded. Callers must call the module, not this method:
        offload hooks hang on the call or replace `forward` (see PackedLinear).
        """
        if x is None:
            return dict(self._parameters)
        activation = activation or self.activation
        if is_compiling():
            # A graph has no place for looking whether the tensors are still the same: what changes
            # them drops the blob. An exported graph keeps the tensors, which any machine can read.
            if self.blob is not None and not is_exporting() and takes(x, bias):
                return ops.prepared_linear(x, self.blob, self.form.rows, bias, offsets, step,
                                           _NUMBERS[activation])
        else:
            blob = (self._stored or self._store()).blob_for(x, bias)
            if blob is not None:
                try:
                    if step is not None:
                        return ops.prepared_linear(x, blob, self.form.rows, bias, offsets, step,
                                                   _NUMBERS[activation])
                    return call(x, blob, self.form.rows, bias, offsets, _NUMBERS[activation])
                except RuntimeError:
                    if self._stored.in_order():
                        raise
        tensors = self.tensors()
        if tensors[0].is_meta and not x.is_meta:
            raise RuntimeError(f"the packed weight [{self.form.rows}, {self.form.columns}] is on "
                               "meta: its tensors have not been loaded, or are offloaded")
        if not x.is_floating_point():
            return ops.packed_embedding(x, tensors, self._text, self._dtype)
        if forward_ad._current_level >= 0 and offsets is None and activation == "float":
            # The ops have no forward-mode gradient, and would drop it without a word.
            return linear(x, self.dequantize(x.dtype), bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return ops.packed_linear(x, tensors, self._text, bias, offsets, activation, step)

    def prepare(self) -> bool:
        """Bring the weight into the form that CPU kernels read, now rather than at the first call.

        torch.compile needs it before it traces, or calls go the longer way by the stored tensors.
        Returns False where there is nothing to prepare: another device, offloaded, no kernels.
        """
        return (self._stored or self._store()).prepare() is not None

    def _store(self) -> Stored:
        """Let the weight and its terms share what knows of the prepared weight."""
        slots = []
        for name in self.form.names:
            term, _, leaf = name.rpartition(".")
            slots.append(((self._modules[term] if term else self)._parameters, leaf))
        self._stored = Stored(self.form, slots, self)
        for term in self._modules.values():
            term._stored = self._stored
        return self._stored

    def _apply(self, fn, recurse: bool = True):
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        self.blob = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return (f"{list(self.shape)}, {', '.join(self.form.names)}, "
                f"group_size={self.form.group_size}")


def stack_experts(weights: list[PackedWeight], parts: int = 1) -> PackedWeight:
    """Stack the packed weights of a fused experts tensor, expert by expert, its parts in order.

    `weights` holds E * parts weights of one part each. Salient values are padded to the largest
    count. Scales become float32 for all where one expert needed it.
    """
    first = weights[0].form
    experts = len(weights) // parts
    tensors = {}
    for name in first.names:
        pieces = [weight.get_parameter(name).detach() for weight in weights]
        dtype = torch.float32 if any(p.dtype == torch.float32 for p in pieces) else pieces[0].dtype
        if name == "salient.values" and "salient.columns" not in first.names:
            longest = max(piece.shape[-1] for piece in pieces)
            pieces = [nn.functional.pad(p, (0, longest - p.shape[-1])) for p in pieces]
        joined = [torch.cat(pieces[e * parts:(e + 1) * parts]) for e in range(experts)]
        tensors[name] = torch.stack(joined).to(dtype)
    form = Form(first.rows * parts, first.columns, first.names, first.group_size,
                first.plane_ratio, parts, experts)
    return PackedWeight(tensors, form, weights[0].dtype)


def from_encoded(tensors: dict[str, Tensor], shape: tuple[int, int], group_size: int,
                 plane_ratio: int, dtype: torch.dtype) -> PackedWeight:
    """Return the PackedWeight of one encoded matrix [N, K]."""
    return PackedWeight(tensors, Form(*shape, tuple(tensors), group_size, plane_ratio), dtype)


__all__ = ["KeepsDtype", "PackedWeight", "Term", "from_encoded", "stack_experts"]
