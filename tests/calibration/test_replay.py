"""Block by block is the same as all at once, for every architecture that reads tokens."""

from __future__ import annotations

import pytest
import torch

from bitlm.calibration.blocks import find_blocks
from bitlm.calibration.replay import Replay
from tests import zoo

READERS = [name for name, animal in zoo.ZOO.items()
           if animal.kind in ("decoder", "encoder", "seq2seq")]


def blocks_of(model):
    names = [n for n, p in model.named_parameters() if p.ndim >= 2]
    return {n: model.get_submodule(n) for n in find_blocks(model, names) if n}


@pytest.mark.parametrize("budget", [1 << 30, 0])
@pytest.mark.parametrize("name", READERS)
def test_the_end_is_reached_with_the_same_logits(name, budget):
    model = zoo.make(name)
    batch = zoo.inputs(name)
    if hasattr(model.config, "use_cache"):
        batch["use_cache"] = False
    with torch.no_grad():
        expected = model(**batch).logits
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output.logits))
    with Replay(model, blocks_of(model), [batch, batch], budget) as replay:
        order = replay.visits()
        for number in range(len(order)):
            replay.observe(number)
            replay.advance(number)
        seen.clear()
        replay.observe_rest(len(order))
    handle.remove()
    assert len(seen) == 2
    for logits in seen:
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)


def test_blocks_see_what_the_changed_blocks_before_them_give():
    model = zoo.make("llama")
    batch = {"input_ids": torch.randint(3, 90, (2, 6)), "use_cache": False}
    with Replay(model, blocks_of(model), [batch]) as replay:
        replay.observe(0)
        with torch.no_grad():  # what packing does to a block between its two passes
            model.model.layers[0].mlp.down_proj.weight.zero_()
        replay.advance(0)
        inputs = []
        handle = model.model.layers[1].input_layernorm.register_forward_pre_hook(
            lambda module, args: inputs.append(args[0].clone()))
        replay.observe(1)
    expected = []
    handle.remove()
    handle = model.model.layers[1].input_layernorm.register_forward_pre_hook(
        lambda module, args: expected.append(args[0].clone()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    assert torch.equal(inputs[0], expected[0])


def test_the_model_is_as_before_when_the_context_ends():
    model = zoo.make("bart")
    blocks = blocks_of(model)
    with Replay(model, blocks, [zoo.inputs("bart")]) as replay:
        replay.visits()
    assert not any("forward" in vars(block) for block in blocks.values())


def test_blocks_are_outermost_lists():
    model = zoo.make("t5_relu")
    names = [n for n, p in model.named_parameters() if p.ndim >= 2]
    blocks = find_blocks(model, names)
    assert list(blocks)[:2] == ["encoder.block.0", "encoder.block.1"]
    assert "decoder.block.1" in blocks and "shared.weight" in blocks[""]
    assert sorted(n for group in blocks.values() for n in group) == sorted(names)
