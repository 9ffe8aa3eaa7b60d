"""From dense to in training to packed: what is trained is what is served."""

import copy

import pytest
import torch
from torch import nn

import bitlm
from bitlm import Training
from bitlm.hf import BitlmConfig
from bitlm.methods import EncodeError
from bitlm.modules import packed_weights
from bitlm.placement import PLACEMENTS
from bitlm.quantizers import quantizers
from bitlm.scheme import Attention, Quantizer, Scheme, SchemeError
from bitlm.train import coverage, drop_second_basis, finish, prepare, set_parameter
from bitlm.train.layers import fake_quant_layers
from bitlm.train.weights import FrozenSalient, LearnedScales, MeasuredScales
from tests import zoo
from tests.train.models import lively, loss, outputs, train

BINARY = Scheme(group_size="row")
TERNARY = Scheme("ternary", group_size="row")
BASES = Scheme(planes=2, group_size="row")
SALIENT = Scheme("salient", group_size="row", salient=0.1)
LEARNED = Training(learned=True)
INT8 = BINARY.replace(input=Quantizer("dynamic", 8))

GRID = [
    ("bert", BINARY, None, None), ("bert", SALIENT, None, ("bit", 1)),
    ("bert", BASES, LEARNED, ("bipft", 1)), ("bert", TERNARY, None, ("bit", 2)),
    ("bart", TERNARY, None, ("tbt", 2)), ("bart", BASES, LEARNED, ("tbt", 8)),
    ("bart", BINARY.replace(center="drop"), Training(clip=True), ("tbt", 1)),
    ("llama", BINARY, None, ("tbt", 1)), ("llama", SALIENT, None, ("tbt", 8)),
    ("llama", BASES, LEARNED, None), ("llama", Scheme("ternary", 2, 16, "shift"), None, None),
    ("gpt2", TERNARY, Training(learned=True, estimator="ede"), ("tbt", 2)),
    ("gpt2", INT8, Training(estimator="bireal"), None), ("gpt2", BASES, LEARNED, ("tbt", 1)),
    ("t5_relu", SALIENT, None, ("tbt", 2)), ("t5_gated", BINARY, None, ("tbt", 1)),
    ("t5_relu", TERNARY.replace(activation="int8"), LEARNED, None),
    ("vit", BASES, LEARNED, ("bit", 2)), ("vit", SALIENT, None, None),
    ("vit", BINARY.replace(center="threshold"), LEARNED, ("tbt", 8)),
    ("vit", BINARY.replace(center="threshold"), LEARNED, ("bivit", 1)),
]


def close(one, other):
    """Assert that outputs [B, ...] are the same but for the order of sums.

    Each layer's may be 1e-5. With rounded activations that may, rarely, round a value to its other
    neighbour: not in all B.
    """
    errors = (one - other).flatten(1).abs().amax(1)
    assert (errors <= 3e-5 * other.abs().max()).sum() >= len(errors) - 2, errors


def finished(model, name, directory):
    """Finish a copy of a model, and check it, saved and reloaded too, against the model."""
    expected, before = outputs(model, name), copy.deepcopy(model)
    weights = {f"{path}.weight": layer.fake_quant() for path, layer
               in fake_quant_layers(before).items()}
    assert finish(before) is before
    packed = packed_weights(before)
    assert set(packed) == set(weights)
    assert all(torch.equal(packed[key].dequantize(), weights[key]) for key in packed)
    close(outputs(before, name), expected)
    before.save_pretrained(directory)
    again, report = zoo.auto_class(name).from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()) and zoo.same_tensors(again, before) == []
    assert torch.equal(zoo.output(again, name), zoo.output(before, name))
    assert again.config.quantization_config.stage == "packed"
    return before


@pytest.mark.parametrize("name, scheme, training, placement", GRID)
def test_what_is_trained_is_what_is_served(name, scheme, training, placement, tmp_path):
    model = lively(name)
    assert prepare(model, scheme, training=training, placement=placement) is model
    first, last = train(model, name)
    assert first != last
    trained = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert trained == [] or all("k_proj.bias" in n or "key.bias" in n for n in trained), trained
    packed = finished(model, name, tmp_path)
    assert set(quantizers(packed)) == set(quantizers(model))
    assert bool(quantizers(packed)) == (placement is not None or scheme.input is not None)


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "gpt2", "bart", "t5_relu", "whisper"])
def test_tied_embeddings_and_head(name, tmp_path):
    model = lively(name)
    prepare(model, BINARY, embeddings=TERNARY)
    head = model.get_output_embeddings()
    assert head.fake_quant().unique().numel() <= 3 * len(head.weight)
    assert len({id(own.weight_quantizer) for own in fake_quant_layers(model).values()
                if own.weight is head.weight}) == 1
    if name != "whisper":
        train(model, name)
    packed = finished(model, name, tmp_path)
    shared = {w.get_parameter("plane0.signs").data_ptr() for n, w in packed_weights(packed).items()
              if w.shape[0] == zoo.VOCABULARY}
    assert len(shared) == 1


