"""The published placements, and the names of the architectures that they must know."""

from __future__ import annotations

import re

import pytest

from bitlm.placement import PLACEMENTS, placement
from bitlm.scheme import Quantizer, SchemeError

BLOCK = {  # the linear layers of one block: inputs with both signs, and the second one
    "bert": (["bert.encoder.layer.0.attention.self.query",
              "bert.encoder.layer.0.attention.self.key",
              "bert.encoder.layer.0.attention.output.dense", "bert.pooler.dense",
              "bert.encoder.layer.0.intermediate.dense"], "bert.encoder.layer.0.output.dense"),
    "roberta": (["roberta.encoder.layer.0.attention.output.dense",
                 "roberta.encoder.layer.0.intermediate.dense"],
                "roberta.encoder.layer.0.output.dense"),
    "distilbert": (["distilbert.transformer.layer.0.attention.out_lin",
                    "distilbert.transformer.layer.0.ffn.lin1"],
                   "distilbert.transformer.layer.0.ffn.lin2"),
    "bart": (["model.decoder.layers.0.encoder_attn.out_proj", "model.decoder.layers.0.fc1"],
             "model.decoder.layers.0.fc2"),
    "mbart": (["model.encoder.layers.11.self_attn.k_proj", "model.encoder.layers.11.fc1"],
              "model.encoder.layers.11.fc2"),
    "t5": (["encoder.block.0.layer.0.SelfAttention.o", "encoder.block.0.layer.1.DenseReluDense.wi"],
           "encoder.block.0.layer.1.DenseReluDense.wo"),
    "vit": (["vit.layers.0.attention.o_proj", "vit.layers.0.mlp.fc1"], "vit.layers.0.mlp.fc2"),
    "gpt2": (["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc"],
             "transformer.h.0.mlp.c_proj"),
}
GATED = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj",
              "model.layers.0.mlp.down_proj"],
    "t5 v1.1": ["encoder.block.0.layer.1.DenseReluDense.wi_0",
                "encoder.block.0.layer.1.DenseReluDense.wo"],
}


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("model", BLOCK)
def test_the_second_layer_is_unsigned(model, bits):
    others, second = BLOCK[model]
    names = [f"{name}.weight" for name in (*others, second)]
    for recipe, ranges in (("tbt", "tbt"), ("bit", "bit")):
        (pattern, changes), = placement(recipe, bits).overrides(names).items()
        assert [name for name in names if re.search(pattern, name)] == [f"{second}.weight"]
        quantizer = Quantizer.from_dict(changes["input"])
        assert (quantizer.bits, quantizer.signed, quantizer.ranges) == (bits, False, ranges)
    assert placement("bipft", bits).overrides(names) == {}
    assert placement("tbt", 8).overrides(names) == {}


@pytest.mark.parametrize("model", GATED)
def test_behind_a_gate_it_has_both_signs(model):
    assert placement("tbt", 1).overrides(f"{name}.weight" for name in GATED[model]) == {}


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_what_the_papers_say(bits):
    tbt, bit, bipft = (placement(name, bits) for name in ("tbt", "bit", "bipft"))
    assert tbt.attention.scale_query and not bit.attention.scale_query
    assert (tbt.attention.estimators, bipft.attention.estimators) == (0, 1)
    for recipe in (tbt, bit, bipft):
        attention = recipe.attention
        assert recipe.inputs.bits == attention.query.bits == attention.probabilities.bits == bits
        assert attention.query == attention.key == attention.value and attention.query.signed
        assert not attention.probabilities.signed and not attention.probabilities.minimum
    if bits < 8:
        assert (tbt.inputs.move, bit.inputs.move, bipft.inputs.move) == (False, True, True)
        assert (bit.attention.key.move, bipft.attention.key.move) == (True, False)
        assert tbt.second.minimum == bit.second.minimum == (bits == 2)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_what_they_are_compared_with(bits):
    found = placement("minmax", bits)
    attention = found.attention
    assert {found.inputs.kind, attention.value.kind, attention.probabilities.kind} == {"dynamic"}
    assert found.inputs.bits == attention.query.bits == attention.probabilities.bits == bits
    assert found.second is None and not attention.estimators


def test_unknown_ones():
    with pytest.raises(SchemeError, match="unknown placement 'bibert': use one of tbt, bit, bipft"):
        placement("bibert", 1)
    with pytest.raises(SchemeError, match="activations at 4 bits: use 1, 2, 8"):
        placement("tbt", 4)
    assert set(PLACEMENTS) == {"tbt", "bit", "bipft", "bivit", "minmax"}
