"""Packed experts against the dense ones that they stand for."""

import copy

import pytest
import torch

from bitlm.hf import BitlmConfig
from bitlm.hf.experts import NAME
from bitlm.modules import packed_weights, uninstall
from bitlm.weight import PackedWeight
from tests import zoo


def dequantized(model):
    """Return a copy whose experts are the dense weights that the packed ones stand for."""
    dense = copy.deepcopy(model)
    for name, weight in packed_weights(dense).items():
        if weight.form.experts:
            uninstall(dense, name)
    for module in dense.modules():
        if hasattr(module, "is_transposed"):
            module.config._experts_implementation = "eager"
    return dense


@pytest.mark.parametrize("name", zoo.MOE)
def test_same_as_the_dense_experts(name):
    model = zoo.packed(name)
    assert model.config._experts_implementation == NAME
    torch.testing.assert_close(zoo.output(model, name), zoo.output(dequantized(model), name),
                               atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", zoo.MOE)
@pytest.mark.parametrize("dense", ["down_proj", "gate_up_proj"])
def test_one_packed_and_the_other_dense(name, dense, tmp_path):
    config = BitlmConfig("ternary", skip=[rf"experts\.{dense}"])
    model = zoo.pack(zoo.make(name), config)
    kinds = {leaf: isinstance(getattr(m, leaf), PackedWeight) for m in model.modules()
             if hasattr(m, "is_transposed") for leaf in ("gate_up_proj", "down_proj")}
    assert kinds[dense] is False and sum(kinds.values()) == 1
    torch.testing.assert_close(zoo.output(model, name), zoo.output(dequantized(model), name),
                               atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    loaded, report = zoo.auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and zoo.same_tensors(model, loaded) == []
    assert torch.equal(zoo.output(model, name), zoo.output(loaded, name))


def test_different_schemes_in_one_experts_module(tmp_path):
    config = BitlmConfig(overrides={r"experts\.down_proj": {"method": "ternary", "trits": True}})
    model = zoo.pack(zoo.make("mixtral"), config)
    assert "plane0.trits" in model.model.layers[0].mlp.experts.down_proj.form.names
    model.save_pretrained(tmp_path)
    loaded, report = zoo.auto_class("mixtral").from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and zoo.same_tensors(model, loaded) == []


def test_dense_experts_keep_their_own_implementation():
    model = zoo.pack(zoo.make("mixtral"), BitlmConfig(skip=["experts"]))
    assert model.config._experts_implementation != NAME


@pytest.mark.parametrize("name", zoo.MOE)
def test_gradients_reach_the_input(name):
    model, dense = zoo.packed(name), dequantized(zoo.packed(name))
    gradients = []
    for each in (model, dense):
        x = each.get_input_embeddings()(zoo.inputs(name)["input_ids"]).detach().requires_grad_()
        each(inputs_embeds=x).logits.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    model.zero_grad()


def test_an_expert_that_no_token_chose():
    model = zoo.packed("mixtral")
    experts = model.model.layers[0].mlp.experts
    index = torch.tensor([[0, 3], [3, 0]])
    out = experts(torch.randn(2, 32), index, torch.rand(2, 2))
    assert out.shape == (2, 32) and out.isfinite().all()
