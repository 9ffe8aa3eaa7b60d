import json

import pytest

from bitlm.cli import doctor
from bitlm.ops import cpu

KERNELS = [{"work": "1 token, binary", "choice": "look-up", "why": "measured: 31 us against 40 us"},
           {"work": "prefill", "choice": "amx", "why": "CPUID"}]


@pytest.fixture
def describe(monkeypatch):
    """Let cpu.describe() return its own facts with some changed; None takes one away."""
    def changed(**changes):
        facts = {k: v for k, v in (cpu.describe() | changes).items() if k not in changes
                 or changes[k] is not None or k in ("library", "reason")}
        monkeypatch.setattr(cpu, "describe", lambda: facts)
    return changed


def test_shows_everything_and_writes_json(run, tmp_path):
    result = run("doctor", "--json", tmp_path / "doctor.json")
    assert result.exit_code == 0, result.output
    for words in ("torch", "transformers", "native library", "autoload hook", "cuda", "threads",
                  "huge pages", "reference"):
        assert words in result.stdout
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert found["forms"] and ("instruction set" in found) == bool(cpu.describe()["library"])


def test_every_preset_with_native_or_the_reason(run, describe, monkeypatch):
    describe(library="libx.so", reason=None)
    monkeypatch.setattr(cpu, "unsupported", lambda form, dtype: "too salient" if
                        "salient.mask" in form.names else None)
    lines = [" ".join(line.split()) for line in run("doctor").stdout.splitlines()]
    for line in ("preset binary native kernel", "preset ternary native kernel",
                 "preset salient too salient", "4-bit grid native kernel"):
        assert line in lines


def test_every_kernel_with_its_reason(run, describe):
    describe(library="libx.so", reason=None, kernels=KERNELS, order="dwords",
             binding={"route": "ctypes", "why": "no shim for torch 3"}, arena="12 MiB")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in ("work kernel why", "1 token, binary look-up measured: 31 us against 40 us",
                 "prefill amx CPUID", "order of codes dwords", "arena 12 MiB",
                 "binding route: ctypes, why: no shim for torch 3"):
        assert line in lines, result.stdout


def test_without_a_choice_of_kernels(run, describe):
    describe(kernels=None, order=None, binding=None)
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "work" not in result.stdout.split() and "binding" not in result.stdout


def test_the_reason_for_no_library_stands_once(run, describe, monkeypatch):
    describe(library=None, reason="the file libx.so is missing", kernels=[])
    monkeypatch.setattr(cpu, "unsupported", lambda form, dtype: "the file libx.so is missing")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("libx.so is missing") == 1
    assert "instruction set" not in result.stdout and "packed_linear" not in result.stdout


@pytest.mark.parametrize("text, words", [
    ("always [madvise] never\n", "madvise: weights lie in 2 MiB"),
    ("[always] madvise never\n", "always: weights"),
    ("always madvise [never]\n", "never: weights lie in small pages"), (None, "not known")])
def test_huge_pages(text, words, tmp_path, monkeypatch):
    file = tmp_path / "enabled"
    if text:
        file.write_text(text)
    monkeypatch.setattr(doctor, "_PAGES", file)
    assert doctor.huge_pages().startswith(words)


def test_threads(monkeypatch):
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert doctor.threads().startswith(f"{torch.get_num_threads()} (torch's setting, OMP_NUM_")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "OMP" not in doctor.threads() and doctor.threads().endswith(" cores")


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
