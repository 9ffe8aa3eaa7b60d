"""Every architecture: packed in memory, saved in shards, loaded again, equal."""

import json

import pytest
import torch

from bitlm.hf import BitlmConfig
from bitlm.weight import PackedWeight
from tests import zoo

SCHEMES = {
    "ternary": BitlmConfig("ternary"),
    "salient": BitlmConfig("salient"),
    "columns": BitlmConfig({"method": "salient", "salient": 0.1, "salient_layout": "columns"}),
    "grid": BitlmConfig({"method": "grid", "planes": 4, "center": "shift", "group_size": 16}),
    "trits": BitlmConfig({"method": "ternary", "trits": True}),
    "two_planes": BitlmConfig({"planes": 2, "group_size": 16, "scale_dtype": "float32"}),
}


def roundtrip(model, name, directory, **options):
    model.save_pretrained(directory, max_shard_size="8KB")
    loaded, report = zoo.auto_class(name).from_pretrained(directory, output_loading_info=True,
                                                          **options)
    assert not any(report.values()), report
    assert zoo.same_tensors(model, loaded) == []
    assert torch.equal(zoo.output(model, name), zoo.output(loaded, name))
    return loaded


@pytest.mark.parametrize("name", zoo.ZOO)
def test_saved_and_loaded_equal(name, tmp_path):
    model = zoo.packed(name)
    assert zoo.count(model) >= 4
    loaded = roundtrip(model, name, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not any(p.requires_grad for m in loaded.modules() if isinstance(m, PackedWeight)
                   for p in m.parameters())
    if zoo.ZOO[name].generates:
        prompt = {k: v for k, v in zoo.inputs(name).items() if k != "decoder_input_ids"}
        options = dict(max_new_tokens=3, do_sample=False)
        texts = [each.generate(**prompt, **options) for each in (loaded, model)]
        assert torch.equal(*texts)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "bitlm" and config["format_version"] == 1


@pytest.mark.parametrize("name", [*zoo.MOE, "llama"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(name, scheme, tmp_path):
    loaded = roundtrip(zoo.pack(zoo.make(name), SCHEMES[scheme]), name, tmp_path)
    if scheme == "salient":
        roundtrip(loaded, name, tmp_path / "again")


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "opt", "bloom", "gemma3", "bart",
                                  "t5_relu", "t5_gated", "whisper", "mixtral", "bert"])
def test_packed_embeddings(name, tmp_path):
    model = zoo.pack(zoo.make(name), BitlmConfig("binary", embeddings=8))
    loaded = roundtrip(model, name, tmp_path)
    assert isinstance(loaded.get_input_embeddings().weight, PackedWeight)
    if name in ("llama_tied", "bart"):
        roundtrip(loaded, name, tmp_path / "again")


def test_scales_that_do_not_fit_float16_load_as_float32(tmp_path):
    dense = zoo.make("llama")
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight.mul_(1e7)
    model = zoo.pack(dense)
    assert model.model.layers[0].mlp.up_proj.weight.plane0.scales.dtype == torch.float32
    assert model.model.layers[1].mlp.up_proj.weight.plane0.scales.dtype == torch.float16
    roundtrip(model, "llama", tmp_path)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "t5_relu", "mixtral"])
def test_stored_tensors_keep_their_dtype(name, dtype, tmp_path):
    model = zoo.packed(name)
    model.save_pretrained(tmp_path)
    loaded = zoo.auto_class(name).from_pretrained(tmp_path, dtype=dtype)
    assert not [n for n in zoo.same_tensors(model, loaded) if ".plane" in n]
    assert zoo.output(loaded, name).isfinite().all()


def test_names_on_disk_are_per_expert_and_planes_are_first(tmp_path):
    from safetensors import safe_open

    zoo.packed("mixtral", "ternary").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stem = "model.layers.0.block_sparse_moe.experts.3.w1.weight.plane0"
        assert file.get_slice(f"{stem}.signs").get_shape() == [48, 4]
        assert file.get_slice(f"{stem}.scales").get_shape() == [48, 1]
