"""Quantized inputs and attention in transformers models: training, saving, loading, serving."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification

import bitlm
from bitlm.attention import attention_modules, install_attention
from bitlm.checkpoint import CheckpointError
from bitlm.hf import BitlmConfig
from bitlm.placement import placement
from bitlm.quantizers import ElasticQuantizer, build, initialise, quantizers
from bitlm.scheme import Attention, Quantizer, Scheme
from tests import zoo

RECIPES = {"bert": "bipft", "bart": "tbt", "vit": "bit", "llama": "bipft"}
MOVED = Attention(Quantizer(move=True), Quantizer(bits=2), Quantizer("dynamic", 8),
                  Quantizer(bits=2, signed=False), estimators=2)


def config(name, recipe, bits, model=None):
    """Return the configuration of a recipe for the zoo's model of that name."""
    place = placement(recipe, bits)
    names = [n for n, _ in (model or zoo.make(name)).named_parameters()]
    return BitlmConfig(Scheme(group_size="row", input=place.inputs),
                       overrides=place.overrides(names), attention=place.attention)


def lively(name, **changes):
    """Return a dense model whose attention looks at some tokens more than at others."""
    model = zoo.make(name, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 6 if parameter.ndim == 2 else 1
    return model


def packed(name, recipe=None, bits=1, trained=True, **changes):
    """Return a packed model whose quantizers have their steps, and are like no fresh ones."""
    model = lively(name, **changes)
    zoo.pack(model, config(name, recipe or RECIPES[name], bits, model))
    if trained:
        initialise(model, **zoo.inputs(name))
        for parameter in ours(model):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def ours(model):
    return [p for n, p in model.named_parameters()
            if ".input." in n or ".quantizers." in n or ".estimators." in n]


def loss(model, name):
    output = model(**zoo.inputs(name))
    return output.logits.square().mean()


# --- training -------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_learns_with_and_without_checkpointing(name, bits):
    model = packed(name, bits=bits, trained=False).train()
    for parameter in ours(model):
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(ours(model), 1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(loss(model, name))
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours(model))
    still = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert len(still) <= 2, still  # what enters the last layers may be clipped as a whole
    assert losses[-1] != losses[0]

    gradients = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model)
        if checkpointing:
            twin.gradient_checkpointing_enable({"use_reentrant": False})
        twin.zero_grad()
        torch.manual_seed(3)
        loss(twin, name).backward()
        gradients.append([p.grad for p in ours(twin)])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["bert", "bart", "t5_relu", "vit", "llama"])
def test_a_dense_model_without_quantizers_is_as_eager(name):
    model = zoo.make(name)
    model.set_attn_implementation("eager")
    expected = zoo.output(model, name)
    found = install_attention(model, {"": Attention()})
    assert len(found.installed) == len(attention_modules(model)[0]) and not found.dense
    torch.testing.assert_close(zoo.output(model, name), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "llama", "bart", "t5_relu"])
def test_masks_arrive(name):
    """What is padded changes nothing; it is not looked at."""
    model = lively(name)
    install_attention(model, {"": Attention(*[Quantizer("dynamic", 8)] * 3)})
    inputs = zoo.inputs(name)
    expected = zoo.output(model, name)
    ids = inputs["input_ids"]
    padded = torch.cat([ids, torch.full((2, 3), 5)], 1)
    mask = torch.ones_like(padded)
    mask[:, -3:] = 0
    with torch.no_grad():
        result = model(**inputs | {"input_ids": padded, "attention_mask": mask}).logits
        other = model(**inputs | {"input_ids": padded}).logits
    own = result[:, :expected.shape[1]] if name == "llama" else result
    torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)
    if name != "llama":  # what is causal does not look ahead
        assert not torch.allclose(other, expected, atol=1e-3)


# --- saving and loading ---------------------------------------------------------------------------