@pytest.mark.parametrize("name", ["llama_tied", "bart", "t5_relu"])
def test_a_tied_head_that_stays_dense(name, tmp_path):
    model = prepare(lively(name), BINARY, embeddings=TERNARY, skip=("lm_head",))
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    tables = [own for own in fake_quant_layers(model).values() if isinstance(own, nn.Embedding)]
    assert tables and all(own.weight is head.weight for own in tables)
    train(model, name)
    latent = head.weight.detach().clone()
    assert torch.equal(tables[0].weight, latent)  # still one weight
    packed = finished(model, name, tmp_path)
    assert torch.equal(packed.get_output_embeddings().weight, latent)


def test_dense_embeddings_stay():
    model = prepare(lively("bart"), BINARY)
    assert all(isinstance(own, nn.Linear) for own in fake_quant_layers(model).values())
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is model.model.shared.weight


@pytest.mark.parametrize("name", ["albert", "distilbert", "roberta", "modernbert", "deberta_v2",
                                  "opt", "falcon", "bloom", "phi3", "mamba", "mamba2", "mixtral",
                                  "gpt_oss", "pegasus", "clip"])
def test_other_architectures(name, tmp_path):
    model = prepare(lively(name), TERNARY, placement=("tbt", 8))
    finished(model.eval(), name, tmp_path)


# --- what is asked for ---------------------------------------------------------------------------

def test_kinds_of_quantizers():
    model = prepare(lively("llama"), BASES, training=Training(True, "ede", 0.5, 0.02),
                    embeddings=8, overrides={"down_proj": {"method": "grid", "planes": 4},
                                             "q_proj": {"method": "binary", "planes": 1}})
    layers = fake_quant_layers(model)
    kinds = {path.rpartition(".")[2]: type(own.weight_quantizer) for path, own in layers.items()}
    assert kinds["up_proj"] is kinds["q_proj"] is LearnedScales
    assert kinds["down_proj"] is kinds["embed_tokens"] is kinds["lm_head"] is MeasuredScales
    own = layers["model.layers.0.mlp.up_proj"].quantizer
    assert (own.estimator, own.parameter, own.unit) == ("ede", 0.5, 0.02)
    assert layers["lm_head"].quantizer.estimator == "identity"
    assert own.second_scales.shape == own.scales.shape and bool((own.second_scales > 0).all())
    assert layers["model.layers.0.self_attn.q_proj"].quantizer.second_scales is None
    salient = prepare(lively("llama"), SALIENT)
    assert isinstance(salient.model.layers[0].mlp.up_proj.quantizer, FrozenSalient)


def test_a_placement_says_where_inputs_are_rounded():
    model = prepare(lively("bart"), BINARY, placement=("tbt", 1))
    layer = model.model.encoder.layers[0]
    assert layer.fc1.input.spec == Quantizer(bits=1)
    assert layer.fc2.input.spec == Quantizer(bits=1, signed=False)
    assert layer.self_attn.quantizers.probabilities.spec == Quantizer(bits=1, signed=False)
    assert layer.self_attn.quantizers.scale_query
    own = prepare(lively("bart"), BINARY, placement=PLACEMENTS["tbt"][1],
                  overrides={"fc2": {"input": None}})
    assert own.model.encoder.layers[0].fc2.input is None
    assert own.model.encoder.layers[0].fc1.input.spec == Quantizer(bits=1)


def test_a_configuration_says_it_all():
    config = BitlmConfig(INT8, skip=["k_proj"], embeddings=8, attention=Attention(
        query=Quantizer(bits=1)), stage="training", training=LEARNED, metadata={"note": 1})
    model = prepare(lively("llama"), config)
    assert not isinstance(model.model.layers[0].self_attn.k_proj, tuple(
        {type(own) for own in fake_quant_layers(model).values()}))
    attention = model.model.layers[1].self_attn
    assert isinstance(attention.q_proj.quantizer, LearnedScales)
    assert attention.quantizers.query.spec == Quantizer(bits=1)
    assert model.config.quantization_config.to_dict() == config.to_dict()
    same = prepare(lively("llama"), BitlmConfig(INT8), training=LEARNED, skip=["k_proj"])
    assert same.config.quantization_config.training == {"learned": True}


