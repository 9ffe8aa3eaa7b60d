"""Which weights of a model can be packed, and why the others are not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import nn

from .modules import is_conv1d

EXPERT_LEAVES = ("gate_up_proj", "up_proj", "down_proj")
# Subclasses of nn.Linear whose own forward computes the same.
SAME_AS_LINEAR = ("FalconLinear",)


@dataclass(frozen=True)
class Target:
    """One weight that can be packed.

    name: the dense parameter. rows, columns: N and K of the matrix y = W x, whatever the storage
    order. experts: 0 or their number. parts: layers fused along N. role: linear, experts,
    embedding or head. tied: the name of the weight that this one is another name of, or "".
    """

    name: str
    rows: int
    columns: int
    role: str
    dtype: torch.dtype
    experts: int = 0
    parts: int = 1
    tied: str = ""
    transposed: bool = False

    @property
    def numel(self) -> int:
        return self.rows * self.columns * max(self.experts, 1)


@dataclass(frozen=True)
class Skipped:
    """A weight matrix that stays dense, its size, and the reason."""

    name: str
    numel: int
    reason: str
    loud: bool = False  # a user would expect this one to be packed


def find(model: nn.Module, skip: tuple[str, ...] = (), embeddings: bool = False
         ) -> tuple[list[Target], list[Skipped]]:
    """Return what of a (meta or real, dense) model is packed and what stays dense and why.

    skip: regular expressions searched in parameter names. embeddings: token embeddings and output
    head too. Raises ValueError for a skip pattern that is no regular expression or matches nothing.
    """
    patterns = [compile_pattern(text) for text in skip]
    matched: set[str] = set()
    targets, skipped = [], []
    head, tables = _head(model), _embeddings(model)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                continue
            name = f"{path}.{leaf}" if path else leaf
            hit = next((p.pattern for p in patterns if p.search(name)), None)
            matched.update(p.pattern for p in patterns if p.search(name))
            found = _describe(module, name, leaf, parameter, id(module) in inside, head, tables,
                              embeddings)
            if isinstance(found, Target) and hit is not None:
                found = Skipped(name, parameter.numel(), f"skipped by {hit!r}")
            if isinstance(found, Target):
                targets.append(replace(found, tied=tied.get(name, "")))
            else:
                skipped.append(found)
    for pattern in patterns:
        if pattern.pattern not in matched:
            raise ValueError(f"skip pattern {pattern.pattern!r} matches no weight of this model: "
                             "see `bitlm quantize --dry-run` for the names")
    packed = {target.name for target in targets}
    for target in [t for t in targets if t.tied and t.tied not in packed]:
        targets.remove(target)
        skipped.append(Skipped(target.name, target.numel,
                               f"tied to {target.tied}, which stays dense"))
    return targets, skipped


def compile_pattern(text: str) -> re.Pattern:
    """Compile a regular expression; raises ValueError saying what is wrong with it."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression: {error}") from None


def _describe(module: nn.Module, name: str, leaf: str, parameter: nn.Parameter, inside: bool,
              head: nn.Module | None, tables: list[nn.Module], embeddings: bool
              ) -> Target | Skipped:
    size, dtype = parameter.numel(), parameter.dtype
    if not parameter.is_floating_point():
        return Skipped(name, size, f"stored as {str(dtype).removeprefix('torch.')}")
    if module is head:
        if embeddings and is_linear(module):
            return Target(name, *parameter.shape, "head", dtype)
        return Skipped(name, size, "output head (--embeddings packs it)")
    if any(module is table for table in tables):
        if embeddings and not _is_look_up(module):
            return Skipped(name, size, f"{type(module).__name__} does more than look up rows")
        if embeddings:
            return Target(name, *parameter.shape, "embedding", dtype)
        return Skipped(name, size, "token embedding (--embeddings packs it)")
    if isinstance(module, nn.Embedding):
        return Skipped(name, size, "position or type embedding")
    if leaf == "weight" and (is_linear(module) or is_conv1d(module)):
        if not inside:
            return Skipped(name, size, "task head")
        swapped = is_conv1d(module)
        rows, columns = reversed(parameter.shape) if swapped else parameter.shape
        return Target(name, rows, columns, "linear", dtype, transposed=swapped)
    if is_fused_experts(module) and leaf in EXPERT_LEAVES and parameter.ndim == 3:
        experts, rows, columns = parameter.shape
        if module.is_transposed:
            rows, columns = columns, rows
        return Target(name, rows, columns, "experts", dtype, experts, parts_of(module, leaf),
                      transposed=module.is_transposed)
    if parameter.ndim == 3 and "expert" in f"{name} {type(module).__name__}".lower():
        return Skipped(name, size, f"fused experts of {type(module).__name__} do not go through "
                                   "transformers' experts interface: they stay dense", loud=True)
    return Skipped(name, size, f"{type(module).__name__}: not a linear layer")


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is an nn.Linear that does no more (Llama 4's router does)."""
    return isinstance(module, nn.Linear) and (type(module).forward is nn.Linear.forward
                                              or type(module).__name__ in SAME_AS_LINEAR)


def _is_look_up(table: nn.Embedding) -> bool:
    return type(table).forward is nn.Embedding.forward or hasattr(table, "embed_scale")


def is_fused_experts(module: nn.Module) -> bool:
    """Tell whether a module runs its experts through transformers' experts interface."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias",
                                                  "_apply_gate"))


def parts_of(experts: nn.Module, leaf: str) -> int:
    """Return how many layers a fused experts tensor joins along its out features.

    Gate and up lie behind each other, and on disk apart, unless they are interleaved or stored
    transposed, in which case the checkpoint keeps them fused.
    """
    halves = leaf == "gate_up_proj" and experts.has_gate and not experts.is_transposed
    return 2 if halves and getattr(experts, "is_concatenated", True) else 1


def _head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get else None
    except (AttributeError, NotImplementedError):
        return None


def _embeddings(model: nn.Module) -> list[nn.Module]:
    """Return the input embedding and every other table that shares its weight (BART, T5)."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        first = get() if get else None
    except (AttributeError, NotImplementedError):
        return []
    if not isinstance(first, nn.Embedding):
        return []
    tied = set()
    keys = getattr(model, "all_tied_weights_keys", None) or {}
    named = dict(model.named_modules(remove_duplicate=False))
    own = {f"{path}.weight" for path, module in named.items() if module is first}
    for target, source in keys.items():
        if target in own or source in own:
            tied |= {target, source}
    tables = [named[key.rpartition(".")[0]] for key in tied if key.rpartition(".")[0] in named]
    shared = [m for m in named.values() if isinstance(m, nn.Embedding)
              and not m.weight.is_meta and m.weight is first.weight]
    return [first, *(t for t in (*tables, *shared) if isinstance(t, nn.Embedding))]
