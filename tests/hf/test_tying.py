"""Tied weights that are packed: one copy on disk, one in memory."""

import pytest
import torch
from safetensors import safe_open

from bitlm.hf import BitlmConfig
from bitlm.hf.tying import tied_group
from bitlm.weight import PackedWeight
from tests import zoo

TIED = ("llama_tied", "gpt2", "opt", "bloom", "gemma3", "bart", "pegasus", "t5_relu", "whisper")
SHARED = BitlmConfig(embeddings=8)


@pytest.mark.parametrize("name", TIED)
def test_one_copy_on_disk_and_in_memory(name, tmp_path):
    names = tied_group(zoo.make(name), next(iter(zoo.make(name).all_tied_weights_keys)))
    model = zoo.pack(zoo.make(name), SHARED)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = list(file.keys())
    copies = [key for key in keys if key.endswith("plane0.signs")
              and key.removesuffix(".plane0.signs") in names]
    assert len(copies) == 1
    loaded = zoo.auto_class(name).from_pretrained(tmp_path)
    for each in (model, loaded):
        pointers = {each.get_parameter(f"{other}.plane0.signs").data_ptr() for other in names}
        assert len(names) > 1 and len(pointers) == 1
    loaded.tie_weights()
    assert zoo.same_tensors(model, loaded) == []


def test_untied_embeddings_stay_apart(tmp_path):
    model = zoo.pack(zoo.make("llama"), SHARED)
    model.save_pretrained(tmp_path)
    loaded = zoo.auto_class("llama").from_pretrained(tmp_path)
    assert not torch.equal(loaded.lm_head.weight.plane0.signs,
                           loaded.model.embed_tokens.weight.plane0.signs)


def test_a_skipped_partner_is_no_longer_tied(tmp_path):
    model = zoo.pack(zoo.make("llama_tied"), BitlmConfig(embeddings=8, skip=["lm_head"]))
    model.save_pretrained(tmp_path)
    loaded, report = zoo.auto_class("llama_tied").from_pretrained(tmp_path,
                                                                  output_loading_info=True)
    assert not any(report.values()) and zoo.same_tensors(model, loaded) == []
    assert isinstance(loaded.model.embed_tokens.weight, PackedWeight)
    assert not isinstance(loaded.lm_head.weight, PackedWeight)


def test_an_override_of_a_partner_alone_is_refused():
    config = BitlmConfig(embeddings=8, overrides={"lm_head": {"planes": 3}})
    with pytest.raises(ValueError, match="tied to model.embed_tokens.weight"):
        zoo.pack(zoo.make("llama_tied"), config)


def test_partners_follow_the_overrides_of_their_source(tmp_path):
    config = BitlmConfig(embeddings=8, overrides={"embed_tokens": {"planes": 3}})
    model = zoo.pack(zoo.make("llama_tied"), config)
    model.save_pretrained(tmp_path)
    loaded, report = zoo.auto_class("llama_tied").from_pretrained(tmp_path,
                                                                  output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(zoo.output(model, "llama_tied"), zoo.output(loaded, "llama_tied"))


@pytest.mark.parametrize("name", ["llama_tied", "llama", "bart", "t5_relu"])
def test_the_dtype_is_that_of_the_dense_rest(name, tmp_path):
    model = zoo.pack(zoo.make(name, dtype="bfloat16").to(torch.bfloat16), BitlmConfig(embeddings=8))
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = zoo.auto_class(name).from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16 and zoo.same_tensors(model, loaded) == []


@pytest.mark.parametrize("skip", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_weights_may_stay_dense(skip, tmp_path):
    model = zoo.pack(zoo.make("llama_tied"), BitlmConfig(embeddings=8, skip=[skip]))
    model.save_pretrained(tmp_path)
    loaded = zoo.auto_class("llama_tied").from_pretrained(tmp_path)
    assert zoo.same_tensors(model, loaded) == []
    torch.testing.assert_close(zoo.output(model, "llama_tied"), zoo.output(loaded, "llama_tied"))
