"""One graph for torch.compile and torch.export."""

import pytest
import torch

from tests import zoo


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "bert", "t5_relu", *zoo.MOE])
def test_one_graph(name):
    model = zoo.packed(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        result = compiled(**zoo.inputs(name)).logits
    torch.testing.assert_close(result, zoo.output(model, name), atol=1e-5, rtol=1e-5)


def test_inductor():
    model = zoo.packed("llama")
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True)
    x = torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model.model.layers[0].mlp(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_exported(name, tmp_path):
    model = zoo.packed(name)
    arguments = zoo.inputs(name) | ({"use_cache": False} if name == "llama" else {})
    program = torch.export.export(model, (), arguments)
    calls = [node for node in program.graph.nodes if "bitlm.packed_linear" in str(node.target)]
    assert len(calls) == zoo.count(model)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(again(**arguments).logits, zoo.output(model, name))
