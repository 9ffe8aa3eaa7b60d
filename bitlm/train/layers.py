"""Layers with fake-quant weights: dense ones whose forward uses the values that packing will give.

A layer stays the object that it was, with its Parameters and their names, and changes its class.
So the state dict of a prepared model is that of the dense one and the tensors of quantizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ..modules import is_conv1d
from ..ops.rounding import rounded
from ..quantizers import ActivationQuantizer
from ..weight import PackedWeight, from_encoded
from .estimators import straight_through
from .weights import WeightQuantizer


class FakeQuantLayer(nn.Module):
    """What the layers share.

    Children: `quantizer` of the weight, None where the weight is tied to another layer's, which is
    `source` and has it; `input`, the quantizer of a linear layer's inputs, or None.
    dense_class: what the layer was.
    """

    quantizer: WeightQuantizer | None
    input: ActivationQuantizer | None
    source: FakeQuantLayer | None
    dense_class: type[nn.Module]

    @property
    def matrix(self) -> Tensor:
        """The dense weight [N, K]."""
        return self.weight

    @property
    def weight_quantizer(self) -> WeightQuantizer:
        """The quantizer of the weight, its own or that of the layer it is tied to."""
        source = self.__dict__["source"]
        return (self if source is None else source)._modules["quantizer"]

    @torch.compiler.disable  # it looks at values, where a graph would break again and again
    def fake_quant(self) -> Tensor:
        """Return the fake-quant weight [N, K], with its gradient.

        In evaluation without gradients it is kept, until a tensor that it comes from changes: a
        teacher's is the same at every step, and `generate` asks for every token.
        """
        quantizer = self.weight_quantizer
        if self.training or torch.is_grad_enabled():
            self.__dict__.pop("kept", None)
            return quantizer(self.matrix)
        stamp = _stamp(self.weight, quantizer)
        kept = self.__dict__.get("kept")
        if kept is None or stamp is None or kept[0] != stamp:
            kept = self.__dict__["kept"] = stamp, quantizer(self.matrix)
        return kept[1]

    def packed(self) -> PackedWeight:
        """Return the packed weight that the fake-quant one stands for."""
        quantizer, matrix = self.weight_quantizer, self.matrix.detach()
        scheme = quantizer.scheme
        weight = from_encoded(quantizer.encode(matrix), tuple(matrix.shape),
                              scheme.columns_per_scale(matrix.shape[1]), scheme.plane_ratio,
                              matrix.dtype)
        weight.activation = scheme.activation
        return weight


class FakeQuantLinear(FakeQuantLayer, nn.Linear):
    """An nn.Linear with a fake-quant weight; isinstance(layer, nn.Linear) stays true."""

    def forward(self, x: Tensor) -> Tensor:
        return _product(self, x)


class FakeQuantConv1D(FakeQuantLayer):
    """GPT-2's Conv1D, a linear layer whose weight is stored [K, N]."""

    @property
    def matrix(self) -> Tensor:
        return self.weight.T

    def forward(self, x: Tensor) -> Tensor:
        return _product(self, x)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


class FakeQuantEmbedding(FakeQuantLayer, nn.Embedding):
    """An nn.Embedding with a fake-quant weight, and the factor of scaled embeddings (BART, Gemma).

    No gradient reaches the row of `padding_idx`. In training only the rows of a batch are coded,
    where a row's scales are its own.
    """

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.rows(ids)
        scale = getattr(self, "embed_scale", 1.0)
        if isinstance(scale, Tensor):  # Gemma; after loading, only the float has its value
            return rows * rows.new_full((), self.scalar_embed_scale)
        return rows if scale == 1.0 else rows * scale


    @torch.compiler.disable
    def rows(self, ids: Tensor) -> Tensor:
        """Return the fake-quant rows of ids [...]: [..., K]."""
        quantizer = self.weight_quantizer
        if not self.training or not quantizer.by_row or not ids.numel():
            return embedding(ids, self.fake_quant(), self.padding_idx)
        used, places = ids.unique(return_inverse=True)
        padding = (used == self.padding_idx).nonzero() if self.padding_idx is not None else ()
        return embedding(places, quantizer(self.weight[used]),
                         int(padding[0]) if len(padding) else None)


def _stamp(weight: Tensor, quantizer: WeightQuantizer) -> tuple | None:
    """Return what changes when a fake-quant weight does; None where nothing tells."""
    tensors = [weight, *quantizer.parameters(), *quantizer.buffers()]
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() for t in tensors):
        return None
    return (quantizer.scheme, quantizer.parameter,
            *((id(t), t.data_ptr(), t._version, t.dtype) for t in tensors))


def _product(layer: FakeQuantLayer, x: Tensor) -> Tensor:
    """Return x W^T + bias, x rounded as the packed layer rounds it."""
    if layer.input is not None:
        x = layer.input(x)
    activation = layer.weight_quantizer.scheme.activation
    if activation != "float":
        values = x.detach() if x.dtype == torch.float64 else x.detach().float()
        x = straight_through(x, rounded(values, activation).to(x.dtype))
    return linear(x, layer.fake_quant(), layer.bias)


@dataclass(frozen=True)
class Patch:
    """What turns a dense layer into one with a fake-quant weight: see FakeQuantLayer."""

    quantizer: WeightQuantizer | None
    input: ActivationQuantizer | None = None
    source: nn.Module | None = None


def patch(layer: nn.Module, own: Patch) -> None:
    """Let a linear layer, Conv1D or embedding have a fake-quant weight, in place."""
    layer.__dict__["dense_class"] = type(layer)
    if is_conv1d(layer):
        layer.__class__ = FakeQuantConv1D
    else:
        layer.__class__ = FakeQuantLinear if isinstance(layer, nn.Linear) else FakeQuantEmbedding
    layer.register_module("quantizer", own.quantizer)
    layer.register_module("input", own.input)
    layer.__dict__["source"] = own.source  # not as a child: it has its own place


def unpatch(layer: FakeQuantLayer) -> Patch:
    """Make a dense layer again of one with a fake-quant weight, in place; return what it had."""
    own = Patch(layer._modules.pop("quantizer"), layer._modules.pop("input"),
                layer.__dict__.pop("source"))
    layer.__dict__.pop("kept", None)
    layer.__class__ = layer.__dict__.pop("dense_class")
    return own


def fake_quant_layers(model: nn.Module) -> dict[str, FakeQuantLayer]:
    """Return the layers with fake-quant weights by their names."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, FakeQuantLayer)}
