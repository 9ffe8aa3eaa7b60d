"""Loading and saving: on the fly, other classes, state dicts, what is refused."""

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from bitlm.checkpoint import CheckpointError
from bitlm.hf import BitlmConfig
from bitlm.modules import packed_weights
from bitlm.weight import PackedWeight
from tests import zoo


@pytest.fixture
def llama(tmp_path):
    zoo.packed("llama").save_pretrained(tmp_path)
    return tmp_path


def edit(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name, embeddings", [
    *((name, None) for name in ("llama", "gpt2", "falcon", "mamba", "albert", "vit", *zoo.MOE)),
    *((name, 4) for name in ("llama", "llama_tied", "opt", "bert", "bart", "t5_relu", "whisper",
                             "mixtral"))])
def test_on_the_fly_equals_in_memory(name, embeddings, tmp_path):
    dense = zoo.make(name)
    dense.save_pretrained(tmp_path / "dense")
    config = BitlmConfig("ternary", embeddings=embeddings)
    loaded = zoo.auto_class(name).from_pretrained(tmp_path / "dense", quantization_config=config)
    expected = zoo.pack(zoo.make(name), BitlmConfig("ternary", embeddings=embeddings))
    assert zoo.same_tensors(loaded, expected) == []
    assert torch.equal(zoo.output(loaded, name), zoo.output(expected, name))
    loaded.save_pretrained(tmp_path / "packed", max_shard_size="8KB")
    again, report = zoo.auto_class(name).from_pretrained(tmp_path / "packed",
                                                         output_loading_info=True)
    assert not any(report.values()) and zoo.same_tensors(again, expected) == []


def test_on_the_fly_packs_what_was_drawn_anew(tmp_path):
    body = transformers.BertModel(zoo.make("bert").config, add_pooling_layer=False)
    body.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=BitlmConfig())
    assert isinstance(model.bert.pooler.dense.weight, PackedWeight)


def test_on_the_fly_errors_are_raised(tmp_path):
    dense = zoo.make("llama")
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    dense.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="1 weights could not be packed:\n.*up_proj.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitlmConfig())


def test_schemes_that_need_calibration_are_refused_on_the_fly(tmp_path):
    zoo.make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bitlm quantize MODEL --calibrate"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitlmConfig({"compensate": True}))


def test_packed_files_that_say_they_are_in_training(llama):
    edit(llama, stage="training")
    with pytest.raises(CheckpointError, match="is packed in the file, but .* stage 'training'"):
        AutoModelForCausalLM.from_pretrained(llama)


def test_other_classes_of_the_same_body(tmp_path):
    model = zoo.packed("llama")
    model.save_pretrained(tmp_path)
    body, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and zoo.same_tensors(body, model.model) == []
    assert set(report["unexpected_keys"]) == {"lm_head.weight"}
    classifier, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True)
    assert report["missing_keys"] == {"score.weight"}
    assert zoo.same_tensors(classifier.model, model.model) == []
    body.save_pretrained(tmp_path / "body")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "body",
                                                         output_loading_info=True)
    assert report["missing_keys"] == {"lm_head.weight"}
    assert zoo.same_tensors(again.model, model.model) == []


def test_patterns_are_read_against_the_saved_names(tmp_path):
    config = BitlmConfig("binary", skip=[r"^model\.layers\.0\.", "lm_head"], embeddings=8,
                         overrides={r"^model\.layers\.1\.mlp": {"planes": 2}})
    model = zoo.pack(zoo.make("llama"), config)
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert zoo.same_tensors(body, model.model) == []
    assert "plane1.signs" in body.layers[1].mlp.up_proj.weight.form.names
    assert not isinstance(body.layers[0].mlp.up_proj.weight, PackedWeight)


def test_the_last_override_wins_also_when_it_is_read_again(tmp_path):
    overrides = {"mlp": {"planes": 2}, "down_proj": {"planes": 3}}
    model = zoo.pack(zoo.make("llama"), BitlmConfig(overrides=overrides))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert zoo.same_tensors(loaded, model) == []
    assert "plane2.signs" in loaded.model.layers[0].mlp.down_proj.weight.form.names


