"""Layers with a packed weight, and putting them into a model and taking them out again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .weight import PackedWeight


class PackedLinear(nn.Linear):
    """An nn.Linear whose `weight` is a PackedWeight; isinstance(layer, nn.Linear) stays true.

    input: the quantizer of its inputs (quantizers.py), or None.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None,
                 dense: nn.Module | None = None, input: nn.Module | None = None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        self.register_module("input", input)
        _keep_dense(self, dense)

    def forward(self, x: Tensor) -> Tensor:
        # As attributes they would cost a microsecond, and so would a call that asks for hooks.
        weight, bias = self._modules["weight"], self._parameters["bias"]
        quantizer = self._modules["input"]
        if quantizer is None:
            if weight._forward_pre_hooks or weight._forward_hooks or is_compiling():
                return weight(x, bias)
            return weight.forward(x, bias)
        if not weight.reads_x or weight.activation != "float":
            return weight(quantizer(x), bias)
        if _kernel_rounds(x, quantizer):
            moved, step = quantizer(x, levels=False)
            return weight(moved, bias, None, quantizer.mode, step)
        return weight(quantizer(x), bias, None, quantizer.exact)

    def reset_parameters(self) -> None:
        """Keep the stored codes: there is nothing to draw anew."""


class PackedEmbedding(nn.Embedding):
    """An nn.Embedding whose `weight` is a PackedWeight, with the factor of scaled embeddings.

    round_scale: round the factor to the dtype of the rows first, as Gemma does and BART does not.
    """

    def __init__(self, weight: PackedWeight, padding_idx: int | None = None, scale: float = 1.0,
                 round_scale: bool = False, dense: nn.Module | None = None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.scale, self.round_scale = scale, round_scale
        self.weight = weight
        _keep_dense(self, dense)

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.weight(ids)
        if self.round_scale:
            return rows * rows.new_full((), self.scale)
        return rows if self.scale == 1.0 else rows * self.scale

    def reset_parameters(self) -> None:
        """Keep the stored codes: there is nothing to draw anew."""


def _kernel_rounds(x: Tensor, quantizer: nn.Module) -> bool:
    """Tell whether the op can round x as the quantizer does: then kernels work on few bits.

    Its gradient knows nothing of the quantizer's, and autocast would change x first.
    """
    if not quantizer.mode or torch.is_autocast_enabled(x.device.type):
        return False
    return not torch.is_grad_enabled() or not (
        x.requires_grad or any(p.requires_grad for p in quantizer.parameters()))


def _keep_dense(packed: nn.Module, dense: nn.Module | None) -> None:
    """Remember the emptied dense layer, for `uninstall`, without making it a submodule."""
    if dense is not None:
        empty = torch.empty_like(dense.weight, device="meta")
        dense.weight = nn.Parameter(empty, requires_grad=False)
    packed.__dict__["dense"] = dense


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's Conv1D, a linear layer with its weight stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def install(model: nn.Module, name: str, weight: PackedWeight, input: nn.Module | None = None
            ) -> None:
    """Replace the dense weight `name` ("model.layers.0.mlp.up_proj.weight") of `model`, in place.

    Linear layers, Conv1D and embeddings become packed layers; any other owner (fused experts) keeps
    its class and gets the PackedWeight in the place of the Parameter. input: the quantizer of the
    inputs of a linear layer. Raises ValueError when the shapes differ, and for an owner that takes
    no quantizer.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    dense = getattr(owner, leaf)
    shape = tuple(reversed(dense.shape)) if is_conv1d(owner) else tuple(dense.shape)
    if getattr(owner, "is_transposed", False) and weight.form.experts:
        shape = (shape[0], shape[2], shape[1])
    if shape != tuple(weight.shape):
        raise ValueError(f"{name} is {list(shape)}, its packed form {list(weight.shape)}")
    linear = leaf == "weight" and (isinstance(owner, nn.Linear) or is_conv1d(owner))
    if input is not None and not linear:
        raise ValueError(f"{name} is of a {type(owner).__name__}, which takes no quantizer of its "
                         "inputs: only linear layers do")
    if linear:
        _replace(model, path, owner, PackedLinear(weight, owner.bias, owner, input))
    elif leaf == "weight" and isinstance(owner, nn.Embedding):
        scale, rounded = _scale(owner, name), isinstance(getattr(owner, "embed_scale", 1.0), Tensor)
        _replace(model, path, owner,
                 PackedEmbedding(weight, owner.padding_idx, scale, rounded, owner))
    else:
        del owner._parameters[leaf]
        owner.add_module(leaf, weight)


def uninstall(model: nn.Module, name: str) -> None:
    """Put the dequantized dense weight back in the place of the packed weight `name`.

    A quantizer of the layer's inputs goes: a dense layer has none.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    weight: PackedWeight = getattr(owner, leaf)
    dense = weight.dequantize()
    if isinstance(owner, (PackedLinear, PackedEmbedding)):
        layer = owner.dense
        dense = dense.T.contiguous() if is_conv1d(layer) else dense
        layer.weight = nn.Parameter(dense, requires_grad=False)
        if isinstance(owner, PackedLinear):
            layer.bias = owner.bias
        _replace(model, path, owner, layer)
    else:
        if getattr(owner, "is_transposed", False):
            dense = dense.transpose(1, 2).contiguous()
        del owner._modules[leaf]
        owner.register_parameter(leaf, nn.Parameter(dense, requires_grad=False))


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Return the packed weights of a model by dense parameter name; tied ones appear once each."""
    return {name: module for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, PackedWeight)}


def _replace(model: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    new.train(old.training)
    parent, _, child = path.rpartition(".")
    model.get_submodule(parent).register_module(child, new)


def _scale(embedding: nn.Embedding, name: str) -> float:
    # Gemma 3 keeps the factor as a buffer, which is on meta before loading, and as a float.
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    if isinstance(scale, Tensor) and scale.is_meta:
        raise ValueError(f"the scale of {name} is not known before loading: leave embeddings dense")
    return float(scale)
