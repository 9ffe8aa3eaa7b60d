"""`BitlmConfig`: plain JSON in and out, and clear words for what it is not."""

import json

import pytest

from bitlm import Scheme
from bitlm.hf import BitlmConfig
from bitlm.scheme import PRESETS, Attention, Quantizer, SchemeError


def test_presets_schemes_and_dicts_say_the_same():
    scheme = PRESETS["ternary"]
    configs = [BitlmConfig("ternary"), BitlmConfig(scheme), BitlmConfig(scheme.to_dict())]
    assert len({config.to_json_string() for config in configs}) == 1
    assert configs[0].request.scheme == scheme


def test_roundtrip_through_json():
    config = BitlmConfig(Scheme(planes=2), skip=["lm_head"], embeddings=8, source="org/model",
                         overrides={"down_proj": {"planes": 3}}, metadata={"note": [1, 2]},
                         calibration={"tokens": 1024})
    again = BitlmConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
    assert again.request == config.request
    assert again.request.embeddings == Scheme(method="grid", planes=8, center="shift")
    assert set(config.to_dict()) == {
        "quant_method", "format_version", "stage", "scheme", "overrides", "skip", "embeddings",
        "producer", "source", "calibration", "metadata"}


@pytest.mark.parametrize("overrides", [
    {"down_proj": {"planes": 3}, "mlp": {"planes": 2}},
    {"mlp": {"planes": 2}, "down_proj": {"planes": 3}}])
def test_the_order_of_overrides_outlives_sorted_keys(overrides):
    again = BitlmConfig.from_dict(json.loads(BitlmConfig(overrides=overrides).to_json_string()))
    assert list(again.overrides.items()) == list(overrides.items())
    assert again.to_json_string() == BitlmConfig(overrides=overrides).to_json_string()


def test_embeddings_in_every_spelling():
    assert BitlmConfig(embeddings=None).request.embeddings is None
    assert BitlmConfig(embeddings=1).request.embeddings == Scheme()
    assert BitlmConfig(embeddings=Scheme(planes=4)).request.embeddings == Scheme(planes=4)
    with pytest.raises(ValueError, match="how many bits"):
        BitlmConfig(embeddings=True)
    with pytest.raises(SchemeError, match="1 .binary. or 2 to 8"):
        BitlmConfig(embeddings=9)


@pytest.mark.parametrize("arguments, words", [
    ({"format_version": 3}, "needs format version 3, bitlm .* reads up to 2: pip install -U bitlm"),
    ({"format_version": "1"}, "whole number"),
    ({"groupsize": 1}, "unknown key 'groupsize'.*metadata"),
    ({"stage": "done"}, "packed, training"),
    ({"scheme": "octal"}, "unknown preset"),
    ({"scheme": {"plane": 1}}, "unknown scheme key 'plane'"),
    ({"overrides": {"mlp": {"plane": 1}}}, "unknown scheme key 'plane'"),
    ({"skip": "lm_head"}, "list of regular expressions"),
    ({"attention": {"": 8}}, "attention is 8: use an Attention, its dict or None, by patterns"),
    ({"attention": {"": {"querry": None}}}, "unknown attention key 'querry'"),
    ({"overrides": {"mlp": {"input": {"bits": 5}}}}, "bits is 5"),
])
def test_what_it_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        BitlmConfig(**arguments)


def test_a_newer_version_is_said_before_its_unknown_keys():
    with pytest.raises(ValueError, match="pip install -U bitlm"):
        BitlmConfig.from_dict({"quant_method": "bitlm", "format_version": 9, "novelty": 1})


QUANTIZED = Scheme(input=Quantizer(move=True))
ATTENTION = Attention(query=Quantizer(bits=2), estimators=1)


@pytest.mark.parametrize("arguments", [
    {"scheme": QUANTIZED}, {"embeddings": QUANTIZED},
    {"overrides": {"mlp": {"input": Quantizer()}}},
    {"attention": ATTENTION}, {"attention": {"self": {"key": {"bits": 2}}}}])
def test_what_is_new_needs_version_2(arguments):
    config = BitlmConfig(**arguments)
    found = json.loads(config.to_json_string())
    assert found["format_version"] == config.format_version == 2
    assert ("attention" in found) == ("attention" in arguments)
    again = BitlmConfig.from_dict(found)
    assert again.request == config.request and again.to_dict() == config.to_dict()


def test_what_is_old_needs_version_1():
    again = BitlmConfig.from_dict(BitlmConfig(activation="int8").to_dict() | {"format_version": 2})
    assert again.to_dict()["format_version"] == 1 and "attention" not in again.to_dict()
    assert again.attention is None and again.request.attention == {}


@pytest.mark.parametrize("patterns", [["b", "a"], ["a", "b"], ["b"]])
def test_the_order_of_attention_patterns_is_kept(patterns):
    given = {pattern: ATTENTION if pattern == "a" else None for pattern in patterns}
    again = BitlmConfig.from_dict(json.loads(BitlmConfig(attention=given).to_json_string()))
    assert list(again.request.attention.items()) == list(given.items())
    assert BitlmConfig(attention=Attention()).request.attention == {"": Attention()}
