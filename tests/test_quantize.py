"""The driver: a checkpoint in, a packed one out, for every architecture, killed and resumed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import bitlm
from bitlm import checkpoint, job, source
from bitlm.calibration.text import TextError
from bitlm.calibration.windows import CalibrationError
from bitlm.cli.errors import describe
from bitlm.job import JobError
from bitlm.methods import EncodeError
from bitlm.modules import packed_weights
from bitlm.quantize import (
    QuantizeError,
    make_request,
    pack,
    plan_for,
    quantize,
)
from bitlm.run import StrictError
from bitlm.scheme import Quantizer, Scheme, SchemeError, grid
from bitlm.source import SourceError
from tests import zoo
from tests.tiny import TEXT, make_bert, make_llama, make_tokenizer

DEMO = Path(bitlm.__file__).parent / "demo"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert not [n for n in first if not torch.equal(first[n], second[n])]


# --- what comes out -------------------------------------------------------------------------------

@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_architecture_from_disk_to_disk(name, tmp_path):
    zoo.make(name).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    before = {p.name: p.read_bytes() for p in (tmp_path / "dense").iterdir()}
    report = quantize(tmp_path / "dense", out=tmp_path / "packed")
    model, info = zoo.auto_class(name).from_pretrained(tmp_path / "packed",
                                                       output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    dense = zoo.auto_class(name).from_pretrained(tmp_path / "dense")
    assert zoo.same_tensors(model, pack(dense)) == []
    torch.testing.assert_close(zoo.output(model, name), zoo.output(dense, name))
    assert len(report.layers) == len(packed_weights(model))
    assert {p.name: p.read_bytes() for p in (tmp_path / "dense").iterdir()} == before


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss", "albert", "bart", "t5_relu",
                                  "opt", "deepseek_v3"])
def test_calibration_reaches_every_linear(name, tmp_path, text):
    model = zoo.make(name, vocab_size=300)
    model.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    report = quantize(tmp_path / "dense", out=tmp_path / "packed", calibrate=text, strict=True,
                      calibration_tokens=1024)
    assert not report.warnings
    assert all(layer.output_error is not None for layer in report.layers)
    loaded = zoo.auto_class(name).from_pretrained(tmp_path / "packed")
    assert torch.isfinite(zoo.output(loaded, name)).all()


def test_sizes_in_the_report_are_those_of_the_files(llama, tmp_path):
    report = quantize(llama, out=tmp_path / "out", scheme=Scheme(method="salient", salient=0.1),
                      embeddings=8)
    headers = checkpoint.read_headers(checkpoint.checkpoint_files(tmp_path / "out"))
    sizes = {name: torch.Size(h.shape).numel() * h.dtype.itemsize for name, h in headers.items()}
    packed = sum(size for name, size in sizes.items() if checkpoint.split_name(name)[1])
    assert report.packed_bytes == packed
    assert report.total_bytes == sum(sizes.values())
    stored = json.loads((tmp_path / "out" / "bitlm_report.json").read_text())
    assert stored["bits_packed"] == pytest.approx(8 * packed / report.packed_numel)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{report.bits_packed:.3f}" in card and f"{report.bits_file:.3f}" in card
    assert "bitlm quantize" in card


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(method="ternary", trits=True),
                                    Scheme(planes=3, refit=3, center="shift"), grid(4),
                                    Scheme(method="salient", salient=0.2, salient_layout="columns"),
                                    Scheme(method="salient", salient=0.1, group_size=17)])
def test_the_plan_is_what_gets_written(scheme, llama, tmp_path):
    plan = plan_for(llama, make_request(scheme=scheme, embeddings=4))
    report = quantize(llama, out=tmp_path / "out", scheme=scheme, embeddings=4,
                      measure_verdict=False)
    assert abs(plan.packed_bytes - report.packed_bytes) <= 0.001 * report.packed_bytes
    assert plan.packed_numel == report.packed_numel
    assert len(plan.skipped) == len(report.skipped)


def test_sharded_output_and_companions(llama, tmp_path):
    quantize(llama, out=tmp_path / "out")
    for name in ("config.json", "tokenizer.json", "README.md", "bitlm_report.json"):
        assert (tmp_path / "out" / name).is_file()
    mask = os.umask(0)
    os.umask(mask)
    mode = (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777
    assert mode == 0o666 & ~mask
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]


def test_a_weight_that_is_used_without_its_layer_is_rounded_plainly_and_said_so(tmp_path, text):
    zoo.make("mamba", vocab_size=300).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    options = {"calibrate": text, "calibration_tokens": 1024}
    report = quantize(tmp_path / "dense", out=tmp_path / "out", **options)
    assert len(report.warnings) == 2 and "dt_proj.weight: the calibration" in report.warnings[0]
    plain = [layer for layer in report.layers if layer.note]
    assert len(plain) == 2 and all(layer.output_error is None for layer in plain)
    with pytest.raises(StrictError, match="--strict"):
        quantize(tmp_path / "dense", out=tmp_path / "strict", strict=True, **options)
    assert not (tmp_path / "strict").exists()


@pytest.fixture(scope="module")
def judge():
    """Return a function that gives the KL of a packed model to the dense demo model."""
    from bitlm.evaluate.language import compare
    ids = source.tokenizer(DEMO)((DEMO / "heldout.txt").read_text(), verbose=False)["input_ids"]
    windows = torch.tensor(ids[:4 * 256]).view(4, 256)
    dense = source.load(DEMO, source.read_config(DEMO))
    return lambda packed: compare(packed, dense, windows).kl


def test_calibration_helps_the_demo_model(tmp_path, judge):
    kl = {}
    for name, text in {"plain": None, "compensated": DEMO / "calibration.txt"}.items():
        report = quantize(DEMO, "binary", out=tmp_path / name, calibrate=text)
        assert report.verdict.word == "unusable without training"
        assert "--preset chat" in report.verdict.advice
        kl[name] = judge(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    assert kl["compensated"] < kl["plain"]


def test_more_planes_and_refitting_are_nearer_than_a_grid_of_equal_bits(judge):
    def kl(scheme):
        return judge(pack(source.load(DEMO, source.read_config(DEMO)), scheme))

    refitted = [kl(Scheme(planes=planes, refit=10)) for planes in (1, 2, 3, 4)]
    assert refitted == sorted(refitted, reverse=True)
    assert refitted[1] < kl(Scheme(planes=2)) and refitted[1] < kl(grid(2))


def test_kept_outputs_may_spill_to_a_file(llama, text, tmp_path, monkeypatch):
    quantize(llama, out=tmp_path / "memory", calibrate=text)
    monkeypatch.setattr("bitlm.calibration.replay.MEMORY_BUDGET", 0)
    quantize(llama, out=tmp_path / "file", calibrate=text)
    assert_same(tmp_path / "memory", tmp_path / "file")


def test_encoders_get_a_verdict_too(tmp_path, text):
    make_bert(tmp_path / "bert")
    report = quantize(tmp_path / "bert", "chat", out=tmp_path / "out", calibrate=text)
    assert report.verdict.cosine is not None and report.verdict.kl is None
    assert isinstance(AutoModel.from_pretrained(tmp_path / "out"), torch.nn.Module)


def test_rows_of_zeros_are_exact(tmp_path, llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0
    model.save_pretrained(tmp_path / "dense")
    quantize(tmp_path / "dense", out=tmp_path / "out")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    row = packed.model.layers[0].mlp.up_proj.weight.dequantize()[3]
    assert torch.equal(row, torch.zeros_like(row))


# --- killed, interrupted, resumed -----------------------------------------------------------------

KILLED = """
import os, signal, sys
from bitlm.quantize import quantize
seen = 0
def progress(p):
    global seen
    seen += 1
    if seen == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
