"""Schemes as data: JSON both ways, wrong values, presets; without torch."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from bitlm.methods import method
from bitlm.scheme import (
    LOW_BIT_ACTIVATIONS,
    PRESETS,
    Attention,
    Quantizer,
    Scheme,
    SchemeError,
    embedding_scheme,
    grid,
    preset,
)

OTHER = {"method": "salient", "planes": 3, "group_size": 64, "center": "shift", "levels": "twn",
         "refit": 4, "compensate": True, "scales_from": "compensated", "damp": 0.05, "salient": 0.1,
         "salient_layout": "columns", "salient_metric": "hessian", "salient_scope": "tensor",
         "salient_statistics": "diluted", "trits": True, "scale_dtype": "float32",
         "activation": "int8", "input": {"kind": "elastic", "bits": 2, "ranges": "bit"}}
WRONG = {
    "method": [3, None, ["binary"]],
    "planes": [0, 9, 1.5, "2", True, None],
    "group_size": [0, -1, 64.0, True, "column", None, [64]],
    "center": ["mean", None, 0, ["none"]],
    "levels": ["tnw", None],
    "refit": [-1, 1001, 0.5, True, "1"],
    "compensate": [1, "true", None],
    "scales_from": ["both", None],
    "damp": [-0.1, 1.5, math.nan, math.inf, "0.1", True],
    "salient": [-0.1, 1.1, math.nan, "10%", True],
    "salient_layout": ["rows"], "salient_metric": ["wanda"], "salient_scope": ["row"],
    "salient_statistics": ["median"],
    "trits": [0, "no", None],
    "scale_dtype": ["bfloat16", None, 16],
    "activation": ["int4", "INT8", None, 8, ["int8"]],
    "input": [3, "int8", True, ["elastic"]],
}
FIELDS = [field.name for field in dataclasses.fields(Scheme)]


def test_the_tables_above_know_every_field():
    assert sorted(OTHER) == sorted(WRONG) == sorted(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_only_what_differs_is_written(field):
    scheme = Scheme(**{field: OTHER[field]})
    assert scheme.to_dict() == {"method": scheme.method, field: OTHER[field]}
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_everything_round_trips():
    scheme = Scheme(**OTHER)
    assert scheme.to_dict() == OTHER
    assert Scheme.from_dict(json.loads(json.dumps(OTHER))) == scheme
    assert Scheme().to_dict() == {"method": "binary"}
    assert Scheme.from_dict({}) == Scheme()


@pytest.mark.parametrize("field, value", [(f, v) for f, values in WRONG.items() for v in values])
def test_wrong_values_name_their_field(field, value):
    for make in (lambda: Scheme(**{field: value}), lambda: Scheme.from_dict({field: value}),
                 lambda: Scheme().replace(**{field: value})):
        with pytest.raises(SchemeError, match=rf"^{field} is "):
            make()


def test_unknown_keys_are_errors():
    for make in (Scheme.from_dict, lambda data: Scheme().replace(**data)):
        with pytest.raises(SchemeError, match="unknown scheme key 'group': the keys are method, "):
            make({"group": 64})


QUANTIZER = {"kind": "elastic", "bits": 2, "signed": False, "ranges": "bit", "minimum": True,
             "move": True}


@pytest.mark.parametrize("data", [
    QUANTIZER, {"kind": "dynamic", "bits": 8, "signed": False, "per": "tensor", "clip": 2.5},
    {"kind": "threshold", "bits": 1, "threshold": 0.5, "rescale": "mean"}])
def test_quantizers_round_trip(data):
    assert Quantizer(**data).to_dict() == data
    assert Quantizer.from_dict(json.loads(json.dumps(data))) == Quantizer(**data)
    assert Quantizer().to_dict() == {"kind": "elastic", "bits": 1}


@pytest.mark.parametrize("data, words", [
    ({"kind": "lsq"}, "^kind is 'lsq': use one of elastic, dynamic, threshold"),
    ({"kind": ["elastic"]}, "^kind is "),
    ({"bits": 4}, "^bits is 4: use 1 or 2 for kind elastic"),
    ({"bits": True}, "^bits is True"), ({"bits": "1"}, "^bits is '1'"),
    ({"kind": "dynamic", "bits": 4}, "^bits is 4: use 1 or 2 or 8 for kind dynamic"),
    ({"kind": "dynamic", "bits": 2}, "^signed is True: kind dynamic at 2 bits goes from the smal"),
    ({"signed": 1}, "^signed is 1: use true or false"), ({"move": "no"}, "^move is 'no'"),
    ({"ranges": "bipft"}, "^ranges is 'bipft'"),
    ({"minimum": True}, "^minimum is True: only unsigned quantizers of 2 bits"),
    ({"kind": "dynamic", "bits": 8, "move": True}, "^move is True: kind dynamic has no such field"),
    ({"clip": 2.5}, "^clip is 2.5: kind elastic has no such field"),
    ({"kind": "dynamic", "bits": 8, "clip": -1}, "^clip is -1: use a number from 0"),
    ({"kind": "threshold", "threshold": 2}, "^threshold is 2: use a number from 0 to 1"),
    ({"kind": "threshold", "signed": False}, "^signed is False: kind threshold has no such field"),
    ({"kind": "threshold", "rescale": "max"}, "^rescale is 'max'"),
    ({"per": "row"}, "^per is 'row'"),
    ({"steps": 1}, "unknown quantizer key 'steps': the keys are kind, bits, "),
])
def test_wrong_quantizers(data, words):
    with pytest.raises(SchemeError, match=words):
        Quantizer.from_dict(data)
    with pytest.raises(SchemeError, match=words):
        Scheme(input=data)


def test_attention_round_trips():
    data = {"query": QUANTIZER, "value": {"kind": "dynamic", "bits": 8}, "scale_query": True,
            "estimators": 2}
    attention = Attention.from_dict(json.loads(json.dumps(data)))
    assert attention.query == Quantizer(**QUANTIZER) and attention.key is None
    assert attention.to_dict() == data and Attention().to_dict() == {}
    assert hash(attention) == hash(Attention(**data))


@pytest.mark.parametrize("data, words", [
    ({"query": 8}, "^query is 8: use a Quantizer, its dict or None"),
    ({"key": {"bits": 3}}, "^bits is 3"),
    ({"probabilities": {"move": True}}, "^move is True: probabilities have no channels"),
    ({"scale_query": 0}, "^scale_query is 0"), ({"estimators": -1}, "^estimators is -1"),
    ({"keys": {}}, "unknown attention key 'keys'"),
])
def test_wrong_attention(data, words):
    with pytest.raises(SchemeError, match=words):
        Attention.from_dict(data)


@pytest.mark.parametrize("mode", LOW_BIT_ACTIVATIONS)
def test_levels_are_said_once(mode):
    with pytest.raises(SchemeError, match="the quantizer of the input says which levels"):
        Scheme(activation=mode, input=Quantizer())
    assert Scheme(input=Quantizer()).replace(input=None).replace(activation=mode).input is None


def test_a_scheme_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scheme().planes = 2
    assert len({Scheme(), Scheme(planes=1), Scheme(planes=2)}) == 2
    assert len({Scheme(input={"bits": 2}), Scheme(input=Quantizer(bits=2)), Scheme()}) == 2


@pytest.mark.parametrize("size, columns, expected", [
    (128, 64, 64), (128, 300, 128), ("row", 300, 300), ("tensor", 7, 7), (1, 1, 1)])
def test_columns_per_scale(size, columns, expected):
    assert Scheme(group_size=size).columns_per_scale(columns) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_presets_make_sense(name):
    assert preset(name) is PRESETS[name]
    method(preset(name))
    assert method(preset(name).calibrated()) and preset(name).calibrated().compensate


def test_unknown_presets_and_methods():
    with pytest.raises(SchemeError, match="unknown preset 'best': the presets are binary, "):
        preset("best")
    with pytest.raises(SchemeError, match="unknown method 'gptq': the methods are binary, "):
        method(Scheme(method="gptq"))
    with pytest.raises(SchemeError, match="trits stores ternary planes"):
        method(Scheme(trits=True))


def test_embedding_schemes():
    assert embedding_scheme(1) == Scheme() and embedding_scheme(8) == grid(8)
    assert grid(4, 64).to_dict() == {"method": "grid", "planes": 4, "group_size": 64,
                                     "center": "shift"}
    assert grid(4).plane_ratio == 2 and Scheme(planes=4).plane_ratio == 1
    for bits in (0, 9, 2.0, "4", None):
        with pytest.raises(SchemeError, match="embeddings at .* bits: use 1"):
            embedding_scheme(bits)


def test_it_imports_no_torch():
    code = ("import sys, bitlm.scheme; from bitlm import Scheme, PRESETS; Scheme(planes=2); "
            "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules); "
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