@pytest.mark.parametrize("name, recipe, bits", [
    ("bert", "bipft", 1), ("bert", "bit", 2), ("roberta", "tbt", 2), ("distilbert", "bit", 1),
    ("bart", "tbt", 1), ("bart", "bipft", 1), ("t5_relu", "tbt", 2), ("t5_gated", "bit", 1),
    ("vit", "bit", 1), ("llama", "bipft", 1), ("gpt2", "tbt", 2), ("albert", "tbt", 8),
    ("bert", "bipft", 8), ("whisper", "tbt", 1)])
def test_saved_and_loaded(name, recipe, bits, tmp_path):
    model = packed(name, recipe, bits)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["format_version"] == 2
    loaded, report = zoo.auto_class(name).from_pretrained(
        tmp_path, attn_implementation="sdpa", output_loading_info=True)
    assert not any(report.values()) and zoo.same_tensors(model, loaded) == []
    assert len(quantizers(loaded)) == len(quantizers(model)) > 0
    assert torch.equal(zoo.output(loaded, name), zoo.output(model, name))
    assert not any(p.requires_grad for p in ours(loaded))
    loaded.train()
    loaded(**zoo.inputs(name))  # nothing that was loaded sets itself again
    steps = [n for n in model.state_dict() if n.endswith((".step", ".initialised"))]
    assert all(torch.equal(loaded.state_dict()[n], model.state_dict()[n]) for n in steps)
    loaded.eval().save_pretrained(tmp_path / "again")
    again = zoo.auto_class(name).from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert {p.dtype for p in ours(again)} <= {torch.float32} and again.dtype == torch.bfloat16


def test_the_implementation_stays(tmp_path):
    model = packed("bert")
    model.save_pretrained(tmp_path)
    expected = zoo.output(model, "bert")
    for implementation in ("sdpa", "eager"):
        loaded = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, attn_implementation=implementation)
        assert loaded.config._attn_implementation == "bitlm"
        assert torch.equal(zoo.output(loaded, "bert"), expected)
        with pytest.raises(ValueError, match="rounds its operands, sdpa does not"):
            loaded.set_attn_implementation("sdpa")
    loaded.set_attn_implementation("bitlm")


@pytest.mark.parametrize("name", ["bert", "bart", "vit", "llama"])
def test_attentions_are_returned(name):
    model = packed(name)
    with torch.no_grad():
        output = model(**zoo.inputs(name), output_attentions=True)
    found = [a for key in ("attentions", "encoder_attentions", "decoder_attentions",
                           "cross_attentions") for a in output.get(key) or ()]
    assert len(found) == (6 if name == "bart" else 2)
    for attentions in found:
        torch.testing.assert_close(attentions.sum(-1), torch.ones(attentions.shape[:-1]))


def test_another_class_of_the_same_body(tmp_path):
    model = packed("bert")
    model.save_pretrained(tmp_path)
    body, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and zoo.same_tensors(body, model.bert) == []
    ids = zoo.inputs("bert")["input_ids"]
    with torch.no_grad():
        assert torch.equal(body(ids).last_hidden_state, model.bert(ids).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "body", num_labels=3)
    assert zoo.same_tensors(again.bert, body) == []


def test_patterns_are_read_against_the_saved_names(tmp_path):
    first = r"^bert\.encoder\.layer\.0\."
    given = BitlmConfig(Scheme(group_size="row"), overrides={first: {"input": Quantizer()}},
                        attention={"": Attention(Quantizer(bits=2)), first: None})
    model = zoo.pack(zoo.make("bert"), given)
    initialise(model, **zoo.inputs("bert"))
    model.eval().save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert zoo.same_tensors(body, model.bert) == []
    names = list(quantizers(body))
    assert "encoder.layer.1.attention.self.quantizers.query" in names
    assert len(names) == 7 and "encoder.layer.0.attention.self.query.input" in names
    expected = zoo.output(model, "bert")
    assert torch.equal(zoo.output(AutoModelForSequenceClassification.from_pretrained(tmp_path),
                                  "bert"), expected)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_from_a_state_dict(name):
    model = packed(name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=state)
    assert zoo.same_tensors(loaded, model) == []
    assert torch.equal(zoo.output(loaded, name), zoo.output(model, name))
    lost = next(n for n in state if n.endswith("quantizers.key.step"))
    del state[lost]
    with pytest.raises(CheckpointError, match=f"{lost} was not loaded"):
        type(model).from_pretrained(None, config=model.config, state_dict=state)