@pytest.mark.parametrize("config, arguments, words", [
    (BitlmConfig(BINARY, skip=["k_proj"]), {"skip": ["q_proj"]}, "skip is in the configuration"),
    (BitlmConfig(INT8), {"placement": ("tbt", 1)}, "leave placement out"),
    (INT8, {"placement": ("tbt", 1)}, "leave placement out"),
    (BINARY, {"placement": ("tbt", 3)}, "activations at 3 bits"),
    (BINARY, {"placement": ("TBT", 1)}, "unknown placement"),
    (BINARY, {"skip": ["nothing"]}, "skip pattern 'nothing' matches no"),
    (BINARY, {"overrides": {"nothing": {"planes": 2}}}, "override pattern 'nothing'"),
    (BINARY, {"training": Training(estimator="step")}, "unknown estimator 'step'"),
    (Scheme(planes=3), {"training": LEARNED}, "q_proj.weight cannot be trained so: learned scales"),
    (Scheme(compensate=True), {}, "q_proj.weight cannot be trained so: compensate"),
    (Scheme("salient", salient=.1, salient_metric="hessian"), {}, "q_proj.weight needs the Hess"),
    (BINARY, {"hessians": {"q": torch.eye(3)}}, "a Hessian is given for q"),
    ({"method": "none"}, {}, "unknown method 'none'"),
    (BitlmConfig(BINARY, attention={"cross": Attention(query=Quantizer())}), {},
     "attention pattern 'cross' matches no attention"),
])
def test_what_cannot_be_leaves_the_model_as_it_is(config, arguments, words):
    model = lively("llama")
    before, state = zoo.output(model, "llama"), list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        prepare(model, config, **arguments)
    assert list(model.state_dict()) == state and not fake_quant_layers(model)
    assert getattr(model.config, "quantization_config", None) is None
    assert torch.equal(zoo.output(model, "llama"), before)


def test_attention_that_cannot_be_added_leaves_the_model_as_it_is():
    model = lively("gpt2")
    with pytest.raises(ValueError, match="projections are not known|how many"):
        prepare(model, BINARY, placement=("bipft", 1))
    assert not fake_quant_layers(model) and not quantizers(model)
    prepare(model, BINARY, placement=("tbt", 1))


def test_salience_by_hessian():
    name = "model.layers.0.mlp.up_proj.weight"
    hessian = torch.diag(torch.linspace(.01, 10, 32))
    scheme = SALIENT.replace(salient_metric="hessian", salient_scope="tensor")
    model = prepare(lively("llama"), SALIENT, hessians={name: hessian}, overrides={
        "layers.0.mlp.up_proj": {"salient_metric": "hessian", "salient_scope": "tensor"}})
    own = model.get_submodule(name.removesuffix(".weight")).quantizer
    assert own.scheme == scheme and own.mask[:, 16:].sum() > 2 * own.mask[:, :16].sum()


def test_values_of_training_are_checked():
    for fields, words in (({"learned": 1}, "learned is 1"), ({"unit": 0}, "unit is 0"),
                          ({"estimator": None}, "estimator is None")):
        with pytest.raises(SchemeError, match=words):
            Training(**fields)
    with pytest.raises(SchemeError, match="unknown training key 'units'"):
        Training.from_dict({"units": 1})
    value = Training(True, "fda", 3.0, 0.5)
    assert Training.from_dict(value.to_dict()) == value and Training().to_dict() == {}


def test_a_model_is_prepared_once():
    model = prepare(lively("llama"), BINARY)
    with pytest.raises(ValueError, match="prepared already"):
        prepare(model, BINARY)
    finish(model)
    with pytest.raises(ValueError, match="is packed, and packed weights do not train"):
        prepare(model, BINARY)
    with pytest.raises(ValueError, match="packed already"):
        finish(model)
    for use in (finish, coverage, drop_second_basis, lambda m: set_parameter(m, 1.0)):
        with pytest.raises(ValueError, match="is not prepared: bitlm.train.prepare"):
            use(lively("llama"))
    with pytest.raises(TypeError, match="Sequential is no transformers model"):
        prepare(nn.Sequential(lively("llama")), BINARY)


