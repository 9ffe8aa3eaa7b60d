"""Attention with rounded operands, through transformers' attention interface.

One function, registered under the name "bitlm", computes the attention of every architecture whose
modules call the interface. It finds what to do in children that `install_attention` added to the
module: `quantizers` of the operands, and `estimators` of what rounding them loses.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .quantizers import build
from .scheme import OPERANDS, Attention
from .weight import KeepsDtype

NAME = "bitlm"
# What models call the linear layers that make the operands, the size of a head, and the states that
# keys and values come from where these are not the module's own input.
PROJECTIONS = {
    "query": ("query", "q_proj", "q_lin", "q"),
    "key": ("key", "k_proj", "k_lin", "k"),
    "value": ("value", "v_proj", "v_lin", "v"),
}
HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim")
OTHER_STATES = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                      attention_mask: Tensor | None = None, scaling: float | None = None,
                      dropout: float = 0.0, position_bias: Tensor | None = None,
                      softcap: float | None = None,
                      bitlm_states: tuple[Tensor, Tensor] | None = None, **kwargs: Any
                      ) -> tuple[Tensor, Tensor]:
    """Return the context [B, L, heads, head] and the probabilities [B, heads, L, S].

    query: [B, heads, L, head]. key, value: [B, heads or fewer, S, head]. attention_mask: added to
    the scores, or bool (True: looks there), broadcast to [B, heads, L, S]. position_bias: added as
    well (T5). bitlm_states: what the module got, and what its keys and values come from, for the
    estimators. The probabilities are those of softmax, before dropout and rounding.

    With C the estimators' correction of the scores and c that of the values:
    P = softmax((q(Q) q(K)^T + C) scaling + bias + mask), context = q(dropout(P)) (q(V) + c); with
    `scale_query` q(Q scaling) in place of q(Q) scaling.
    """
    quantizers, estimators = module._modules["quantizers"], module._modules["estimators"]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    scaled = quantizers.scale_query
    query = quantizers("query", query * scaling if scaled else query)
    key, value = quantizers("key", key), quantizers("value", value)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2)
    if estimators is not None:
        correction, missing = estimators(bitlm_states, key.shape[-2])
        scores = scores + (correction * scaling if scaled else correction).to(scores.dtype)
        value = value + missing.to(value.dtype)
    if not scaled:
        scores = scores * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    probabilities = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    rounded = functional.dropout(probabilities, p=dropout, training=module.training)
    context = quantizers("probabilities", rounded) @ value
    return context.transpose(1, 2).contiguous(), probabilities


def dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a module: rounded where it has quantizers, else as eager does.

    Modules of one model share their configuration, and so the name of the function.
    """
    if "quantizers" in module._modules:
        return attention_forward(module, *args, **kwargs)
    eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    return eager(module, *args, **kwargs)


class AttentionQuantizers(nn.Module):
    """The quantizers of an attention module's operands, by name; what has none passes as it is."""

    def __init__(self, attention: Attention, features: Mapping[str, int | None], name: str) -> None:
        super().__init__()
        self.scale_query = attention.scale_query
        for operand in OPERANDS:
            spec = getattr(attention, operand)
            self.register_module(operand, None if spec is None else build(
                spec, features.get(operand), f"{name}.{operand}"))

    def forward(self, operand: str, x: Tensor) -> Tensor:
        quantizer = self._modules[operand]
        return x if quantizer is None else quantizer(x)


