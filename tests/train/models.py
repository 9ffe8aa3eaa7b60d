"""Tiny models in training, for the tests."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import zoo


def lively(name: str, **changes) -> PreTrainedModel:
    """Return a dense model whose attention looks at some tokens more than at others."""
    model = zoo.make(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6 if parameter.ndim == 2 else 1
    return model


def batch(name: str, rows: int = 8) -> dict[str, Tensor]:
    """Return random inputs that the model of that name takes."""
    random = torch.Generator().manual_seed(3)
    found = {}
    for key, tensor in zoo.inputs(name).items():
        shape = (rows, *tensor.shape[1:])
        found[key] = torch.randn(shape, generator=random) if tensor.is_floating_point() else \
            torch.randint(3, zoo.VOCABULARY, shape, generator=random)
    return found


@torch.no_grad()
def outputs(model: PreTrainedModel, name: str) -> Tensor:
    """Return the logits of a model on `batch`."""
    result = model(**batch(name))
    return result.logits if "logits" in result else result.logits_per_image


def loss(model: PreTrainedModel, name: str) -> Tensor:
    """Return a loss that all parameters of a model matter for."""
    logits = model(**zoo.inputs(name)).logits
    random = torch.Generator().manual_seed(2)
    return (logits - torch.randn(logits.shape, generator=random)).square().mean()


def train(model: PreTrainedModel, name: str, steps: int = 2, rate: float = 1e-3) -> list[float]:
    """Train a few steps, leave the model in evaluation, return the losses."""
    model.train()
    for module in model.modules():  # the same outputs each time
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model, name)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    model.eval()
    return losses
