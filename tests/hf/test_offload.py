"""Packed models that do not fit: parts on disk, through accelerate's hooks."""

import pytest
import torch

from bitlm.hf import BitlmConfig
from tests import zoo

MAPS = {
    "llama": {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu",
              "model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"},
    "mixtral": {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk",
                "model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"},
    "llama_tied": {"": "disk"},
    "bart": {"": "disk"},
    "bert": {"": "disk"},
}


@pytest.mark.parametrize("scheme, embeddings", [("ternary", 8), ("salient", None)])
@pytest.mark.parametrize("name", MAPS)
def test_offloaded_equals_loaded(name, scheme, embeddings, tmp_path):
    model = zoo.pack(zoo.make(name), BitlmConfig(scheme, embeddings=embeddings))
    model.save_pretrained(tmp_path / "packed", max_shard_size="16KB")
    loaded = zoo.auto_class(name).from_pretrained(
        tmp_path / "packed", device_map=MAPS[name], offload_folder=tmp_path / "offload")
    assert torch.equal(zoo.output(loaded, name), zoo.output(model, name))
    loaded.save_pretrained(tmp_path / "again")
    again, report = zoo.auto_class(name).from_pretrained(tmp_path / "again",
                                                         output_loading_info=True)
    assert not any(report.values()) and zoo.same_tensors(model, again) == []


def test_device_map_auto(tmp_path):
    zoo.packed("llama").save_pretrained(tmp_path)
    loaded = zoo.auto_class("llama").from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(zoo.output(loaded, "llama"), zoo.output(zoo.packed("llama"), "llama"))


def test_packing_on_the_fly_to_disk_is_refused(tmp_path):
    zoo.make("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="bitlm quantize"):
        zoo.auto_class("llama").from_pretrained(
            tmp_path / "dense", quantization_config=BitlmConfig(), device_map=MAPS["llama"],
            offload_folder=tmp_path / "offload")