class Estimators(KeepsDtype):
    """Low-rank estimators, from an attention module's input, of what rounding its operands loses.

    rank: r. query_size, key_size: width of the states that queries, and keys and values come from.
    head_size: of the values. Shared by all heads. With h the input, h' what keys and values come
    from, and maps x_p(h) = h W^T + b to [B, L, r]:

        C = q_m(h) k_p(h')^T + q_p(h) k_m(h')^T + q_p(h) k_p(h')^T      [B, 1, L, S]
        c = v_p(h') v_out                                                [B, 1, S, head_size]

    q_p, k_p and v_p estimate errors and begin at 0, so that a patched model begins unchanged; q_m
    and k_m stand in for the rounded operands. v_out [r, head_size] begins at 1 for the first rank
    and at cosines for the others. Source: BiPFT (arXiv 2312.08937), which has r = 1 and v_out = 1.
    """

    def __init__(self, rank: int, query_size: int, key_size: int, head_size: int) -> None:
        super().__init__()
        self.q_p, self.q_m = Map(query_size, rank, zero=True), Map(query_size, rank)
        self.k_p, self.k_m = Map(key_size, rank, zero=True), Map(key_size, rank)
        self.v_p = Map(key_size, rank, zero=True)
        place = (torch.arange(head_size, dtype=torch.float32) + 0.5) * (pi / head_size)
        self.v_out = nn.Parameter((torch.arange(rank).unsqueeze(1) * place).cos())

    def forward(self, states: tuple[Tensor, Tensor] | None, length: int) -> tuple[Tensor, Tensor]:
        """Return C and c. length: S, which has to be that of the states."""
        if states is None:
            raise RuntimeError("the low-rank estimators got no hidden states: this attention "
                               "module does not hand them on; leave estimators out for it")
        own, other = states
        if other.shape[-2] != length:
            raise RuntimeError(
                f"the low-rank estimators need the hidden states of all {length} positions, and "
                f"got those of {other.shape[-2]}: a cache keeps none; pass use_cache=False")
        q_p, k_p = self.q_p(own), self.k_p(other)
        correction = self.q_m(own) @ k_p.transpose(-1, -2) + \
            q_p @ (self.k_m(other) + k_p).transpose(-1, -2)
        return correction.unsqueeze(1), (self.v_p(other) @ self.v_out).unsqueeze(1)


class Map(KeepsDtype):
    """An affine map to a few numbers; no nn.Linear, which would be packed."""

    def __init__(self, columns: int, rank: int, zero: bool = False) -> None:
        super().__init__()
        bound = 0.0 if zero else columns ** -0.5
        weight = torch.empty(rank, columns, dtype=torch.float32).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(rank, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


# Installing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coverage:
    """installed: names of the modules that round. dense: the other attention modules and why."""

    installed: tuple[str, ...]
    dense: dict[str, str]


def install_attention(model: nn.Module, placement: Mapping[str, Attention | None],
                      saved_name: Callable[[str], str] = str, strict: bool = True) -> Coverage:
    """Let the attention of a transformers model round its operands, in place.

    placement: regular expression -> Attention, for the modules in whose name it is found; later
    ones win, None leaves a module dense. saved_name: gives the name that patterns are searched in.
    strict: each pattern must be found. A module that already rounds keeps its tensors.

    Where estimators meet causal attention the model no longer uses a cache, which has no hidden
    states. Raises ValueError for a pattern that matches no attention module, and for quantizers
    with `move` or estimators of a module whose projections are not known.
    """
    modules, dense = attention_modules(model)
    names = {name: saved_name(name) for name in modules}
    for pattern in placement if strict else ():
        if not any(re.search(pattern, name) for name in names.values()):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:2])
            raise ValueError(f"attention pattern {pattern!r} matches no attention module of this "
                             f"{type(model).__name__} that can round"
                             + f" ({reasons})" * bool(reasons))
    installed = []
    for name, module in modules.items():
        attention = None
        for pattern, given in placement.items():
            attention = given if re.search(pattern, names[name]) else attention
        if attention is None:
            dense[name] = "not asked for"
            continue
        if "quantizers" not in module._modules:
            _add(module, attention, name)
        installed.append(name)
    if installed:
        _register()
        _set_implementation(model, installed)
        if any(_is_causal(modules[name]) for name in installed):
            _use_no_cache(model)
    return Coverage(tuple(installed), dense)


