import json

from bitlm.cli import doctor


def test_shows_everything_and_writes_json(run, tmp_path):
    result = run("doctor", "--json", tmp_path / "doctor.json")
    assert result.exit_code == 0, result.output
    for words in ("torch", "transformers", "native library", "instruction set", "autoload hook",
                  "cuda", "preset chat"):
        assert words in result.stdout
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["forms"]["preset salient"]
    assert set(found["forms"]) >= {"preset binary", "preset ternary", "4-bit grid"}


def test_the_hook_can_be_off(monkeypatch):
    import importlib.metadata

    hook = importlib.metadata.EntryPoint("bitlm", "bitlm_autoload:hook", "torch.backends")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [hook])
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    assert doctor.autoload_state().startswith("on")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert doctor.autoload_state().startswith("off")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert doctor.autoload_state().startswith("not installed")