def test_weights_that_are_not_finite_name_themselves():
    model = lively("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(EncodeError, match="model.layers.1.mlp.up_proj.weight has NaN"):
        prepare(model, BINARY)
    assert not fake_quant_layers(model)
    model = prepare(lively("llama"), BINARY)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    for use in (lambda: loss(model, "llama"), lambda: finish(model)):
        with pytest.raises(EncodeError, match="model.layers.1.mlp.up_proj.weight has NaN"):
            use()
    assert fake_quant_layers(model)


def test_a_quantizer_that_saw_no_batch_cannot_be_finished():
    model = prepare(lively("bert"), BINARY, placement=("tbt", 1))
    with pytest.raises(RuntimeError, match=r"\.(input|query) has no step yet"):
        finish(model)
    assert fake_quant_layers(model)


# --- coverage ------------------------------------------------------------------------------------

def test_coverage():
    model = prepare(lively("mixtral"), BINARY, placement=("tbt", 1), skip=["layers.0.*k_proj"])
    found = coverage(model)
    assert found.prepared == {f"{p}.weight": own.weight_quantizer.scheme
                              for p, own in fake_quant_layers(model).items()}
    assert len(found.prepared) == 7 and found.prepared["model.layers.1.self_attn.k_proj.weight"] \
        == BINARY.replace(input=Quantizer(bits=1))
    reasons = {own.name: own for own in found.skipped}
    assert "fused experts" in reasons["model.layers.0.mlp.experts.down_proj"].reason
    assert reasons["model.layers.0.mlp.experts.down_proj"].loud
    assert "skipped by 'layers.0" in reasons["model.layers.0.self_attn.k_proj.weight"].reason
    assert "--embeddings" in reasons["lm_head.weight"].reason
    assert found.attention.installed == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert found.attention.dense == {}
    assert not set(reasons) & set(found.prepared)
    assert list(fake_quant_layers(model)) == [n.removesuffix(".weight") for n in found.prepared]


def test_coverage_of_attention_that_cannot_round():
    found = coverage(prepare(lively("deberta_v2"), BINARY, placement=("tbt", 1)))
    assert found.attention.installed == ()
    assert all("attention interface" in reason for reason in found.attention.dense.values())
    found = coverage(prepare(lively("bert"), BINARY, placement=("bipft", 1)))
    assert not any(".estimators." in own.name for own in found.skipped)
    found = coverage(prepare(lively("bert"), BINARY))
    assert set(found.attention.dense.values()) == {"not asked for"}


def test_weights_that_the_model_reads_itself_stay_dense():
    found = coverage(prepare(lively("mamba"), BINARY))
    read = {own.name.split(".")[-2] for own in found.skipped if "reads the weight" in own.reason}
    assert read == {"dt_proj", "x_proj", "out_proj"}
    found = coverage(prepare(lively("t5_gated"), BINARY))
    assert not any(own.loud for own in found.skipped)


# --- while it trains -----------------------------------------------------------------------------

def test_the_parameter_of_estimators(tmp_path):
    model = prepare(lively("llama"), BINARY, embeddings=8, training=Training(estimator="biper"))
    set_parameter(model, 0.5)
    own = model.model.layers[0].mlp.up_proj.quantizer
    assert own.parameter == 0.5 and model.lm_head.quantizer.parameter is None
    model.save_pretrained(tmp_path)
    again = zoo.auto_class("llama").from_pretrained(tmp_path)
    assert again.config.quantization_config.training == {"estimator": "biper", "parameter": 0.5}
    assert torch.equal(zoo.output(again, "llama"), zoo.output(model, "llama"))
    finished(model, "llama", tmp_path)
    with pytest.raises(ValueError, match="identity, which has no parameter"):
        set_parameter(prepare(lively("llama"), BINARY), 1.0)


def test_the_noise_of_fda_trains_and_is_gone_when_packed(tmp_path):
    model = prepare(lively("llama"), BINARY, training=Training(estimator="fda", noise=True),
                    embeddings=8)
    own = model.model.layers[0].mlp.up_proj.quantizer
    before = own.noise.up.detach().clone()
    train(model, "llama")
    assert not torch.equal(own.noise.up, before) and model.lm_head.quantizer.noise is None
    model.save_pretrained(tmp_path)
    again = zoo.auto_class("llama").from_pretrained(tmp_path)
    assert torch.equal(again.model.layers[0].mlp.up_proj.quantizer.noise.up, own.noise.up)
    assert torch.equal(zoo.output(again, "llama"), zoo.output(model, "llama"))
    finished(model, "llama", tmp_path)
    for training in (Training(noise=True), Training(True, "fda", noise=True)):
        with pytest.raises(SchemeError, match="cannot be trained so: noise"):
            prepare(lively("llama"), BINARY, training=training)


def test_dropping_the_second_basis(tmp_path):
    model = prepare(lively("llama"), BASES, training=LEARNED, placement=("tbt", 1),
                    overrides={"q_proj": {"planes": 1}, r"layers\.1\.mlp": {"method": "grid"}})
    train(model, "llama")
    drop_second_basis(model)
    own = model.model.layers[0].mlp.up_proj.quantizer
    assert own.second_scales is None and own.scheme.planes == 1
    assert model.model.layers[1].mlp.up_proj.quantizer.scheme.planes == 2
    with pytest.raises(ValueError, match="no weight of this model has two"):
        drop_second_basis(model)
    train(model, "llama")
    model.save_pretrained(tmp_path / "training")
    again = zoo.auto_class("llama").from_pretrained(tmp_path / "training")
    assert zoo.same_tensors(again, model) == []
    packed = finished(again, "llama", tmp_path / "packed")
    first, second = (packed.model.layers[i].mlp.up_proj.weight.form.names for i in range(2))
    assert "plane1.signs" not in first and "plane1.signs" in second


@pytest.mark.parametrize("name, placement", [("bert", ("bipft", 1)), ("bart", ("tbt", 2)),
                                             ("llama", ("tbt", 1))])
def test_gradient_checkpointing(name, placement):
    losses = []
    for checkpointing in (False, True):
        model = prepare(lively(name), BASES, training=LEARNED, placement=placement)
        if checkpointing:
            model.gradient_checkpointing_enable()
        losses.append(train(model, name, 3))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bfloat16_autocast():
    model = prepare(zoo.make("bert"), BASES, training=LEARNED, placement=("bipft", 8))
    exact = loss(model, "bert").item()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(model, "bert")
    value.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())
    assert value.item() == pytest.approx(exact, rel=0.02) and value.item() != exact


