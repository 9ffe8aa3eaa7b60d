"""The order of submodules, by which transformers tells the dtype of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..modules import packed_weights
from ..quantizers import quantizers
from .tying import submodels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def put_dense_first(model: PreTrainedModel) -> None:
    """Reorder submodules so that `model.dtype` is the dtype of what is dense, not of our scales.

    transformers takes it from the first floating-point parameter, writes it into config.json and
    loads in it; with packed embeddings that parameter would be a scale. Names, and the order of
    lists and sequences, stay as they are.
    """
    for module in submodels(model):
        _reorder(module)


def _reorder(model: PreTrainedModel) -> None:
    ours = (*packed_weights(model).values(), *quantizers(model).values())
    packed = {id(p) for module in ours for p in module.parameters()}
    floats = [(name, id(parameter) not in packed) for name, parameter in model.named_parameters()
              if parameter.is_floating_point()]
    if not floats or floats[0][1]:
        return
    for name, dense in floats:
        path = _owners(model, name)
        fixed = [pair for pair in path if isinstance(pair[0], (nn.ModuleList, nn.Sequential))]
        if dense and all(_first(owner, child) for owner, child in fixed):
            for owner, child in path:
                for other in [other for other in owner._modules if other != child]:
                    owner._modules[other] = owner._modules.pop(other)
            return


def _owners(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Return each module on the way to a parameter with the child that leads on."""
    path, owner = [], model
    for child in name.split(".")[:-1]:
        path.append((owner, child))
        owner = owner._modules[child]
    return path


def _first(owner: nn.Module, child: str) -> bool:
    return next(iter(owner._modules)) == child
