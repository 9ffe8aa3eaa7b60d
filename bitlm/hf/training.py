"""Checkpoints of the training stage: dense ones whose models are prepared before weights come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..attention import install_attention
from ..checkpoint import check_quantizers, raise_problems, read_headers
from ..plan import Entry
from ..quantizers import ElasticQuantizer, quantizers
from ..scheme import Training
from ..train.convert import patches_for, prepare
from ..train.layers import FakeQuantEmbedding, patch
from ..train.weights import WeightQuantizer
from . import skeleton
from .config import BitlmConfig
from .mapping import Found, find_tensors
from .resizing import refuse_resizing
from .tying import submodels, tied_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(model: PreTrainedModel, config: BitlmConfig, files: list[str] | None) -> list[Entry]:
    """Prepare a dense skeleton on the meta device for what its files hold, in place.

    Returns the planned weights that the files lack: transformers draws them anew after loading, and
    `complete` prepares them then. Raises CheckpointError for quantizers that do not fit.
    """
    found = find_tensors(model, read_headers(files)) if files else Found()
    entries = skeleton.planned_entries(model, config.request, found)
    drawn = {name: entry for name, entry in entries.items() if files and not any(
        other in found.dense for other in tied_group(model, name))}
    _patch(model, config, [entry for name, entry in entries.items() if name not in drawn])
    install_attention(model, config.request.attention, found.saved_name, strict=False)
    if files:
        problems = [f"{name} is packed in the file, but config.json says stage 'training'"
                    for name in found.packed]
        headers, planned = found.quantizers, tensors(model)
        if not skeleton.saved_as_this(model):
            headers = {name: header for name, header in headers.items() if name in planned}
        raise_problems(problems or check_quantizers(planned, headers))
    return list(drawn.values())


def complete(model: PreTrainedModel, config: BitlmConfig, drawn: list[Entry]) -> None:
    """Bring a model whose weights were loaded into the state that `train.prepare` returns.

    Raises CheckpointError for tensors of quantizers that were not loaded.
    """
    raise_problems([f"{name} was not loaded" for name, value in tensors(model).items()
                    if not value.is_meta and not getattr(value, "_is_hf_initialized", False)])
    for module in quantizers(model).values():
        if isinstance(module, ElasticQuantizer):
            module.update_ready()
    _patch(model, config, drawn)
    attach(model, config)


def attach(model: PreTrainedModel, config: BitlmConfig) -> None:
    """Let a prepared model say what it is, and be a dense one to transformers.

    With a quantizer `save_pretrained` would not save the state dict that it is given, as trainers
    do with one that they have gathered.
    """
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
    for module in submodels(model):
        module.config.__dict__.pop("_is_quantized", None)
    model.config.quantization_config = config
    refuse_resizing(model, FakeQuantEmbedding)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of all quantizers and estimators of a prepared model by their names."""
    return skeleton.quantizer_tensors(model) | {
        f"{path}.{name}": tensor for path, module in model.named_modules()
        if isinstance(module, WeightQuantizer)
        for name, tensor in module.state_dict(keep_vars=True).items()}


def _patch(model: nn.Module, config: BitlmConfig, entries: list[Entry]) -> None:
    training = Training.from_dict(config.training or {})
    for path, own in patches_for(model, entries, training).items():
        patch(model.get_submodule(path), own)


__all__ = ["attach", "build", "complete", "prepare", "tensors"]
