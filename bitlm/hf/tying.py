"""Tied weights when they are packed: the tying is by name, and the names have become longer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..modules import install, packed_weights
from ..weight import PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def submodels(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Yield the model and the transformers models in it."""
    # Not at the top: bitlm registers while transformers.modeling_utils may be half imported.
    from transformers import PreTrainedModel

    yield from (module for module in model.modules() if isinstance(module, PreTrainedModel))


def tied_group(model: PreTrainedModel, name: str) -> list[str]:
    """Return all names of a tied weight, the source first; [name] for one that is not tied."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    source = tied.get(name, name)
    return [source, *(target for target, own in tied.items() if own == source)]


def twin(weight: PackedWeight) -> PackedWeight:
    """Return another packed weight over the same stored tensors.

    Not the same module: accelerate would hang its hooks on it once for each name.
    """
    other = PackedWeight(dict(weight.named_tensors()), weight.form, weight.dtype)
    other.activation = getattr(weight, "activation", "float")
    return other


def rewrite_tied_keys(model: PreTrainedModel) -> None:
    """Make the tied-key maps of a model and its submodels name the tensors of packed weights.

    `lm_head.weight: embed.weight` becomes `lm_head.weight.plane0.signs: embed.weight.plane0.signs`
    and so on. Where one of the two stayed dense they are no longer tied, and the pair is dropped.
    The maps become attributes of the instances; classes are not touched.
    """
    for module in submodels(model):
        tied = module.all_tied_weights_keys or {}
        rewritten = _rewrite(tied, packed_weights(module))
        if rewritten != tied:
            # The first map serves loading; the second saving, and tying anew.
            module.all_tied_weights_keys = rewritten
            module._tied_weights_keys = dict(rewritten)


def install_twins(model: PreTrainedModel, name: str, skip: tuple[str, ...] = ()) -> list[str]:
    """Give the names tied to the packed weight `name` its tensors; return the names.

    Names where a skip pattern is found stay dense, and are tied no longer. `rewrite_tied_keys` has
    to come after the last of them: it ends ties of which one side is still dense.
    """
    weight = model.get_submodule(name)
    twins = [other for other in tied_group(model, name)
             if other != name and not any(re.search(pattern, other) for pattern in skip)]
    for other in twins:
        owner = model.get_submodule(other.rpartition(".")[0])
        if not isinstance(owner.weight, PackedWeight):
            install(model, other, twin(weight))
        elif owner.weight.form != weight.form:
            owner.weight = twin(weight)
    return twins


def _rewrite(tied: dict[str, str], packed: dict[str, PackedWeight]) -> dict[str, str]:
    rewritten: dict[str, str] = {}
    for target, source in tied.items():
        if target in packed and source in packed:
            names = packed[source].form.names
            rewritten |= {f"{target}.{name}": f"{source}.{name}" for name in names}
        elif target not in packed and source not in packed:
            rewritten[target] = source
    return rewritten
