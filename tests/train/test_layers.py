"""The layers with fake-quant weights, against their formulas and their packed forms."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from bitlm.modules import install
from bitlm.quantizers import build
from bitlm.scheme import Quantizer, Scheme, grid
from bitlm.train.layers import (
    FakeQuantConv1D,
    FakeQuantEmbedding,
    FakeQuantLinear,
    Patch,
    fake_quant_layers,
    patch,
    unpatch,
)
from bitlm.train.weights import quantizer

ROW = Scheme(group_size="row")


def patched(layer, scheme=ROW, input=None, source=None, **options):
    """Return a layer that was given a fake-quant weight, its quantizer initialised."""
    matrix = layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
    own = None
    if source is None:
        own = quantizer(scheme, tuple(matrix.shape), name="layer.weight", **options)
        own.initialise(matrix)
    patch(layer, Patch(own, input, source))
    return layer


def packed(layer):
    """Return the packed layer that finishing makes."""
    holder = nn.Sequential(copy.deepcopy(layer))
    weight, own = holder[0].packed(), unpatch(holder[0])
    install(holder, "0.weight", weight, own.input)
    return holder[0]


def test_a_linear_layer():
    layer = nn.Linear(8, 3)
    weight = layer.weight
    patched(layer)
    assert type(layer) is FakeQuantLinear and isinstance(layer, nn.Linear)
    assert layer.weight is weight and list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 5, 8)
    values = weight.abs().mean(1, keepdim=True).half().float() * torch.where(weight >= 0, 1., -1.)
    torch.testing.assert_close(layer(x), linear(x, values, layer.bias))
    layer(x).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand(3, 8))
    torch.testing.assert_close(packed(layer)(x), layer(x))


def test_conv1d():
    layer = patched(Conv1D(3, 8), Scheme("ternary", group_size=4), learned=True)
    assert type(layer) is FakeQuantConv1D and layer.quantizer.scales.shape == (3, 2)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x), x @ layer.fake_quant().T + layer.bias)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (8, 3) and layer.quantizer.scales.grad.shape == (3, 2)
    torch.testing.assert_close(packed(layer)(x), layer(x))
    assert repr(layer).startswith("FakeQuantConv1D(\n  nf=3, nx=8")


@pytest.mark.parametrize("scheme, spec", [
    (ROW, Quantizer("dynamic", 8)),
    (ROW, Quantizer(bits=1)),
    (ROW, Quantizer(bits=2, signed=False, minimum=True)),
    (ROW.replace(activation="int8"), None),
    (ROW.replace(activation="int16"), None),
    (ROW.replace(activation="int1"), None),
    (ROW.replace(activation="int8"), Quantizer(bits=2)),
])
def test_inputs_are_rounded_as_the_packed_layer_rounds_them(scheme, spec):
    input = None if spec is None else build(spec, 64, "layer.input")
    layer = patched(nn.Linear(64, 16), scheme, input)
    x = torch.randn(4, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    layer.eval()
    dense = linear(x, layer.fake_quant(), layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(packed(layer)(x), layer(x), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(layer(x), dense, rtol=1e-6, atol=1e-6)


def test_rounding_by_the_scheme_passes_the_gradient():
    layer = patched(nn.Linear(8, 3), ROW.replace(activation="int8"))
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.fake_quant().sum(0).expand(2, 8))


@pytest.mark.parametrize("make", [
    lambda: nn.Embedding(7, 8, padding_idx=1),
    lambda: BartScaledWordEmbedding(7, 8, 1, embed_scale=3.0),
    lambda: Gemma3TextScaledWordEmbedding(7, 8, 1, embed_scale=8 ** 0.5),
])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings(make, dtype):
    dense = make().to(dtype)
    layer = patched(copy.deepcopy(dense))
    assert type(layer) is FakeQuantEmbedding
    ids = torch.tensor([[0, 1, 6], [6, 3, 1]])
    rows = layer(ids)
    with torch.no_grad():
        dense.weight.copy_(layer.fake_quant())
        assert torch.equal(rows, dense(ids)) and torch.equal(packed(layer)(ids), rows)
    rows.sum().backward()
    grads = layer.weight.grad.abs().sum(1)
    assert not grads[[1, 2, 4, 5]].any() and grads[[0, 3, 6]].all()
    assert not layer(torch.tensor([1])).any()  # the row of the padding is 0


@pytest.mark.parametrize("scheme", [ROW, Scheme(group_size=4), grid(8), Scheme("ternary"),
                                    Scheme(group_size="tensor")])
def test_training_codes_the_rows_of_a_batch_alone(scheme, monkeypatch):
    layer = patched(nn.Embedding(50, 8, padding_idx=1), scheme)
    ids = torch.tensor([[0, 1, 7], [7, 3, 1]])
    whole = torch.nn.functional.embedding(ids, layer.quantizer(layer.weight), 1)
    upstream = torch.randn(2, 3, 8)
    wanted, = torch.autograd.grad(whole, layer.weight, upstream)
    sizes = []
    coded = type(layer.quantizer).forward
    monkeypatch.setattr(type(layer.quantizer), "forward", lambda self, weight: (
        sizes.append(len(weight)), coded(self, weight))[1])
    rows = layer(ids)
    found, = torch.autograd.grad(rows, layer.weight, upstream)
    assert torch.equal(rows, whole) and sizes == [50 if scheme.group_size == "tensor" else 4]
    torch.testing.assert_close(found, wanted)
    assert not found[1].any() and found[7].any()
    assert layer(ids[:, :0]).shape == (2, 0, 8)
    assert torch.equal(layer.eval()(ids), whole) and sizes[-1] == 50


def test_the_fake_quant_weight_is_kept_in_evaluation_until_something_changes():
    layer = patched(nn.Linear(8, 3), learned=True)
    with torch.no_grad():
        assert layer.fake_quant() is not layer.fake_quant()
        layer.eval()
        kept = layer.fake_quant()
        assert layer.fake_quant() is kept
        layer.weight.neg_()
        assert torch.equal(layer.fake_quant(), -kept)
        kept = layer.fake_quant()
        layer.quantizer.scales.mul_(2)
        assert torch.equal(layer.fake_quant(), 2 * kept)
        layer.load_state_dict(patched(nn.Linear(8, 3), learned=True).state_dict())
        assert torch.equal(layer.fake_quant(), layer.quantizer(layer.weight))
        layer.to(torch.bfloat16)
        assert layer.fake_quant().dtype == torch.bfloat16
        kept = layer.fake_quant()
    assert layer.fake_quant() is not kept and layer.fake_quant().requires_grad


def test_a_tied_layer_has_the_quantizer_of_its_source():
    table = patched(nn.Embedding(6, 8), Scheme("salient", salient=0.25))
    head = nn.Linear(8, 6, bias=False)
    head.weight = table.weight
    patched(head, source=table)
    assert "quantizer.mask" in table.state_dict() and list(head.state_dict()) == ["weight"]
    assert torch.equal(head.fake_quant(), table.fake_quant())
    assert head.weight_quantizer is table.quantizer
    both = copy.deepcopy(nn.ModuleList([table, head]))
    assert both[1].weight_quantizer is both[0].quantizer is not table.quantizer
    assert list(fake_quant_layers(both)) == ["0", "1"]


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 4), lambda: Conv1D(4, 8),
                                  lambda: nn.Embedding(4, 8)])
def test_unpatch_undoes_patch(make):
    layer = make()
    before, names = type(layer), list(layer.__dict__)
    patched(layer, learned=True)
    own = unpatch(layer)
    assert type(layer) is before and list(layer.__dict__) == names
    assert list(layer.state_dict()) in (["weight"], ["weight", "bias"])
    patch(layer, own)
    assert layer.quantizer is own.quantizer and layer.fake_quant().shape == (4, 8)


@pytest.mark.parametrize("scheme, options", [
    (Scheme(planes=2, group_size=3), {}),
    (Scheme("ternary", group_size="tensor", trits=True), {}),
    (Scheme("grid", 3, group_size="row", center="shift"), {}),
    (Scheme(planes=2, group_size="row"), {"learned": True}),
    (Scheme("salient", salient=0.3, salient_layout="columns"), {}),
    (Scheme(group_size="row", activation="int8"), {"estimator": "biper"}),
])
def test_the_packed_weight_is_exactly_the_fake_quant_one(scheme, options):
    layer = patched(nn.Linear(8, 5), scheme, **options)
    weight = layer.packed()
    assert torch.equal(weight.dequantize(), layer.fake_quant())
    assert weight.activation == scheme.activation and weight.dtype == torch.float32
