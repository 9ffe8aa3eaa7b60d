"""The plan says beforehand, to the byte, what packing then does."""

from __future__ import annotations

import pytest
import torch

from bitlm.hf import BitlmConfig
from bitlm.methods import METHODS
from bitlm.packing import pack_weight
from bitlm.plan import Request, make_plan
from bitlm.scheme import PRESETS, Scheme, SchemeError, grid
from tests import zoo

MODELS = ("llama", "gpt2", "bert", "t5_relu", "mixtral", "gpt_oss")
SCHEMES = {
    "binary": Scheme(),
    "float32 scales": Scheme(group_size=10, scale_dtype="float32"),
    "threshold, tensor": Scheme(center="threshold", group_size="tensor"),
    "planes with shift": Scheme(planes=3, center="shift", group_size=16, refit=2),
    "drop": Scheme(center="drop", group_size="row"),
    "ternary": Scheme(method="ternary", levels="twn", group_size=16),
    "trits": Scheme(method="ternary", trits=True, planes=2, center="shift", group_size=24),
    "grid": Scheme(method="grid", planes=4),
    "grid with shift": grid(8, 16),
    "salient": Scheme(method="salient", salient=.1, group_size=20),
    "salient of tensor": Scheme(method="salient", salient=.07, salient_scope="tensor",
                                group_size=16, center="shift"),
    "salient columns": Scheme(method="salient", salient=.1, salient_layout="columns",
                              group_size=20),
    "columns of tensor": Scheme(method="salient", salient=.1, salient_layout="columns",
                                salient_scope="tensor", group_size=16),
}


def dense(model, entry):
    path, _, leaf = entry.name.rpartition(".")
    return getattr(model.get_submodule(path), leaf).detach()


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_every_method_has_a_scheme_here():
    assert {scheme.method for scheme in SCHEMES.values()} == set(METHODS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_packing_makes_what_was_planned(scheme, name):
    model = zoo.make(name)
    plan = make_plan(model, Request(scheme))
    packed_bytes = 0
    for entry in plan.entries:
        weight = pack_weight(entry, dense(model, entry)).weight
        found = {n: (t.dtype, tuple(t.shape)) for n, t in weight.named_tensors()}
        assert found == entry.tensors() and list(found) == list(entry.tensors()), entry.name
        assert weight.form == entry.form
        assert weight.nbytes() == entry.nbytes()
        packed_bytes += weight.nbytes()
    assert plan.packed_bytes == packed_bytes


@pytest.mark.parametrize("embeddings", [None, 1, 4])
@pytest.mark.parametrize("name", [*MODELS, "llama_tied"])
def test_totals_are_those_of_the_packed_model(name, embeddings):
    config = BitlmConfig("salient", embeddings=embeddings)
    plan = make_plan(zoo.make(name), config.request)
    model = zoo.pack(zoo.make(name), config)
    tensors = {t.data_ptr(): t for t in model.state_dict().values() if t.numel()}  # tied ones once
    assert plan.total_bytes == size(tensors.values())
    source = zoo.make(name)
    parameters = list(source.parameters())
    assert plan.source_bytes == size(parameters)
    assert plan.packed_numel + plan.dense_numel == sum(p.numel() for p in parameters)


@pytest.mark.parametrize("skip", ["lm_head", "embed_tokens"])
def test_totals_where_one_of_two_tied_weights_is_skipped(skip):
    config = BitlmConfig(embeddings=8, skip=[skip])
    plan = make_plan(zoo.make("llama_tied"), config.request)
    dense_table = plan.dense_numel - 160
    assert dense_table == 99 * 32  # the head's own copy, or the table that both share
    packed_table = any("embed" in entry.name for entry in plan.entries)
    assert packed_table == (skip == "lm_head")
    assert plan.packed_numel == 15360 + packed_table * 99 * 32


def test_a_llama_by_hand():
    """Hidden 32, key/value 16, MLP 48, 2 layers, vocabulary 99; one scale a row."""
    plan = make_plan(zoo.make("llama"), Request(Scheme()))
    layer = (32 + 16 + 16 + 32 + 48 + 48) * (32 // 8 + 2) + 32 * (48 // 8 + 2)
    weights = 32 * 32 * 2 + 16 * 32 * 2 + 3 * 48 * 32
    assert (layer, weights) == (1408, 7680)
    assert (plan.packed_bytes, plan.packed_numel) == (2 * layer, 2 * weights)
    rest = 2 * 99 * 32 + 5 * 32  # embedding, head and norms, in float32
    assert (plan.dense_numel, plan.dense_bytes) == (rest, 4 * rest)
    assert plan.source_bytes == 4 * (rest + 2 * weights)
    assert plan.packed_bits == pytest.approx(8 * 1408 / 7680)  # 1.467
    assert plan.file_bits == pytest.approx(8 * (2816 + 25984) / (15360 + 6496))


def test_bits_of_the_usual_schemes():
    """At a width where every byte is full: 128 columns a group."""
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(256, 64, bias=False)})
    bits = {name: make_plan(model, Request(scheme)).packed_bits for name, scheme in {
        "binary": Scheme(), "ternary": Scheme(method="ternary"), "three": Scheme(planes=3),
        "salient": Scheme(method="salient", salient=.125), "grid": grid(4),
        "float32": Scheme(scale_dtype="float32")}.items()}
    assert bits == {"binary": 1.125, "ternary": 2.125, "three": 3.375, "grid": 4.25,
                    # bitmap 1, values 8 * 1/8, a scale and a zero a row
                    "salient": 1.125 + 1 + 1 + 24 / 256, "float32": 1.25}


