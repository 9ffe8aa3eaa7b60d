"""Checkpoints of models in training: dense ones that open prepared."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from bitlm import Training
from bitlm.checkpoint import CheckpointError
from bitlm.hf import BitlmConfig
from bitlm.quantizers import ElasticQuantizer, quantizers
from bitlm.scheme import Quantizer, Scheme
from bitlm.train import coverage, drop_second_basis, finish, prepare
from bitlm.train.layers import fake_quant_layers
from tests import zoo
from tests.train.models import lively, loss, train

BINARY = Scheme(group_size="row")
TERNARY = Scheme("ternary", group_size="row")
BASES = Scheme(planes=2, group_size="row")
SALIENT = Scheme("salient", group_size="row", salient=0.1)
LEARNED = Training(learned=True)


def trained(name="llama", scheme=BASES, training=LEARNED, placement=("tbt", 2), **arguments):
    """Return a model in training that has been trained a little."""
    model = prepare(lively(name), scheme, training=training, placement=placement, **arguments)
    train(model, name)
    return model


def edit(directory, change):
    """Change the tensors of a saved model."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name, scheme, training, placement, embeddings", [
    ("llama", BASES, LEARNED, ("tbt", 2), None), ("llama_tied", SALIENT, None, None, SALIENT),
    ("bert", BINARY, Training(estimator="ede", parameter=2.0), ("bipft", 1), 8),
    ("bart", TERNARY, LEARNED, ("tbt", 1), TERNARY), ("gpt2", BASES, LEARNED, ("tbt", 8), None),
    ("t5_gated", SALIENT, None, ("tbt", 1), None), ("gemma3", BINARY, None, ("tbt", 1), BINARY),
    ("vit", BINARY, Training(clip=True), ("bit", 2), None), ("mixtral", BASES, LEARNED, None, None),
])
def test_saved_and_opened_again(name, scheme, training, placement, embeddings, tmp_path):
    model = trained(name, scheme, training, placement, embeddings=embeddings)
    model.save_pretrained(tmp_path)
    again, report = zoo.auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and zoo.same_tensors(model, again) == []
    assert list(fake_quant_layers(again)) == list(fake_quant_layers(model))
    assert torch.equal(zoo.output(again, name), zoo.output(model, name))
    assert all(q.ready for q in quantizers(again).values() if isinstance(q, ElasticQuantizer))
    assert {n for n, p in again.named_parameters() if not p.requires_grad} == set()
    assert coverage(again) == coverage(model)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == json.loads(
        json.dumps(again.config.quantization_config.to_dict()))
    assert zoo.same_tensors(finish(copy.deepcopy(again)), finish(copy.deepcopy(model))) == []
    assert train(again, name) == pytest.approx(train(model, name), rel=1e-5)


def test_what_the_configuration_says(tmp_path):
    trained(embeddings=8, skip=["k_proj"]).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["stage"] == "training" and said["training"] == {"learned": True}
    assert said["format_version"] == 2 and said["skip"] == ["k_proj"]
    assert said["scheme"]["input"] == {"kind": "elastic", "bits": 2}
    assert set(said["attention"][""]) == {"query", "key", "value", "probabilities", "scale_query"}


def test_it_is_a_dense_checkpoint_without_bitlm(tmp_path, monkeypatch):
    model = trained("bert", placement=("bipft", 1))
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "bitlm")
    plain, report = zoo.auto_class("bert").from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not fake_quant_layers(plain)
    assert all(".quantizer" in key or ".input." in key or ".estimators." in key
               for key in report["unexpected_keys"])
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in plain.state_dict().items())


