"""Without bitlm a packed checkpoint must not open with random weights."""

import os
import subprocess
import sys

import pytest
from safetensors import safe_open
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from bitlm.hf import BitlmConfig
from tests import zoo


@pytest.fixture
def without_bitlm(monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "bitlm")


@pytest.mark.parametrize("dtype", [None, "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "bert", "t5_relu", "vit"])
def test_refused_without_bitlm(name, dtype, tmp_path, without_bitlm):
    zoo.packed(name).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched|automatic conversion|ignore_mismatched"):
        zoo.auto_class(name).from_pretrained(tmp_path, **({"dtype": dtype} if dtype else {}))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_only_experts_packed(name, tmp_path, monkeypatch):
    model = zoo.pack(zoo.make(name), BitlmConfig(skip=["attn"]))
    model.save_pretrained(tmp_path)
    loaded, report = zoo.auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and zoo.same_tensors(model, loaded) == []
    loaded.save_pretrained(tmp_path / "again")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "bitlm")
    for directory in (tmp_path, tmp_path / "again"):
        with pytest.raises(RuntimeError):
            zoo.auto_class(name).from_pretrained(directory)


def test_the_guard_is_written_on_every_save(tmp_path):
    directory = tmp_path
    zoo.packed("llama").save_pretrained(directory)
    for turn in range(2):
        with safe_open(directory / "model.safetensors", "pt") as file:
            guard = file.get_tensor("model.layers.0.self_attn.q_proj.weight")
        assert guard.shape == (0,)
        model = zoo.auto_class("llama").from_pretrained(directory)
        directory = tmp_path / str(turn)
        model.save_pretrained(directory, max_shard_size="100KB")


def test_a_process_that_never_heard_of_bitlm(tmp_path):
    zoo.packed("llama").save_pretrained(tmp_path)
    code = ("import sys, transformers\n"
            f"for dtype in ({{}}, {{'dtype': 'auto'}}):\n"
            "    try:\n"
            "        transformers.AutoModelForCausalLM.from_pretrained("
            f"{str(tmp_path)!r}, **dtype)\n"
            "    except RuntimeError:\n"
            "        continue\n"
            "    raise SystemExit('opened with random weights')\n"
            "assert 'bitlm' not in sys.modules\n")
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True,
                          text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