def test_a_model_in_bfloat16(tmp_path):
    model = prepare(lively("llama").to(torch.bfloat16), BASES, training=LEARNED,
                    placement=("tbt", 1))
    train(model, "llama")
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.quantizer.scales.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = zoo.auto_class("llama").from_pretrained(tmp_path, dtype="auto")
    assert zoo.same_tensors(again, model) == [] and again.dtype == torch.bfloat16
    weights = {p: own.fake_quant() for p, own in fake_quant_layers(model).items()}
    finish(model)
    assert all(torch.equal(model.get_submodule(p).weight.dequantize(), w)
               for p, w in weights.items())


def test_copies_and_state_dicts():
    model = prepare(lively("bert"), BASES, training=LEARNED, placement=("bipft", 2),
                    embeddings=TERNARY)
    train(model, "bert")
    copied, expected = copy.deepcopy(model), zoo.output(model, "bert")
    fresh = prepare(lively("bert"), BASES, training=LEARNED, placement=("bipft", 2),
                    embeddings=TERNARY)
    fresh.load_state_dict(model.state_dict())
    train(model, "bert")
    assert torch.equal(zoo.output(copied, "bert"), expected)
    assert torch.equal(zoo.output(fresh.eval(), "bert"), expected)
    assert not torch.equal(zoo.output(model, "bert"), expected)
    assert train(copied, "bert") == train(fresh, "bert")


@pytest.mark.parametrize("scheme, training, placement", [
    (BINARY, Training(estimator="bireal"), ("tbt", 1)), (BASES, LEARNED, ("bipft", 2)),
    (SALIENT, None, None)])
def test_compiled(scheme, training, placement):
    torch._dynamo.reset()
    model = prepare(lively("llama"), scheme, training=training, placement=placement)
    train(model, "llama", 1)
    block, x = model.model.layers[0].mlp, torch.randn(2, 7, 32, requires_grad=True)
    results = []
    for run in (block, torch.compile(block, backend="aot_eager")):
        model.zero_grad()
        values = run(x)
        results.append([values, *torch.autograd.grad(values.square().sum(), [
            x, *(p for p in block.parameters())], allow_unused=True)])
    for one, other in zip(*results):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_the_names_are_the_package_s():
    assert bitlm.train.prepare is prepare and "train" in dir(bitlm)
    assert "finish" in dir(bitlm.train)
    with pytest.raises(AttributeError, match="has no attribute 'finnish'"):
        bitlm.train.finnish  # noqa: B018