quantize(sys.argv[1], "ternary", out=sys.argv[2], calibrate=sys.argv[3], progress=progress)
"""


@pytest.mark.parametrize("after", [1, 8, 12])
def test_a_killed_run_resumes_to_the_same_tensors(after, llama, text, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, llama, out, text, str(after)],
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(JobError, match="--resume") if after > 7 else _nothing():
        quantize(llama, "ternary", out=out, calibrate=text)
    quantize(llama, "ternary", out=out, calibrate=text, resume=True, overwrite=out.exists())
    quantize(llama, "ternary", out=tmp_path / "whole", calibrate=text)
    assert_same(out, tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def stopped(folder: Path, out: Path, error: type[BaseException] = KeyboardInterrupt, **options):
    """Begin a run that stops after its first block."""
    def progress(now):
        if "layers.1" in now.name:
            raise error
    with pytest.raises(error):
        quantize(folder, out=out, progress=progress, **options)


@pytest.mark.parametrize("field, options", [
    ("scheme", {"preset": "ternary"}), ("skip", {"skip": ("down_proj",)}),
    ("embeddings", {"embeddings": 8}), ("overrides", {"overrides": {"up": {"planes": 2}}}),
    ("calibration.tokens", {"calibration_tokens": 256}), ("calibration.seed", {"seed": 1}),
    ("source", {"model": "other"}), ("version", {"version": "0.0.9"}),
])
def test_a_resume_that_differs_is_refused_naming_the_field(field, options, llama, text, tmp_path,
                                                           monkeypatch):
    base = {"preset": "binary", "calibrate": text, "calibration_tokens": 512}
    stopped(llama, tmp_path / "out", **base)
    assert not (tmp_path / "out").exists()
    options = dict(options)
    model = llama
    if options.pop("model", None):
        model = make_llama(tmp_path / "other", seed=1)
    if "version" in options:
        monkeypatch.setattr(sys.modules["bitlm.quantize"], "__version__", options.pop("version"))
    with pytest.raises(JobError, match=f"cannot resume: {field}"):
        quantize(model, out=tmp_path / "out", resume=True, **(base | options))


@pytest.mark.parametrize("options, words", [
    ({"scheme": Scheme(planes=2)}, "scheme.planes was 1 in the interrupted run and is 2 now"),
    ({"embeddings": 8}, "embeddings was not given in the interrupted run and is {"),
    ({"overrides": {"up": {"planes": 2}}}, "overrides.up was not given in .* {'planes': 2} now")])
def test_a_refused_resume_names_defaults_too(options, words, llama, tmp_path):
    stopped(llama, tmp_path / "out")
    with pytest.raises(JobError, match=f"cannot resume: {words}"):
        quantize(llama, out=tmp_path / "out", resume=True, **options)


def test_an_interrupted_run_leaves_no_output_and_overwrite_starts_again(llama, tmp_path):
    stopped(llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize(llama, out=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_no_space_left_says_so_and_keeps_the_finished_blocks(llama, tmp_path, monkeypatch):
    original = job.save_file

    def full(tensors, path, **options):
        if "unit-0001" in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device "
                                  "(os error 28)")
        return original(tensors, path, **options)

    monkeypatch.setattr(job, "save_file", full)
    with pytest.raises(OSError, match="--resume") as caught:
        quantize(llama, out=tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert "--resume" in describe(caught.value, "quantize")[0]
    assert [p.name for p in tmp_path.iterdir()] == [".out.bitlm-work"]
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(job, "save_file", original)
    quantize(llama, out=tmp_path / "out", resume=True)
    quantize(llama, out=tmp_path / "whole")
    assert_same(tmp_path / "out", tmp_path / "whole")


# --- what is refused ------------------------------------------------------------------------------

def test_wrong_requests(llama, text, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SchemeError, match="the presets are binary"):
        quantize(llama, "tiny", out=out)
    with pytest.raises(SchemeError, match="the methods are"):
        quantize(llama, scheme=Scheme(method="magic"), out=out)
    with pytest.raises(ValueError, match="matches no weight"):
        quantize(llama, out=out, skip=("no_such_layer",))
    with pytest.raises(ValueError, match="matches no packed weight"):
        quantize(llama, out=out, overrides={"no_such_layer": {"planes": 2}})
    with pytest.raises(ValueError, match="no regular expression"):
        quantize(llama, out=out, skip=("(",))
    with pytest.raises(QuantizeError, match="--calibrate"):
        quantize(llama, scheme=Scheme(compensate=True), out=out)
    with pytest.raises(QuantizeError, match="calibrat"):
        pack(AutoModelForCausalLM.from_pretrained(llama), Scheme(compensate=True))
    with pytest.raises(QuantizeError, match="has a quantizer of its inputs, whose step is learned"):
        quantize(llama, scheme=Scheme(input=Quantizer()), out=out)
    assert not list(tmp_path.iterdir())


def test_outputs_in_the_way(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(JobError, match="--overwrite"):
        quantize(llama, out=tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(JobError, match="is a file"):
        quantize(llama, out=tmp_path / "file")
    with pytest.raises(JobError, match="no folder that bitlm wrote"):
        quantize(llama, out=tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mine").read_text() == "x"
    with pytest.raises(JobError, match="which this run reads"):
        quantize(llama, out=llama, overwrite=True)
    with pytest.raises(JobError, match="inside the source model"):
        quantize(llama, out=llama / "packed")
    quantize(llama, out=tmp_path / "ours")
    quantize(llama, "ternary", out=tmp_path / "ours", overwrite=True)
    assert "plane0.mask" in " ".join(tensors(tmp_path / "ours"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "ours", "out"]


def test_files_that_a_snapshot_links_to_are_inputs_too(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    with pytest.raises(JobError, match="which this run reads"):
        quantize(tmp_path / "snapshot", out=tmp_path / "blobs", overwrite=True)
    quantize(tmp_path / "snapshot", out=tmp_path / "out")
    assert (tmp_path / "blobs" / "model.safetensors").is_file()


def test_an_output_that_is_a_link_keeps_being_one(llama, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for preset in ("binary", "ternary", "binary"):
        quantize(llama, preset, out=tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_two_runs_into_one_folder_are_kept_apart(llama, tmp_path):
    with job.locked(tmp_path / "out"), pytest.raises(JobError, match="another bitlm run"):
        quantize(llama, out=tmp_path / "out")
    quantize(llama, out=tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_overwrite_that_fails_puts_the_old_folder_back(llama, tmp_path, monkeypatch):
    quantize(llama, out=tmp_path / "out")
    before = tensors(tmp_path / "out")
    original = os.replace

    def fail(source_path, target):
        if str(source_path).endswith(".bitlm-part"):
            raise KeyboardInterrupt
        original(source_path, target)

    monkeypatch.setattr("bitlm.output.os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        quantize(llama, "ternary", out=tmp_path / "out", overwrite=True)
    monkeypatch.undo()
    assert tensors(tmp_path / "out").keys() == before.keys()
    quantize(llama, "ternary", out=tmp_path / "out", overwrite=True, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_damaged_unit_is_encoded_again(llama, tmp_path):
    stopped(llama, tmp_path / "out")
    unit = tmp_path / ".out.bitlm-work" / "unit-0000.safetensors"
    unit.write_bytes(unit.read_bytes()[:50])
    quantize(llama, out=tmp_path / "out", resume=True)
    quantize(llama, out=tmp_path / "whole")
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("stored, named", [(torch.bfloat16, "float32"), (torch.float32, "bfloat16"),
                                           (torch.float16, "float16")])
def test_the_files_say_the_dtype(stored, named, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "dense")
    state = {n: t.to(stored) for n, t in load_file(llama / "model.safetensors").items()}
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text()) | {"dtype": named}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    plan = plan_for(tmp_path / "dense", make_request())
    report = quantize(tmp_path / "dense", out=tmp_path / "out")
    dense = [tensor for name, tensor in tensors(tmp_path / "out").items()
             if not checkpoint.split_name(name)[1]]
    assert {t.dtype for t in dense if t.is_floating_point()} == {stored}
    assert report.total_bytes == sum(t.nbytes for t in tensors(tmp_path / "out").values())
    assert report.total_bytes == plan.total_bytes
    assert report.source_bytes == sum(t.nbytes for t in state.values())


def test_what_goes_wrong_with_the_verdict_does_not_cost_the_model(llama, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyError("last_hidden_state")

    monkeypatch.setattr("bitlm.verdict.measure", broken)
    report = quantize(llama, out=tmp_path / "out")
    assert report.verdict is None and "no verdict" in report.warnings[0]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_devices_that_are_not_there(llama, tmp_path):
    with pytest.raises(QuantizeError, match="--device"):
        quantize(llama, out=tmp_path / "out", device="warp")
    assert not list(tmp_path.iterdir())


def test_weights_with_nan(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "dense")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][0, :3] = float("nan")
    save_file(state, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncodeError, match="layers.1.mlp.down_proj.weight has 3 NaN"):
        quantize(tmp_path / "dense", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize(tmp_path / "dense", out=tmp_path / "out", skip=(r"layers\.1\.mlp\.down_proj",),
             overwrite=True)


@pytest.mark.parametrize("content, message", [
    ("", "is empty"), ("too short", "tokens"), (None, "no such file"),
])
def test_calibration_text_that_cannot_be_used(content, message, llama, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(TextError, match=message):
        quantize(llama, out=tmp_path / "out", calibrate=path)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model(tmp_path, text):
    make_llama(tmp_path / "small", vocab_size=64)
    with pytest.raises(TextError, match="does not belong to this model"):
        quantize(tmp_path / "small", out=tmp_path / "out", calibrate=text)


def test_calibration_without_tokenizer_or_without_text_input(tmp_path, text):
    zoo.make("vit").save_pretrained(tmp_path / "vit")
    with pytest.raises(CalibrationError, match="no tokenizer"):
        quantize(tmp_path / "vit", out=tmp_path / "out", calibrate=text)


def test_sources_that_cannot_be_read(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "out"
    with pytest.raises(SourceError, match="does not exist"):
        quantize("./nowhere", out=out)
    with pytest.raises(SourceError, match="hub"):
        quantize("someone/some-model-that-is-nowhere", out=out)
    with pytest.raises(SourceError, match="config.json"):
        (tmp_path / "empty").mkdir()
        quantize(tmp_path / "empty", out=out)
    quantize(llama, out=tmp_path / "packed")
    with pytest.raises(SourceError, match="already quantized"):
        quantize(tmp_path / "packed", out=out)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(llama / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(SourceError, match="pickle"):
        quantize(pickled, out=out)
    assert not out.exists()


def test_damaged_sources(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    shards = sorted((tmp_path / "dense").glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    with pytest.raises(checkpoint.CheckpointError, match=shards[1].name):
        quantize(tmp_path / "dense", out=tmp_path / "out")
    shards[1].write_bytes(whole[:20] + bytes([whole[20] ^ 0xFF]) + whole[21:])
    with pytest.raises((checkpoint.CheckpointError, SourceError)):
        quantize(tmp_path / "dense", out=tmp_path / "out")
    shards[1].unlink()
    with pytest.raises(checkpoint.CheckpointError, match="missing"):
        quantize(tmp_path / "dense", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
