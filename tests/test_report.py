"""The words that a report uses for activations."""

import pytest

from bitlm.plan import Request, make_plan
from bitlm.report import activation_of, count_activations, precision
from bitlm.scheme import PRESETS, Quantizer, Scheme, grid
from tests import zoo


@pytest.mark.parametrize("scheme, short", [
    (Scheme(), "W1A16"), (Scheme(activation="int16"), "W1A16"), (Scheme(activation="int8"), "W1A8"),
    (Scheme(activation="int1"), "W1A1"), (Scheme(activation="uint1"), "W1A1"),
    (Scheme(activation="int2"), "W1A2"), (Scheme(activation="uint2"), "W1A2"),
    (Scheme(method="ternary", activation="int8"), "W1.58A8"), (grid(4), "W4A16"),
    (PRESETS["chat"], "W3A16"), (PRESETS["salient"], "W1.7A16"),
    (Scheme(input=Quantizer()), "W1A1"), (Scheme("ternary", input=Quantizer(bits=2)), "W1.58A2"),
])
def test_precision(scheme, short):
    assert precision(scheme) == short


def test_layers_are_counted_by_mode():
    request = Request(Scheme(), {"q_proj": {"activation": "int8"}}, embeddings=grid(8))
    modes = [activation_of(entry) for entry in make_plan(zoo.make("llama"), request).entries]
    assert modes.count("") == 1  # the embedding
    assert count_activations(modes) == "float (W1A16): 12, int8 (W1A8): 2, float (W8A16): 1"
    assert count_activations(["", "int8", "int8"]) == "int8"
    entries = make_plan(zoo.make("llama"), Request(Scheme(input=Quantizer(bits=2)))).entries
    assert count_activations(map(activation_of, entries)) == "elastic (W1A2)"
    assert count_activations([""]) == "none"
