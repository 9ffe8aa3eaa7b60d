"""Hessians against x'x summed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitlm.calibration.statistics import ENOUGH_TOKENS, Collector, Hessian
from bitlm.targets import find
from tests import zoo


def gram(x: torch.Tensor) -> torch.Tensor:
    x = x.reshape(-1, x.shape[-1]).double()
    return x.T @ x / len(x)


def test_the_running_mean_is_the_mean():
    torch.manual_seed(0)
    batches = [torch.randn(n, 3, 8) for n in (2, 5, 1)]
    hessian = Hessian(8, torch.device("cpu"))
    for batch in batches:
        hessian.add(batch.bfloat16().float())
    rows = torch.cat([b.bfloat16().float().reshape(-1, 8) for b in batches])
    assert hessian.tokens == 24
    torch.testing.assert_close(hessian.matrix.double(), gram(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5_relu", "albert"])
def test_each_linear_gets_the_gram_matrix_of_its_inputs(name):
    model = zoo.make(name)
    targets, _ = find(model)
    seen: dict[str, list[torch.Tensor]] = {t.name: [] for t in targets}
    for target in targets:
        module = model.get_submodule(target.name.rpartition(".")[0])
        module.register_forward_pre_hook(
            lambda m, args, n=target.name: seen[n].append(args[0].detach()))
    collector = Collector(model, targets)
    with collector.listening(), torch.no_grad():
        for _ in range(2):
            collector.next_batch()
            model(**zoo.inputs(name))
    for target in targets:
        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen[target.name]])
        torch.testing.assert_close(collector[target.name][0].double(), gram(rows), rtol=1e-4,
                                   atol=1e-6)
        assert collector.tokens(target.name) == len(rows)


def test_layers_with_one_input_share_one_matrix():
    model = zoo.make("llama")
    targets, _ = find(model)
    collector = Collector(model, targets)
    with collector.listening(), torch.no_grad():
        model(**zoo.inputs("llama"))
    at = "model.layers.0.self_attn.{}_proj.weight"
    assert collector[at.format("q")][0] is collector[at.format("k")][0]
    assert collector[at.format("q")][0] is not collector[at.format("o")][0]


@pytest.mark.parametrize("name", zoo.MOE)
def test_experts_see_their_own_tokens_and_the_output_stays(name, monkeypatch):
    model = zoo.make(name)
    targets = [t for t in find(model)[0] if t.experts]
    expected = zoo.output(model, name)
    monkeypatch.setattr("bitlm.calibration.statistics.ENOUGH_TOKENS", 0)
    collector = Collector(model, targets)
    with collector.listening():
        torch.testing.assert_close(zoo.output(model, name), expected, rtol=1e-4, atol=1e-5)
    for target in targets:
        hessians = collector[target.name]
        assert len(hessians) == target.experts
        assert hessians[0].shape == (target.columns, target.columns)
    per_token = 2 if name != "never" else 0
    gate_up = next(t for t in targets if "gate_up" in t.name)
    assert collector.tokens(gate_up.name) == zoo.inputs(name)["input_ids"].numel() * per_token


def test_an_expert_that_saw_nothing_takes_the_mean_of_the_layer():
    model = nn.Module()
    collector = Collector(model, [])
    few, many = Hessian(4, torch.device("cpu")), Hessian(4, torch.device("cpu"))
    many.add(torch.randn(2 * ENOUGH_TOKENS, 4))
    collector.experts, collector._by_expert = {"x": None}, {"x": [few, many]}
    first, second = collector["x"]
    torch.testing.assert_close(first, many.matrix)
    assert second is many.matrix