def test_transformers_sees_a_dense_model(tmp_path):
    trained().save_pretrained(tmp_path)
    for model in (trained(), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
        assert not hasattr(model.config, "_is_quantized")
        state = {key: tensor + 1 if tensor.is_floating_point() else tensor
                 for key, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path / "given", state_dict=dict(state))
        saved = load_file(tmp_path / "given" / "model.safetensors")
        assert set(saved) == set(state)
        assert all(torch.equal(saved[key], state[key]) for key in state)
    finish(model)
    assert model.is_quantized and model.hf_quantizer.is_serializable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizers_keep_float32(dtype, tmp_path):
    trained("bert", placement=("bipft", 1)).save_pretrained(tmp_path)
    model = zoo.auto_class("bert").from_pretrained(tmp_path, dtype=dtype)
    layer = model.bert.encoder.layer[0].attention
    assert model.dtype == layer.self.query.weight.dtype == dtype
    assert layer.self.query.quantizer.scales.dtype == torch.float32
    assert layer.self.estimators.q_p.weight.dtype == layer.self.query.input.step.dtype \
        == torch.float32
    model.to(torch.float32)
    assert torch.isfinite(zoo.output(model, "bert")).all()


def test_it_opens_prepared_while_loading(tmp_path):
    lively("llama").save_pretrained(tmp_path)
    config = BitlmConfig(BASES.replace(input=Quantizer("dynamic", 8)), embeddings=4,
                         stage="training", training=LEARNED)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    expected = prepare(lively("llama"), config)
    assert zoo.same_tensors(model, expected) == [] and not hasattr(model, "hf_quantizer")
    assert torch.equal(zoo.output(model, "llama"), zoo.output(expected, "llama"))


def test_another_class_of_the_same_body(tmp_path):
    torch.manual_seed(0)
    pretrained = transformers.BertForMaskedLM(zoo.make("bert").config)
    prepare(pretrained, BASES, training=LEARNED, placement=("bipft", 1), overrides={
        r"layer\.1\.intermediate": {"planes": 1}})
    pretrained.train()(**zoo.inputs("bert"))
    pretrained.eval().save_pretrained(tmp_path)
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True)
    assert {key.partition(".")[0] for key in report["unexpected_keys"]} == {"cls"}
    assert report["missing_keys"] == {"bert.pooler.dense.weight", "bert.pooler.dense.bias",
                                      "classifier.weight", "classifier.bias"}
    state, body = pretrained.state_dict(), model.state_dict()
    assert all(torch.equal(body[key], tensor) for key, tensor in state.items()
               if key.startswith("bert."))
    pooler = model.bert.pooler.dense  # drawn anew, and prepared then
    assert pooler.quantizer.scales.isfinite().all() and not pooler.input.ready
    assert model.bert.encoder.layer[1].intermediate.dense.quantizer.second_scales is None
    train(model, "bert")
    assert pooler.input.ready
    model.save_pretrained(tmp_path / "classifier")
    again, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "classifier", output_loading_info=True)
    assert not any(report.values()) and zoo.same_tensors(again, model) == []
    alone = AutoModel.from_pretrained(tmp_path / "classifier")
    assert zoo.same_tensors(alone, model.bert) == []


def test_a_basis_that_was_dropped(tmp_path):
    model = trained()
    drop_second_basis(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert zoo.same_tensors(again, model) == []
    assert train(again, "llama") == pytest.approx(train(model, "llama"), rel=1e-5)


@pytest.mark.parametrize("lost, words", [
    ("model.layers.0.mlp.up_proj.quantizer.scales", "up_proj.quantizer.scales is missing"),
    ("model.layers.1.self_attn.q_proj.input.step", "q_proj.input.step is missing"),
    ("model.layers.1.self_attn.quantizers.query.initialised", "query.initialised is missing"),
])
def test_a_tensor_that_is_missing(lost, words, tmp_path):
    trained().save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: tensors.pop(lost))
    with pytest.raises(CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("key, words", [
    ("scheme", "second_scales is in the file, but config.json asks for no such"),
    ("training", "quantizer.scales is in the file, but config.json asks for no such"),
    ("attention", "quantizers.key.step is in the file, but config.json asks for no such")])
def test_a_configuration_that_does_not_fit(key, words, tmp_path):
    trained().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if key == "scheme":
        config["quantization_config"]["scheme"]["planes"] = 1
    else:
        config["quantization_config"].pop(key)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_state_dict_in_memory():
    model = trained()
    load = transformers.LlamaForCausalLM.from_pretrained
    again = load(None, config=model.config, state_dict=model.state_dict())
    assert zoo.same_tensors(again, model) == []
    state = model.state_dict()
    del state["model.layers.0.mlp.up_proj.quantizer.scales"]
    with pytest.raises(CheckpointError, match="up_proj.quantizer.scales was not loaded"):
        load(None, config=model.config, state_dict=state)


def test_training_is_for_the_training_stage():
    with pytest.raises(ValueError, match="it is for stage 'training'"):
        BitlmConfig(training=LEARNED)
    assert "training" not in BitlmConfig().to_dict()
    assert BitlmConfig(stage="training").format_version == 2


def test_embeddings_cannot_be_resized_past_their_quantizer():
    model = prepare(lively("llama_tied"), BINARY, embeddings=TERNARY)
    with pytest.raises(ValueError, match="cannot be resized: resize those of the dense model"):
        model.resize_token_embeddings(120)
    model = prepare(lively("llama_tied"), BINARY)
    model.resize_token_embeddings(120)
    assert model(torch.tensor([[119]])).logits.shape[-1] == 120


def test_trainer(tmp_path):
    rows = [{"input_ids": torch.randint(3, 99, (6,)), "labels": i % 3} for i in range(24)]

    def run(directory, steps, resume=None):
        torch.manual_seed(0)
        model = prepare(zoo.make("bert"), BASES, training=LEARNED, placement=("bipft", 1))
        arguments = TrainingArguments(
            str(directory), max_steps=steps, per_device_train_batch_size=4, logging_steps=1,
            save_steps=2, gradient_accumulation_steps=2, learning_rate=1e-3, report_to=[],
            disable_tqdm=True, gradient_checkpointing=True, use_cpu=True,
            lr_scheduler_type="constant")
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole, losses = run(tmp_path / "whole", 4)
    run(tmp_path / "part", 2)
    resumed, again = run(tmp_path / "part", 4, str(tmp_path / "part" / "checkpoint-2"))
    assert again == losses and zoo.same_tensors(whole, resumed) == []
    opened = zoo.auto_class("bert").from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert zoo.same_tensors(opened, whole) == []
    assert isinstance(finish(opened), nn.Module) and loss(opened, "bert").isfinite()
