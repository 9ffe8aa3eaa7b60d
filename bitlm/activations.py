"""The activation modes of a model's packed layers: how each rounds its inputs.

A mode is a word on the PackedWeight (`activation`, one of scheme.ACTIVATIONS) that the ops get with
every call; nothing stored depends on it.
"""

from __future__ import annotations

import re

from torch import nn

from .modules import PackedEmbedding, packed_weights
from .scheme import LOW_BIT_ACTIVATIONS, Scheme
from .targets import compile_pattern


def activations(model: nn.Module) -> dict[str, str]:
    """Return the mode of each packed weight by name; embeddings, which are looked up, have none.

    Of a layer with a quantizer of its inputs the quantizer's kind and bits: `elastic, 1 bit`.
    """
    return {name: _mode(model, name, weight) for name, weight in packed_weights(model).items()
            if not _looked_up(model, name)}


def set_activation(model: nn.Module, mode: str, pattern: str | None = None) -> None:
    """Let the packed layers of a model round their inputs in another way, in place.

    mode: one of scheme.ACTIVATIONS. pattern: regular expression searched in the weights' names;
    None: all. Tied weights go together. What `save_pretrained` writes is the mode in force.

    Raises SchemeError for an unknown mode, ValueError for a pattern that matches no packed layer,
    for a dense model, and for a low-bit mode that would reach packed embeddings, or layers with a
    quantizer of their inputs: those modes are for layers that were trained with them, and the
    quantizer says how. The model is then as before.
    """
    Scheme(activation=mode)
    packed = packed_weights(model)
    if not packed:
        raise ValueError(f"this {type(model).__name__} has no packed weight: activation modes are "
                         "of packed models")
    sources = {name: _source(model, name) for name in packed}
    search = compile_pattern(pattern).search if pattern is not None else lambda name: True
    groups = {sources[name] for name in packed if search(name)}
    chosen = [name for name in packed if sources[name] in groups]
    tables = [name for name in chosen if _looked_up(model, name)]
    if len(chosen) == len(tables):
        what = f"{tables[0]} is looked up, not multiplied" if tables else "it matches no packed " \
            "weight: see bitlm.activations(model) for the names"
        raise ValueError(f"activation pattern {pattern!r}: {what}")
    if mode in LOW_BIT_ACTIVATIONS and tables:
        raise ValueError(f"activation {mode} is for layers trained with it, {tables[0]} is looked "
                         "up: name the layers by a pattern")
    for name in chosen if mode in LOW_BIT_ACTIVATIONS else ():
        if _quantizer(model, name) is not None:
            raise ValueError(f"activation {mode}: the quantizer of the input says which levels "
                             f"{name} gets; use float, int16 or int8")
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if hasattr(config, "set_activation"):
        # Read again, a tied weight has what is said of the one that it is tied to.
        hidden = [] if pattern is None else sorted(n for n in groups if not search(n))
        names = [f"^{re.escape(name)}$" for name in hidden]
        config.set_activation(mode, "|".join([pattern, *names]) if hidden else pattern)
    for name in chosen:
        packed[name].activation = mode


def _mode(model: nn.Module, name: str, weight: nn.Module) -> str:
    quantizer = _quantizer(model, name)
    if quantizer is None:
        return getattr(weight, "activation", "float")
    return f"{quantizer.spec.kind}, {quantizer.spec.bits} bit{'s' * (quantizer.spec.bits > 1)}"


def _quantizer(model: nn.Module, name: str) -> nn.Module | None:
    """Return the quantizer of the inputs of the layer that has this weight, or None."""
    return getattr(model.get_submodule(name.rpartition(".")[0]), "input", None)


def _looked_up(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), PackedEmbedding)


def _source(model: nn.Module, name: str) -> str:
    """Return the name of the weight that this one is tied to, else its own.

    The map of a packed model ties tensors: lm_head.weight.plane0.signs to the embedding's.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    first = model.get_submodule(name).form.names[0]
    return tied.get(f"{name}.{first}", f"{name}.{first}").removesuffix(f".{first}")