def test_planned_from_a_meta_model():
    real = zoo.make("mixtral")
    with torch.device("meta"):
        model = type(real)(real.config)
    assert make_plan(model, Request(Scheme())) == make_plan(real, Request(Scheme()))


def test_overrides():
    overrides = {"mlp": {"planes": 2}, r"down_proj": {"group_size": 16},
                 r"layers\.1\.mlp": {"planes": 3}}
    plan = make_plan(zoo.make("llama"), Request(Scheme(), overrides))
    assert plan["model.layers.0.self_attn.q_proj.weight"].scheme == Scheme()
    assert plan["model.layers.0.mlp.up_proj.weight"].scheme == Scheme(planes=2)
    assert plan["model.layers.0.mlp.down_proj.weight"].scheme == Scheme(planes=2, group_size=16)
    assert plan["model.layers.1.mlp.down_proj.weight"].scheme == Scheme(planes=3, group_size=16)


def test_overrides_of_embeddings_reach_tied_names():
    request = Request(Scheme(), {"embed_tokens": {"planes": 4}}, embeddings=grid(8))
    plan = make_plan(zoo.make("llama_tied"), request)
    assert plan["lm_head.weight"].scheme == plan["model.embed_tokens.weight"].scheme == grid(4)
    assert plan["lm_head.weight"].nbytes() == 0 < plan["model.embed_tokens.weight"].nbytes()


@pytest.mark.parametrize("request_, message", [
    (dict(overrides={"q_porj": {"planes": 2}}), "override pattern 'q_porj' matches no"),
    (dict(overrides={"embed_tokens": {"planes": 2}}), "override pattern 'embed_tokens' matches no"),
    (dict(overrides={"q_proj": {"planse": 2}}), "unknown scheme key 'planse'"),
    (dict(overrides={"q_proj": {"planes": 12}}), "planes is 12"),
    (dict(overrides={"[": {}}), r"'\[' is no regular expression"),
    (dict(skip=("q_porj",)), "skip pattern 'q_porj' matches no weight"),
    (dict(skip=(".",)), "LlamaForCausalLM has no linear layer to pack"),
    (dict(scheme=Scheme(method="vector")), "unknown method 'vector'"),
    (dict(scheme=Scheme(salient=.1)), "use method salient"),
    (dict(overrides={"q_proj": {"method": "grid"}}), "a grid has 2 to 8 planes"),
])
def test_requests_that_cannot_be(request_, message):
    with pytest.raises(ValueError, match=message):
        make_plan(zoo.make("llama"), Request(**{"scheme": Scheme()} | request_))


def test_scheme_errors_are_value_errors():
    assert issubclass(SchemeError, ValueError)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_planned(name):
    plan = make_plan(zoo.make("llama"), Request(PRESETS[name]))
    assert len(plan.entries) == 14 and 0 < plan.packed_bits < 8


def test_an_override_of_a_tied_name_alone_is_refused():
    request = Request(Scheme(), {"lm_head": {"planes": 4}}, embeddings=grid(8))
    with pytest.raises(ValueError, match="tied to model.embed_tokens.weight"):
        make_plan(zoo.make("llama_tied"), request)


def test_embeddings_have_no_activations():
    request = Request(Scheme(), {"embed_tokens": {"activation": "int1"}}, embeddings=grid(8))
    with pytest.raises(ValueError, match="embed_tokens.weight is looked up, not multiplied"):
        make_plan(zoo.make("llama"), request)
    request = Request(Scheme(), embeddings=Scheme(activation="int8"))
    plan = make_plan(zoo.make("llama_tied"), request)
    assert plan["model.embed_tokens.weight"].activation == ""
    assert plan["lm_head.weight"].activation == "int8"
    assert plan["model.layers.0.mlp.up_proj.weight"].activation == "float"


def test_a_request_for_another_activation():
    scheme, int8 = Scheme(planes=2), Scheme(planes=2, activation="int8")
    request = Request(scheme, {"a": {"activation": "int16"},
                               "b": {"planes": 3, "activation": "int1"}}, ("c",), grid(8))
    assert request.with_activation("int8") == Request(int8, {"b": {"planes": 3}}, ("c",),
                                                      grid(8).replace(activation="int8"))
    some = request.with_activation("int8", "a").with_activation("float", "b")
    assert list(some.overrides.items()) == [
        ("b", {"planes": 3, "activation": "int1"}), ("a", {"activation": "int8"}),
        ("(?:b)", {"activation": "float"})]
    assert some.scheme == scheme and request.overrides["a"] == {"activation": "int16"}
    for mode in ("int1", "uint2"):
        with pytest.raises(ValueError, match="embeddings and head are packed"):
            request.with_activation(mode)
        assert Request(scheme).with_activation(mode).scheme.activation == mode
    with pytest.raises(SchemeError, match="activation is 'int3'"):
        request.with_activation("int3", "a")


def test_embeddings_cannot_be_compensated():
    request = Request(Scheme(), {"embed_tokens": {"compensate": True}}, embeddings=grid(8))
    with pytest.raises(ValueError, match="looked up"):
        make_plan(zoo.make("llama"), request)