def drop(state):
    del state["bert.encoder.layer.0.attention.self.query.input.step"]


def add(state):
    state["bert.encoder.layer.0.output.dense.input.minimum"] = torch.zeros(1)


def reshape(state):
    state["bert.encoder.layer.1.attention.self.estimators.q_p.weight"] = torch.zeros(2, 32)


def cast(state):
    name = "bert.encoder.layer.1.attention.self.quantizers.key.step"
    state[name] = state[name].half()


@pytest.mark.parametrize("damage, words", [
    (drop, r"layer.0.attention.self.query.input.step is missing"),
    (add, r"layer.0.output.dense.input.minimum is in the file, but config.json asks for no such"),
    (reshape, r"estimators.q_p.weight is float32 \[2, 32\], expected float32 \[1, 32\]"),
    (cast, r"quantizers.key.step is float16 \[1\], expected float32 \[1\]")])
def test_damaged_files(damage, words, tmp_path):
    packed("bert").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_what_was_never_trained_says_so(tmp_path):
    model = packed("bert", trained=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="self.query.input has no step yet"):
        zoo.output(loaded, "bert")


def test_without_learned_quantizers_nothing_need_be_trained(tmp_path):
    given = BitlmConfig(Scheme(group_size="row", input=Quantizer("dynamic", 8)),
                        attention=Attention(*[Quantizer("dynamic", 8)] * 3))
    zoo.make("bert").save_pretrained(tmp_path / "dense")
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "dense", quantization_config=given)
    loaded.save_pretrained(tmp_path / "packed")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert torch.equal(zoo.output(again, "bert"), zoo.output(loaded, "bert"))
    plain = zoo.pack(zoo.make("bert"), BitlmConfig(Scheme(group_size="row", activation="int8")))
    install_attention(plain, {"": Attention(*[Quantizer("dynamic", 8)] * 3)})
    assert torch.equal(zoo.output(plain, "bert"), zoo.output(loaded, "bert"))
    assert len(quantizers(again)) == 13 + 6 and not ours(again)


# --- serving --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["llama", "bart"])
def test_generation_with_a_cache(name):
    model = packed(name, "tbt")
    inputs = {"input_ids": zoo.inputs(name)["input_ids"]}
    results = [model.generate(**inputs, max_new_tokens=6, num_beams=2, do_sample=False,
                              use_cache=cache) for cache in (True, False)]
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_estimators_of_what_is_causal_do_without_a_cache(name, tmp_path):
    model = packed(name, "bipft")
    ids = zoo.inputs(name)["input_ids"]
    assert model.generate(input_ids=ids, max_new_tokens=4, num_beams=2).shape[1] > 2
    with pytest.raises(RuntimeError, match="a cache keeps none; pass use_cache=False"):
        model.generate(input_ids=ids, max_new_tokens=4, use_cache=True)
    if name == "bart":  # the encoder's states are at hand, whatever is cached
        given = config("bart", "bipft", 1)
        given.attention |= {r"decoder.*self_attn": None}
        some = zoo.pack(zoo.make("bart"), given)
        initialise(some, **zoo.inputs("bart"))
        results = [some.eval().generate(input_ids=ids, max_new_tokens=6, num_beams=2,
                                        use_cache=cache) for cache in (True, False)]
        assert torch.equal(*results) and some.config.use_cache


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_one_graph(name):
    torch.compiler.reset()
    given = config(name, RECIPES[name], 1)
    given.attention |= {r"layers?\.1\.": None}  # that one goes through transformers' function
    model = zoo.pack(zoo.make(name), given)
    initialise(model, **zoo.inputs(name))
    model.eval()
    arguments = zoo.inputs(name) | ({"use_cache": False} if name == "llama" else {})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**arguments).logits, zoo.output(model, name),
                                   atol=1e-5, rtol=1e-5)
    program = torch.export.export(model, (), arguments)
    torch.testing.assert_close(program.module()(**arguments).logits, zoo.output(model, name),
                               atol=1e-5, rtol=1e-5)


