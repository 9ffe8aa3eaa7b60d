"""Activation modes: on the layers, changed in place or while loading, and written as they are."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

import bitlm
from bitlm import Scheme
from bitlm.hf import BitlmConfig
from bitlm.scheme import ACTIVATIONS, LOW_BIT_ACTIVATIONS, SchemeError
from tests import zoo

LAYERS = 14  # linear ones of the tiny llama


def llama(name: str = "llama", **config):
    return zoo.pack(zoo.make(name), BitlmConfig(**config))


def again(model, folder, **options):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def counts(model) -> dict[str, int]:
    modes = list(bitlm.activations(model).values())
    return {mode: modes.count(mode) for mode in set(modes)}


@pytest.mark.parametrize("mode", ACTIVATIONS)
def test_a_scheme_says_the_mode_of_its_layers(mode, tmp_path):
    model = llama(scheme=Scheme(activation=mode),
                  overrides={"down_proj": {"activation": "int16"}})
    expected = {name: "int16" if "down_proj" in name else mode for name in bitlm.activations(model)}
    assert len(expected) == LAYERS and bitlm.activations(model) == expected
    assert bitlm.activations(again(model, tmp_path)) == expected


def test_packed_on_the_fly(tmp_path):
    zoo.make("llama").save_pretrained(tmp_path)
    config = BitlmConfig("ternary", activation="int8", embeddings=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert counts(model) == {"int8": LAYERS + 1}


def test_float_is_not_written(tmp_path):
    again(llama(activation="float"), tmp_path)
    assert "activation" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2", "t5_relu"])
@pytest.mark.parametrize("embeddings", [None, 8])
def test_all_layers_at_once(name, embeddings, tmp_path):
    model = zoo.pack(zoo.make(name), BitlmConfig(
        embeddings=embeddings, overrides={"0": {"activation": "int16", "planes": 2}}))
    assert "int16" in counts(model)
    bitlm.set_activation(model, "int8")
    assert set(counts(model)) == {"int8"}
    model.save_pretrained(tmp_path)
    loaded = zoo.auto_class(name).from_pretrained(tmp_path)
    assert bitlm.activations(loaded) == bitlm.activations(model)
    assert zoo.same_tensors(loaded, model) == []
    assert loaded.config.quantization_config.overrides == {"0": {"planes": 2}}


def test_some_layers_and_the_last_word_counts(tmp_path):
    model = llama(overrides={"down_proj": {"planes": 2, "activation": "int16"},
                             "layers": {"scale_dtype": "float32"}})
    bitlm.set_activation(model, "int8", "mlp")
    bitlm.set_activation(model, "int16", "up_proj")
    bitlm.set_activation(model, "float", "mlp")
    bitlm.set_activation(model, "int2", "down_proj")
    modes = bitlm.activations(model)
    assert {n for n, mode in modes.items() if mode == "int2"} == {
        f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert counts(model) == {"int2": 2, "float": 12}
    loaded = again(model, tmp_path)
    assert bitlm.activations(loaded) == modes
    assert zoo.same_tensors(loaded, model) == []  # planes and scales of the overrides are kept


def test_tied_weights_go_together(tmp_path):
    model = llama("llama_tied", embeddings=8)
    for mode, pattern in (("int8", "lm_head"), ("int16", "embed_tokens")):
        bitlm.set_activation(model, mode, pattern)
        assert counts(model) == {"float": LAYERS, mode: 1}
        assert "model.embed_tokens.weight" not in bitlm.activations(model)
        model = again(model, tmp_path)
        assert bitlm.activations(model)["lm_head.weight"] == mode


@pytest.mark.parametrize("mode", LOW_BIT_ACTIVATIONS)
def test_low_bit_modes_refuse_embeddings(mode, tmp_path):
    model = llama("llama_tied", embeddings=8)
    before = bitlm.activations(model), model.config.quantization_config.to_dict()
    for pattern in (None, "lm_head", "embed_tokens", "."):
        with pytest.raises(ValueError, match=f"activation {mode} .* pattern"):
            bitlm.set_activation(model, mode, pattern)
    assert before == (bitlm.activations(model), model.config.quantization_config.to_dict())
    with pytest.raises(ValueError, match="embeddings and head are packed"):
        BitlmConfig(embeddings=8, activation=mode)
    with pytest.raises(ValueError, match="embed_tokens.weight is looked up, not multiplied"):
        llama(embeddings=Scheme(activation=mode))
    with pytest.raises(ValueError, match="embeddings and head are packed"):
        again(model, tmp_path, quantization_config=BitlmConfig(activation=mode))
    bitlm.set_activation(model, mode, r"layers\.")
    assert counts(model) == {mode: LAYERS, "float": 1}


@pytest.mark.parametrize("arguments, words", [
    (("int4",), "activation is 'int4': use one of float, int16"),
    (("int8", "q_porj"), "'q_porj': it matches no packed weight"),
    (("int8", "("), "is no regular expression"),
    (("int8", "embed_tokens"), "embed_tokens.weight is looked up, not multiplied"),
])
def test_what_is_refused_changes_nothing(arguments, words):
    model = llama(embeddings=8)
    before = model.config.quantization_config.to_dict()
    with pytest.raises(ValueError, match=words):
        bitlm.set_activation(model, *arguments)
    assert set(counts(model)) == {"float"}
    assert model.config.quantization_config.to_dict() == before


def test_a_dense_model_has_none():
    assert bitlm.activations(nn.Linear(2, 2)) == {}
    with pytest.raises(ValueError, match="Linear has no packed weight"):
        bitlm.set_activation(nn.Linear(2, 2), "int8")


def test_copies_keep_it():
    model = llama(activation="int8", embeddings=8)
    for other in (copy.deepcopy(model), copy.deepcopy(model.model)):
        assert set(counts(other)) == {"int8"}
    weight = model.model.layers[0].mlp.up_proj.weight
    assert pickle.loads(pickle.dumps(weight)).activation == "int8"


# --- while loading --------------------------------------------------------------------------------

@pytest.fixture
def int8(tmp_path):
    llama(activation="int8", embeddings=8,
          overrides={"q_proj": {"activation": "int16"}}).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_overridden_at_load_and_saved_so(int8):
    plain = AutoModelForCausalLM.from_pretrained(int8)
    assert counts(plain) == {"int8": 13, "int16": 2}
    model = AutoModelForCausalLM.from_pretrained(
        int8, quantization_config=BitlmConfig(activation="float"))
    assert counts(model) == {"float": LAYERS + 1}
    assert zoo.same_tensors(model, plain) == []
    model.save_pretrained(int8 / "float")
    found = json.loads((int8 / "float" / "config.json").read_text())["quantization_config"]
    assert "activation" not in json.dumps(found) and found["embeddings"]["planes"] == 8
    assert counts(AutoModelForCausalLM.from_pretrained(int8 / "float")) == {"float": LAYERS + 1}


def test_transformers_says_what_is_taken_and_what_is_not(int8):
    with pytest.warns(UserWarning, match=r"loading attributes \(e.g. \['activation'\]\)"):
        model = AutoModelForCausalLM.from_pretrained(
            int8, quantization_config=BitlmConfig("ternary", activation="int16"))
    assert counts(model) == {"int16": LAYERS + 1}
    assert model.config.quantization_config.scheme == {"method": "binary", "activation": "int16"}
    with pytest.warns(UserWarning) as caught:
        model = AutoModelForCausalLM.from_pretrained(int8, quantization_config=BitlmConfig())
    assert counts(model) == {"int8": 13, "int16": 2}
    assert not any("loading attributes" in str(warning.message) for warning in caught)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_another_class_of_the_same_body(int8):
    body = AutoModel.from_pretrained(int8, quantization_config=BitlmConfig(activation="int16"))
    bitlm.set_activation(body, "int8", r"^layers\.0\.")
    assert counts(body) == {"int8": 7, "int16": 7}
    body.save_pretrained(int8 / "body")
    assert bitlm.activations(AutoModel.from_pretrained(int8 / "body")) == bitlm.activations(body)


def test_a_config_round_trips_with_its_mode():
    overrides = {"x": {"activation": "float"}, "y": {"planes": 2}}
    config = BitlmConfig("chat", activation="int8", embeddings=8, overrides=overrides)
    assert config.activation == "int8" and config.overrides == overrides
    again = BitlmConfig.from_dict(json.loads(config.to_json_string()))
    assert again.activation is None and again.request == config.request
    assert dict(config) == config.to_dict() and "activation" not in config.to_dict()
    assert again.request.scheme.activation == again.request.embeddings.activation == "int8"
    with pytest.raises(SchemeError, match="activation is 'int3'"):
        BitlmConfig(activation="int3")


@pytest.mark.parametrize("mode, low, high", [
    ("int16", 1e-6, 1e-4), ("int8", 5e-4, 0.05), ("int2", 0.05, 0.6), ("uint1", 0.1, 1)])
def test_the_mode_reaches_the_product(mode, low, high):
    """Errors that no other mode could have."""
    model = llama(embeddings=8)
    exact = zoo.output(model, "llama")
    bitlm.set_activation(model, mode, "layers")
    error = (zoo.output(model, "llama") - exact).norm() / exact.norm()
    assert low < error < high
    bitlm.set_activation(model, "float", "layers")
    assert zoo.output(model, "llama").equal(exact)