def uninstall_attention(model: nn.Module) -> None:
    """Let the attention of a model be computed by transformers' eager functions again, in place."""
    for module in list(model.modules()):
        if isinstance(module._modules.get("quantizers"), AttentionQuantizers):
            del module._modules["quantizers"], module._modules["estimators"]
            for key, hook in list(module._forward_pre_hooks.items()):
                if getattr(hook, "func", None) is _pass_states:
                    del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == NAME:
            config._attn_implementation_internal = "eager"
        module.__dict__.pop("set_attn_implementation", None)


def attention_modules(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the modules that call transformers' attention interface, and why others cannot."""
    modules, dense = {}, {}
    for name, module in model.named_modules():
        if not _calls_interface(module):
            if "attention" in type(module).__name__.lower():
                dense[name] = f"{type(module).__name__} does not go through transformers' " \
                              "attention interface"
        elif getattr(module, "sinks", None) is not None:
            dense[name] = f"the softmax of {type(module).__name__} has sinks"
        else:
            modules[name] = module
    # What merely holds an attention module, or lies in one, is none itself.
    known = [*modules, *(name for name in dense if _calls_interface(model.get_submodule(name)))]
    return modules, {name: reason for name, reason in dense.items() if name in known or not any(
        f"{own}.".startswith(f"{name}.") or f"{name}.".startswith(f"{own}.") for own in known)}


def _calls_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _add(module: nn.Module, attention: Attention, name: str) -> None:
    """Give an attention module its quantizers and estimators, on its device."""
    device = next((p.device for p in module.parameters()), None)
    layers = {operand: _first(module, names) for operand, names in PROJECTIONS.items()}
    features = {operand: getattr(layer, "out_features", None) for operand, layer in layers.items()}
    estimators = None
    with torch.device(device or "cpu"):
        quantizers = AttentionQuantizers(attention, features, f"{name}.quantizers")
        if attention.estimators:
            sizes = [getattr(layers[operand], "in_features", None) for operand in ("query", "key")]
            sizes.append(_first(module, HEAD_SIZES))
            takes = inspect.signature(type(module).forward).parameters
            if None in sizes or not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
                raise ValueError(f"{name} is a {type(module).__name__}, whose projections are not "
                                 "known: leave out estimators for it, by a pattern")
            estimators = Estimators(attention.estimators, *sizes)
            module.register_forward_pre_hook(partial(_pass_states, tuple(takes)[1:]),
                                             with_kwargs=True)
    quantizers.train(module.training)
    module.add_module("quantizers", quantizers)
    module.register_module("estimators", estimators)


def _pass_states(names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict[str, Any]
                 ) -> tuple[tuple, dict[str, Any]]:
    """Hand the states that an attention module gets on to `attention_forward`.

    As one more keyword argument: modules give those that they do not know to the interface.
    """
    given = dict(zip(names, args)) | kwargs
    own = given[names[0]]
    other = next((given[n] for n in OTHER_STATES if n in names and given.get(n) is not None), own)
    return args, kwargs | {"bitlm_states": (own, other)}


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _is_causal(module: nn.Module) -> bool:
    return module._modules["estimators"] is not None and getattr(module, "is_causal", False)


def _use_no_cache(model: nn.Module) -> None:
    for module in model.modules():
        for owner in (getattr(module, "config", None), getattr(module, "generation_config", None)):
            if hasattr(owner, "use_cache"):
                owner.use_cache = False


def _register() -> None:
    # Not at the top: bitlm is imported while transformers may be half imported.
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(NAME, dispatch)
    AttentionMaskInterface.register(NAME, eager_mask)


def _set_implementation(model: nn.Module, installed: list[str]) -> None:
    """Name the function in the configurations of the modules and of what they lie in.

    Those make the masks. Whatever implementation the user asked for, it would not round.
    """
    for name in installed:
        parts = name.split(".")
        for end in range(len(parts) + 1):
            config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
            if hasattr(config, "_attn_implementation"):
                config._attn_implementation_internal = NAME
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation = _keep_implementation


def _keep_implementation(attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
    if attn_implementation != NAME:
        raise ValueError(f"the attention of this model rounds its operands, {attn_implementation} "
                         "does not: the implementation has to stay bitlm")
