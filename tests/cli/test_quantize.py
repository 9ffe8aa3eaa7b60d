"""`bitlm quantize`: flags to schemes, the plan, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bitlm.cli.quantize import _overrides, _request
from bitlm.scheme import PRESETS, Scheme, SchemeError, grid

NOTHING = dict(preset=None, method=None, bits=None, group_size=None, planes=None, salient=None,
               embeddings=None, skip=None, override=None, config=None, activation=None)


def scheme(**flags) -> Scheme:
    return _request(**(NOTHING | flags))["scheme"]


@pytest.mark.parametrize("flags, expected", [
    ({}, PRESETS["binary"]),
    ({"preset": "chat"}, PRESETS["chat"]),
    ({"preset": "chat", "planes": 2}, PRESETS["chat"].replace(planes=2)),
    ({"method": "ternary"}, PRESETS["ternary"]),
    ({"method": "grid"}, grid(4)),
    ({"bits": 3, "group_size": "64"}, grid(3, 64)),
    ({"salient": 0.2}, Scheme(method="salient", salient=0.2)),
    ({"group_size": "row"}, Scheme(group_size="row")),
    ({"preset": "chat", "activation": "int8"}, PRESETS["chat"].replace(activation="int8")),
    ({"bits": 4, "activation": "int16"}, grid(4).replace(activation="int16")),
])
def test_flags_make_schemes(flags, expected):
    assert scheme(**flags) == expected


@pytest.mark.parametrize("flags, message", [
    ({"preset": "best"}, "unknown preset"), ({"method": "magic"}, None),
    ({"bits": 4, "planes": 2}, "--bits"), ({"planes": 9}, "planes is 9"),
    ({"group_size": "0"}, "group_size is 0"), ({"salient": 1.5}, "salient is 1.5"),
    ({"embeddings": 9}, None), ({"activation": "int4"}, "activation is 'int4'"),
])
def test_wrong_flags_exit_2_with_one_line(flags, message, run, zoo, tmp_path):
    arguments = [part for key, value in flags.items()
                 for part in (f"--{key.replace('_', '-')}", value)]
    result = run("quantize", zoo / "llama", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert (message or "") in result.stderr
    assert not list(tmp_path.iterdir())


def test_overrides_are_parsed_by_the_type_of_their_field():
    assert _overrides(["down_proj=planes:2,group_size:row", r"layers\.0=compensate:false,damp:0.1"]
                      ) == {"down_proj": {"planes": 2, "group_size": "row"},
                            r"layers\.0": {"compensate": False, "damp": 0.1}}
    for wrong in ("down_proj", "x=planes:two", "x=plane:2", "x=compensate:maybe"):
        with pytest.raises(SchemeError, match="--override"):
            _overrides([wrong])


def test_a_toml_file_says_the_rest(tmp_path, run, zoo):
    file = tmp_path / "request.toml"
    file.write_text('skip = ["o_proj"]\nembeddings = 8\n'
                    '[scheme]\nmethod = "ternary"\ntrits = true\n'
                    '[overrides."down_proj"]\nplanes = 2\n')
    result = run("quantize", zoo / "llama", "--config", file, "--dry-run", "--json",
                 tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "plan.json").read_text())
    schemes = {entry["name"]: entry["scheme"] for entry in plan["entries"]}
    assert schemes["model.layers.0.mlp.up_proj.weight"] == {"method": "ternary", "trits": True}
    assert schemes["model.layers.0.mlp.down_proj.weight"]["planes"] == 2
    assert schemes["model.embed_tokens.weight"]["method"] == "grid"
    assert not any("o_proj" in name for name in schemes)
    assert any("o_proj" in skipped["name"] for skipped in plan["skipped"])
    file.write_text("sceme = 1\n")
    assert run("quantize", zoo / "llama", "--config", file).exit_code == 2
    file.write_text("not toml")
    assert run("quantize", zoo / "llama", "--config", file).exit_code == 2


def test_activations_reach_config_report_and_card(run, zoo, tmp_path):
    file = tmp_path / "request.toml"
    file.write_text('[scheme]\nmethod = "ternary"\nactivation = "int16"\n'
                    '[overrides."up_proj"]\nactivation = "uint2"\n')
    result = run("quantize", zoo / "llama", "--config", file, "--override",
                 "down_proj=activation:int8", "--embeddings", "8", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    # The embedding has no input; the head has the mode of its own scheme.
    counted = "int16 (W1.58A16): 10, uint2 (W1.58A2): 2, int8 (W1.58A8): 2, float (W8A16): 1"
    assert counted in " ".join(result.stdout.split())
    assert counted in (tmp_path / "out" / "README.md").read_text()
    report = json.loads((tmp_path / "out" / "bitlm_report.json").read_text())
    modes = {layer["name"]: layer.get("activation") for layer in report["layers"]}
    assert modes["model.layers.0.mlp.down_proj.weight"] == "int8 (W1.58A8)"
    assert modes["model.embed_tokens.weight"] is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["scheme"] == {"method": "ternary", "activation": "int16"}
    assert "activation" not in config["embeddings"]


def test_the_activation_flag_is_for_the_whole_model_but_overrides(run, zoo, tmp_path):
    flags = ("quantize", zoo / "llama", "--preset", "chat", "--embeddings", "8", "--dry-run",
             "--json", tmp_path / "plan.json")
    result = run(*flags, "--activation", "int8", "--override", "up_proj=activation:float")
    assert result.exit_code == 0, result.output
    plan = json.loads((tmp_path / "plan.json").read_text())
    modes = {e["name"]: e["scheme"].get("activation", "float") for e in plan["entries"]}
    assert {name for name, mode in modes.items() if mode == "float"} == {
        f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)}
    assert modes["lm_head.weight"] == "int8"
    result = run(*flags, "--activation", "int1")
    assert result.exit_code == 1 and "looked up, not multiplied" in result.stderr


def test_the_default_folder_is_named_without_the_activation():
    asked = _request(**(NOTHING | {"preset": "chat", "activation": "int8"}))
    assert asked["name"] == "chat"


def test_the_dry_run_announces_what_the_run_writes(run, zoo, tmp_path):
    flags = ("quantize", zoo / "llama", "--salient", "0.1", "--embeddings", "8")
    assert run(*flags, "--dry-run", "--json", tmp_path / "plan.json").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    result = run(*flags, "--out", tmp_path / "out", "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    plan, report = (json.loads((tmp_path / f"{name}.json").read_text())
                    for name in ("plan", "report"))
    assert plan["total_bytes"] == pytest.approx(report["total_bytes"], rel=1e-3)
    assert "verdict" in result.stdout and "bits per weight, whole file" in result.stdout


def test_the_default_output_folder_is_named_after_model_and_preset(run, zoo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("quantize", zoo / "llama").exit_code == 0
    assert run("quantize", zoo / "llama", "--preset", "chat", "--planes", "2").exit_code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama-binary", "llama-binary2"]
    again = run("quantize", zoo / "llama")
    assert again.exit_code == 1 and "--overwrite" in again.stderr


def test_calibrated_in_a_process_of_its_own(zoo, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from bitlm.cli import main; main()", "quantize", zoo / "llama",
         "--preset", "ternary", "--calibrate", zoo / "text.txt", "--out", tmp_path / "out"],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "calibration" in done.stdout
    assert done.stderr == ""
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["scheme"]["compensate"] and config["calibration"]["source"] == "text.txt"


@pytest.mark.parametrize("toml", ['skip = "down_proj"', "overrides = 5", "preset = 3",
                                  "[overrides]\nup_proj = 3", "embeddings = true",
                                  'preset = "chat"\n[scheme]\nmethod = "ternary"',
                                  "[overrides.up]\nplane = 2"])
def test_wrong_toml_files_exit_2_with_one_line(toml, run, zoo, tmp_path):
    (tmp_path / "wrong.toml").write_text(toml)
    result = run("quantize", zoo / "llama", "--config", tmp_path / "wrong.toml", "--dry-run")
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_preset_flag_beats_the_file(run, zoo, tmp_path):
    file = tmp_path / "request.toml"
    file.write_text('[scheme]\nmethod = "ternary"\n')
    assert _request(**(NOTHING | {"config": file, "preset": "chat"}))["scheme"] == PRESETS["chat"]


def test_where_the_json_cannot_go_is_found_first(run, zoo, tmp_path):
    result = run("quantize", zoo / "llama", "--out", tmp_path / "out", "--json",
                 tmp_path / "nowhere" / "report.json")
    assert result.exit_code == 1 and "no such folder" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_token_count_needs_a_text(run, zoo, tmp_path):
    result = run("quantize", zoo / "llama", "--calibration-tokens", "512", "--out", tmp_path / "o")
    assert result.exit_code == 2 and "--calibrate" in result.stderr