def test_a_compiled_training_step():
    torch.compiler.reset()
    model = packed("bert", num_hidden_layers=1).train()
    for parameter in ours(model):
        parameter.requires_grad_(True)
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loss(forward, "bert").backward()
        gradients.append([p.grad.clone() for p in ours(model)])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded(where, tmp_path):
    model = packed("bert")
    model.save_pretrained(tmp_path / "model")
    placed = {"bert.embeddings": "cpu", "bert.encoder": where, "bert.pooler": where,
              "classifier": "cpu"}
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=tmp_path / "folder")
    torch.testing.assert_close(zoo.output(loaded, "bert"), zoo.output(model, "bert"))


# --- together with the rest -----------------------------------------------------------------------

def test_copies():
    model = packed("bert", bits=2)
    twin = copy.deepcopy(model)
    assert zoo.same_tensors(model, twin) == []
    assert torch.equal(zoo.output(twin, "bert"), zoo.output(model, "bert"))


def test_dequantized_it_is_a_plain_model(tmp_path):
    model = packed("bert")
    dense = model.dequantize()
    assert set(dense.state_dict()) == set(zoo.make("bert").state_dict())
    assert not quantizers(dense) and dense.config._attn_implementation == "eager"
    assert zoo.output(dense, "bert").isfinite().all()
    dense.set_attn_implementation("sdpa")


def test_a_model_must_be_what_its_configuration_says():
    model = zoo.make("bert")
    zoo.pack(model, BitlmConfig(Scheme(group_size="row")))
    layer = model.bert.encoder.layer[0].output.dense
    layer.input = build(Quantizer(), name="layer.0.output.dense.input")
    with pytest.raises(ValueError, match="layer.0.output.dense.input is Quantizer.* asks for None"):
        bitlm.hf.attach(model, BitlmConfig(Scheme(group_size="row")))


def test_what_takes_no_quantizer_of_inputs():
    scheme = Scheme(group_size="row", input=Quantizer())
    with pytest.raises(ValueError, match="embed_tokens.weight takes no quantizer of its inputs"):
        zoo.pack(zoo.make("llama"), BitlmConfig(scheme, embeddings=scheme))
    with pytest.raises(ValueError, match="experts.*takes no quantizer of its inputs"):
        zoo.pack(zoo.make("mixtral"), BitlmConfig(scheme))
    model = packed("bert", "tbt")
    with pytest.raises(ValueError, match="the quantizer of the input says which levels"):
        bitlm.set_activation(model, "int1")
    with pytest.raises(ValueError, match="the quantizer of the input says which levels"):
        bitlm.set_activation(model, "int1", "query")
    before = zoo.output(model, "bert")
    bitlm.set_activation(model, "int16")
    torch.testing.assert_close(zoo.output(model, "bert"), before, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["deberta_v2", "bloom", "falcon"])
def test_architectures_that_compute_attention_themselves(name):
    model = zoo.make(name)
    found = install_attention(model, {"": Attention(Quantizer())}, strict=False)
    assert found.installed == () and len(found.dense) >= 2
    assert all("does not go through transformers' attention interface" in reason
               for reason in found.dense.values())
    with pytest.raises(ValueError, match="matches no attention module .* that can round"):
        install_attention(model, {"": Attention(Quantizer())})


def test_sinks_stay_dense():
    model = zoo.make("gpt_oss")
    found = install_attention(model, {"": Attention(Quantizer())}, strict=False)
    assert len(found.dense) == 2 and all("sinks" in r for r in found.dense.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_the_first_step_may_be_anywhere():
    """Also under checkpointing, where the first forward has no gradients."""
    for reentrant in (False, True):
        model = zoo.make("bert").train()
        install_attention(model, {"": MOVED})
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss(model, "bert").backward()
        found = [m for m in quantizers(model).values() if isinstance(m, ElasticQuantizer)]
        assert all(module.ready for module in found) and len(found) == 6
        assert all(p.grad is not None for p in ours(model))
        assert isinstance(model, transformers.PreTrainedModel)