def test_a_packed_head_that_another_class_lacks(tmp_path):
    model = zoo.pack(zoo.make("llama"), BitlmConfig(embeddings=8))
    model.save_pretrained(tmp_path)
    body, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and zoo.same_tensors(body, model.model) == []


def test_a_body_without_its_pooler(tmp_path):
    masked = transformers.BertForMaskedLM(zoo.make("bert").config)
    zoo.pack(masked).save_pretrained(tmp_path)
    body, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {"pooler.dense.weight", "pooler.dense.bias"}
    assert zoo.same_tensors(body.encoder, masked.bert.encoder) == []


@pytest.mark.parametrize("scheme", ["binary", "salient"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_from_a_state_dict(name, scheme):
    model = zoo.packed(name, scheme)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if name == "mixtral":
        from transformers.core_model_loading import revert_weight_conversion
        state = revert_weight_conversion(model, state)
    loaded = type(model).from_pretrained(None, config=model.config, state_dict=state)
    assert zoo.same_tensors(loaded, model) == []
    del state["model.layers.1.self_attn.q_proj.weight.plane0.scales"]
    with pytest.raises(CheckpointError, match="q_proj.weight.plane0.scales was not loaded"):
        type(model).from_pretrained(None, config=model.config, state_dict=state)


@pytest.mark.parametrize("name", ["llama_tied", "mixtral"])
def test_deepcopy(name, tmp_path):
    model = zoo.pack(zoo.make(name), BitlmConfig(embeddings=8))
    twin = copy.deepcopy(model)
    assert zoo.same_tensors(model, twin) == []
    assert torch.equal(zoo.output(model, name), zoo.output(twin, name))
    twin.save_pretrained(tmp_path)
    assert zoo.same_tensors(zoo.auto_class(name).from_pretrained(tmp_path), model) == []


@pytest.mark.parametrize("embeddings", [None, 8])
def test_resizing(embeddings, tmp_path):
    model = zoo.pack(zoo.make("llama"), BitlmConfig(embeddings=embeddings))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    if embeddings is None:
        loaded.resize_token_embeddings(zoo.VOCABULARY + 5)
        assert zoo.output(loaded, "llama").shape[-1] == zoo.VOCABULARY + 5
        return
    assert loaded.resize_token_embeddings(zoo.VOCABULARY) is loaded.get_input_embeddings()
    with pytest.raises(ValueError, match="cannot be resized"):
        loaded.resize_token_embeddings(zoo.VOCABULARY + 5)


def test_tensor_parallelism_is_refused(llama):
    from transformers.distributed import DistributedConfig

    config = transformers.AutoConfig.from_pretrained(llama)
    config.distributed_config = DistributedConfig(tp_plan="auto")
    with pytest.raises(ValueError, match="no tensor parallelism"):
        AutoModelForCausalLM.from_pretrained(llama, config=config)


def test_dequantized_again():
    model = zoo.pack(zoo.make("llama_tied"), BitlmConfig(embeddings=8))
    expected = zoo.output(model, "llama_tied")
    dense = model.dequantize()
    assert not packed_weights(dense)
    torch.testing.assert_close(zoo.output(dense, "llama_tied"), expected, atol=1e-4, rtol=1e-4)


def test_autocast(tmp_path):
    model = zoo.packed("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = zoo.output(model, "llama")
        assert model.model.layers[0].mlp.up_proj(torch.randn(2, 32)).dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), zoo.output(model, "llama"), atol=0.05, rtol=0.1)


@pytest.mark.parametrize("task", ["text-generation", "text-classification"])
def test_pipelines(task, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "llama" if task == "text-generation" else "bert"
    zoo.packed(name).save_pretrained(tmp_path)
    tokenizer(tmp_path)
    pipe = transformers.pipeline(task, model=str(tmp_path))
    result = pipe("a b c", **({"max_new_tokens": 3} if name == "llama" else {}))
    assert ("generated_text" if name == "llama" else "label") in result[0]


def tokenizer(directory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdef"]
    numbers = {word: number for number, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>").save_pretrained(directory)
