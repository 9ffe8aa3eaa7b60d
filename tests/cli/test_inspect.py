import json
import shutil

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def packed(zoo, tmp_path):
    return shutil.copytree(zoo / "packed", tmp_path / "packed")


def change(packed, name, value=None):
    tensors = load_file(packed / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value(tensors[name])
    save_file(tensors, packed / "model.safetensors", metadata={"format": "pt"})


def test_shows_scheme_sizes_coverage_and_kernels(run, zoo):
    result = run("inspect", zoo / "packed")
    assert result.exit_code == 0, result.output
    for words in ("LlamaForCausalLM", "binary", "format version", "bits per weight, packed layers",
                  "bits per weight, whole file", "model.layers.mlp.down_proj", "lm_head",
                  "output head", "on this CPU"):
        assert words in result.stdout


def test_activations(run, zoo, packed):
    assert "float (W1A16)" in run("inspect", packed).stdout
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["scheme"]["activation"] = "int8"
    config["quantization_config"]["overrides"] = {"down_proj": {"activation": "int1"}}
    (packed / "config.json").write_text(json.dumps(config))
    result = run("inspect", packed)
    assert "int8 (W1A8): 12, int1 (W1A1): 2" in result.stdout
    assert "activation=int8" in result.stdout


def test_figures_equal_the_report(run, zoo):
    report = json.loads((zoo / "packed" / "bitlm_report.json").read_text())
    shown = run("inspect", zoo / "packed").stdout
    assert f"{report['bits_packed']:.3f}" in shown
    assert f"{report['bits_file']:.3f}" in shown


def test_verify_passes_a_good_checkpoint(run, zoo):
    result = run("inspect", zoo / "packed", "--verify")
    assert result.exit_code == 0, result.output
    assert "verified" in result.stdout


def test_verify_names_what_is_wrong(run, packed):
    change(packed, "model.layers.0.mlp.up_proj.weight.plane0.scales", lambda t: t * float("nan"))
    result = run("inspect", packed, "--verify")
    assert result.exit_code == 1
    assert "up_proj.weight.plane0.scales" in result.stderr


def test_verify_names_a_missing_tensor(run, packed):
    change(packed, "model.layers.0.mlp.up_proj.weight.plane0.scales")
    result = run("inspect", packed, "--verify")
    assert result.exit_code == 1
    assert "up_proj.weight" in result.stderr


def test_truncated_file(run, packed):
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    result = run("inspect", packed)
    assert result.exit_code == 1
    assert "truncated" in result.stderr and result.stderr.count("\n") == 1


def test_newer_format(run, packed):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (packed / "config.json").write_text(json.dumps(config))
    result = run("inspect", packed)
    assert result.exit_code == 1
    assert "99" in result.stderr and "pip install" in result.stderr


def test_no_packed_model(run, zoo, tmp_path):
    for folder, words in ((zoo / "llama", "no packed model"), (tmp_path / "x", "is no folder")):
        result = run("inspect", folder)
        assert result.exit_code == 1
        assert words in result.stderr
