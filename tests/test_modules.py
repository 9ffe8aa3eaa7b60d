"""Packed layers, put into a model and taken out again."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from bitlm.methods import encode
from bitlm.modules import PackedEmbedding, PackedLinear, install, packed_weights, uninstall
from bitlm.packing import pack_weight
from bitlm.plan import Request, make_plan
from bitlm.scheme import Scheme, grid
from bitlm.weight import PackedWeight, from_encoded
from tests import zoo

LAYERS = {
    "linear": lambda: nn.Linear(12, 7),
    "linear without bias": lambda: nn.Linear(12, 7, bias=False),
    "conv1d": lambda: Conv1D(7, 12),
    "embedding": lambda: nn.Embedding(9, 12, padding_idx=2),
    "bart": lambda: BartScaledWordEmbedding(9, 12, 2, embed_scale=12 ** 0.5),
    "gemma": lambda: Gemma3TextScaledWordEmbedding(9, 12, 2, embed_scale=12 ** 0.5),
}


def pack(dense, scheme=None):
    scheme = scheme or Scheme(method="ternary", group_size=8)
    found = encode(dense, scheme)
    return from_encoded(found.tensors, tuple(dense.shape), found.group_size, scheme.plane_ratio,
                        dense.dtype)


def matrix(layer):
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def inputs(layer, dtype=torch.float32):
    return torch.arange(9).view(3, 3) if isinstance(layer, nn.Embedding) else \
        torch.randn(2, 3, 12, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_installed_and_taken_out_again(name, dtype):
    model = nn.ModuleDict({"inner": nn.ModuleDict({"layer": LAYERS[name]().to(dtype)})})
    dense = model["inner"]["layer"]
    values, bias = dense.weight.detach().clone(), getattr(dense, "bias", None)
    weight = pack(matrix(dense), Scheme(method="ternary", group_size=2))  # many values
    install(model, "inner.layer.weight", weight)
    layer = model["inner"]["layer"]
    expected_class = PackedEmbedding if isinstance(dense, nn.Embedding) else PackedLinear
    assert type(layer) is expected_class and layer.weight is weight
    assert packed_weights(model) == {"inner.layer.weight": weight}
    assert dense.weight.is_meta  # the dense values are given back
    x = inputs(dense, dtype)
    y = layer(x)

    uninstall(model, "inner.layer.weight")
    assert model["inner"]["layer"] is dense and packed_weights(model) == {}
    assert dense.weight.dtype == dtype and dense.weight.shape == values.shape
    assert getattr(dense, "bias", None) is bias
    assert torch.equal(matrix(dense), weight.dequantize())
    if isinstance(dense, nn.Embedding):
        assert torch.equal(y, dense(x))  # to the last bit: the scale is rounded alike
    else:
        torch.testing.assert_close(y, dense(x), atol=0.05 if dtype == torch.bfloat16 else 1e-5,
                                   rtol=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_it_stays_a_linear_or_an_embedding():
    model = nn.ModuleList([nn.Linear(12, 7), nn.Embedding(9, 12, padding_idx=2), Conv1D(7, 12)])
    for i, layer in enumerate(list(model)):
        install(model, f"{i}.weight", pack(matrix(layer)))
    linear, table, conv = model
    assert isinstance(linear, nn.Linear) and (linear.in_features, linear.out_features) == (12, 7)
    assert isinstance(table, nn.Embedding)
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (9, 12, 2)
    assert isinstance(conv, nn.Linear) and (conv.in_features, conv.out_features) == (12, 7)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for layer in model:
        layer.reset_parameters()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert "7" in repr(linear) and "9" in repr(table)


def test_state_dict_names():
    model = nn.ModuleDict({"up": nn.Linear(12, 7)})
    install(model, "up.weight", pack(model["up"].weight.detach(), Scheme(method="salient",
                                                                         salient=.2)))
    assert list(model.state_dict()) == [
        "up.bias", "up.weight.plane0.signs", "up.weight.plane0.scales", "up.weight.salient.mask",
        "up.weight.salient.values", "up.weight.salient.scales", "up.weight.salient.zeros"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["up.bias"]


def test_training_mode_is_kept():
    model = nn.ModuleDict({"up": nn.Linear(12, 7)}).eval()
    install(model, "up.weight", pack(model["up"].weight.detach()))
    assert not model["up"].training and not model.train().eval()["up"].weight.training
    uninstall(model, "up.weight")
    assert not model["up"].training


def test_wrong_shapes_are_refused():
    model = nn.ModuleDict({"up": nn.Linear(12, 7), "conv": Conv1D(7, 12)})
    with pytest.raises(ValueError, match=r"up.weight is \[7, 12\], its packed form \[12, 7\]"):
        install(model, "up.weight", pack(model["conv"].weight.detach()))
    with pytest.raises(ValueError, match=r"conv.weight is \[7, 12\], its packed form \[12, 7\]"):
        install(model, "conv.weight", pack(model["conv"].weight.detach()))


def test_an_unknown_scale_is_refused():
    with torch.device("meta"):
        table = Gemma3TextScaledWordEmbedding(9, 12, 2, embed_scale=3.0)
    del table.scalar_embed_scale
    with pytest.raises(ValueError, match="not known before loading"):
        install(nn.ModuleDict({"e": table}), "e.weight", pack(torch.randn(9, 12)))


def test_deepcopy_and_uninstall_of_the_copy():
    model = nn.ModuleDict({"up": nn.Linear(12, 7)})
    install(model, "up.weight", pack(model["up"].weight.detach()))
    twin = copy.deepcopy(model)
    x = torch.randn(3, 12)
    y = model["up"](x)
    assert torch.equal(twin["up"](x), y)
    uninstall(twin, "up.weight")
    assert isinstance(model["up"], PackedLinear) and type(twin["up"]) is nn.Linear
    torch.testing.assert_close(twin["up"](x), y)


def test_casts_keep_the_stored_scales():
    model = nn.Sequential(nn.Linear(12, 7))
    install(model, "0.weight", pack(model[0].weight.detach()))
    scales = model[0].weight.plane0.scales.clone()
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16
    assert model[0].weight.plane0.scales.dtype == torch.float16
    assert torch.equal(model[0].weight.plane0.scales, scales)
    assert model(torch.randn(2, 12).bfloat16()).dtype == torch.bfloat16
    assert model.double()(torch.randn(2, 12).double()).dtype == torch.float64


def test_gradients_reach_input_and_bias():
    model = nn.Sequential(nn.Linear(12, 7))
    install(model, "0.weight", pack(model[0].weight.detach()))
    x = torch.randn(3, 12, requires_grad=True)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, model[0].weight.dequantize().sum(0).expand(3, 12))
    assert torch.equal(model[0].bias.grad, torch.full((7,), 3.0))


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(method="salient", salient=.2, center="shift"),
                                    grid(4)], ids=["binary", "salient", "grid"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offload_hooks(where, scheme, tmp_path):
    model = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5))
    for name in ("0.weight", "1.weight", "3.weight"):
        install(model, name, pack(model.get_parameter(name).detach(), scheme))
    ids = torch.tensor([[0, 8, 2]])
    expected, dense = model(ids), model[1].weight.dequantize()
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(model(ids), expected)
    assert torch.equal(model[1].weight.dequantize(), dense)
    assert all(p.is_meta for p in model.parameters())  # and away again


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts(name):
    """gpt-oss stores its experts transposed, and Mixtral gate and up one behind the other."""
    model = zoo.make(name)
    entries = [e for e in make_plan(model, Request(Scheme())).entries if e.target.experts]
    assert len(entries) == 4
    for entry in entries:
        path, _, leaf = entry.name.rpartition(".")
        owner = model.get_submodule(path)
        dense, kind = getattr(owner, leaf).detach().clone(), type(owner)
        assert entry.target.transposed == (name == "gpt_oss")
        weight = pack_weight(entry, dense).weight
        assert weight.shape[0] == 4
        install(model, entry.name, weight)
        assert type(owner) is kind and getattr(owner, leaf) is weight
        assert leaf not in dict(owner.named_parameters(recurse=False))
        uninstall(model, entry.name)
        back = getattr(owner, leaf)
        assert isinstance(back, nn.Parameter) and back.shape == dense.shape
        assert not isinstance(back, PackedWeight) and back.is_contiguous()
        expected = weight.dequantize()
        assert torch.equal(back, expected.transpose(1, 2) if name == "gpt_oss" else expected)


def test_compile():
    torch.compiler.reset()
    model = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 7), nn.ReLU())
    for name in ("0.weight", "1.weight"):
        install(model, name, pack(model.get_parameter(name).detach()))
    ids = torch.tensor([[0, 8, 2]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))
