"""Headers, damaged and hostile files, and the deep look at contents."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitlm import checkpoint
from bitlm.checkpoint import (
    CheckpointError,
    checkpoint_files,
    deep_verify,
    read_headers,
    split_name,
)
from bitlm.hf import BitlmConfig
from tests import zoo

WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def directory(tmp_path):
    zoo.packed("llama", "ternary").save_pretrained(tmp_path)
    return tmp_path


def load(directory):
    return zoo.auto_class("llama").from_pretrained(directory)


def rewrite(directory, change):
    """Change the tensors of a checkpoint by a function of their dict."""
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_headers_say_what_the_files_hold(tmp_path):
    model = zoo.packed("llama", "salient")
    model.save_pretrained(tmp_path, max_shard_size="16KB")
    headers = read_headers(checkpoint_files(tmp_path))
    for name, tensor in model.state_dict().items():
        assert (headers[name].dtype, headers[name].shape) == (tensor.dtype, tuple(tensor.shape))


@pytest.mark.parametrize("key, parts", [
    ("a.weight.plane0.signs", ("a.weight", "plane0.signs")),
    ("a.experts.gate_up_proj.chain10.row_scales", ("a.experts.gate_up_proj", "chain10.row_scales")),
    ("a.weight.shift", ("a.weight", "shift")),
    ("a.weight.salient.values", ("a.weight", "salient.values")),
    ("a.weight", ("a.weight", "")),
    ("planes.0.weight", ("planes.0.weight", "")),
])
def test_names(key, parts):
    assert split_name(key) == parts


GOOD = {"dtype": "U8", "shape": [2, 2], "data_offsets": [0, 4]}


@pytest.mark.parametrize("header, length", [
    (b"", 0),
    (b"{}", 2**63),
    (b"{}", 10**9),
    (b"{}", 3),
    (b"nonsense", None),
    (b"[" * 100_000, None),
    (b"\xff\xfe{}", None),
    ([1], None),
    ({"a": 1}, None),
    ({"a": GOOD | {"dtype": "U9"}}, None),
    ({"a": GOOD | {"dtype": ["U8"]}}, None),
    ({"a": GOOD | {"shape": [2, -2]}}, None),
    ({"a": GOOD | {"shape": [2, 2.0]}}, None),
    ({"a": GOOD | {"shape": [True, 4]}}, None),
    ({"a": GOOD | {"shape": "22"}}, None),
    ({"a": GOOD | {"shape": [2**62, 2**62]}}, None),
    ({"a": GOOD | {"data_offsets": [0, 400]}}, None),
    ({"a": GOOD | {"data_offsets": [4, 0]}}, None),
    ({"a": GOOD | {"data_offsets": [-4, 0]}}, None),
    ({"a": GOOD | {"data_offsets": [0]}}, None),
    ({"a": {"dtype": "U8"}}, None),
])
def test_hostile_headers(header, length, tmp_path):
    path = write(tmp_path / "model.safetensors", header, b"\0" * 4, length)
    with pytest.raises(CheckpointError, match="download it again"):
        read_headers([path])


def test_every_truncation_and_many_flipped_bits_are_handled(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.uint8)}, path)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_headers([path])
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            read_headers([path])
        except CheckpointError:
            pass


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_headers([tmp_path / "gone.safetensors"])
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_headers([tmp_path / "pytorch_model.bin"])
    with pytest.raises(CheckpointError, match="has neither"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("index, words", [
    ('{"weight_map": {"a": "model-1.safetensors"}}', "missing: download it again"),
    ('{"weight_map": {"a": "../../etc/passwd"}}', "not a file of its directory"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "not a file of its directory"),
    ('{"weight_map": {"a": 3}}', "not a file of its directory"),
    ('{"weight_map": [1]}', "cannot be read"),
    ('{"weight', "cannot be read"),
    ("{}", "cannot be read"),
])
def test_broken_indices(index, words, tmp_path):
    (tmp_path / checkpoint.INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=words):
        checkpoint_files(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="do not belong together"):
        read_headers(sorted(tmp_path.glob("*.safetensors")))


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


@pytest.mark.parametrize("change, words", [
    (drop(f"{WEIGHT}.plane0.scales"), "plane0.scales is missing"),
    (put(f"{WEIGHT}.plane0.scales", torch.zeros(48, 2).half()), r"shape \[48, 2\], expected"),
    (put(f"{WEIGHT}.plane0.signs", torch.zeros(48, 4)), "plane0.signs is float32, expected uint8"),
    (put(f"{WEIGHT}.plane0.scales", torch.zeros(48, 1, dtype=torch.bfloat16)), "is bfloat16"),
    (put(f"{WEIGHT}.plane1.signs", torch.zeros(48, 4).byte()), "plane1.signs is not part"),
    (put("lm_head.weight.plane0.signs", torch.zeros(99, 4).byte()), "leaves lm_head.weight dense"),
    (put("model.layers.7.x.weight.plane0.signs", torch.zeros(1).byte()), "no weight of this model"),
    (lambda t: [t.pop(n) for n in list(t) if n.startswith(WEIGHT)], f"{WEIGHT} is missing"),
    (lambda t: [t.pop(n) for n in list(t) if n.startswith(WEIGHT)]
     and t.__setitem__(WEIGHT, torch.zeros(48, 32)), "is dense in the file but packed"),
])
def test_files_that_do_not_fit_the_plan(change, words, directory):
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=words):
        load(directory)
    assert deep_verify(directory)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_one_expert_is_missing(name, tmp_path):
    zoo.packed(name).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.pop(next(n for n in t if ".experts.2." in n)))
    with pytest.raises(CheckpointError, match="some are missing"):
        zoo.auto_class(name).from_pretrained(tmp_path)


@pytest.mark.parametrize("changes, words", [
    ({"scheme": {"method": "ternary", "group_size": 16}}, "plane0.scales has shape"),
    ({"scheme": {"method": "binary"}}, "plane0.mask is not part"),
    ({"skip": ["layers.0"]}, "leaves model.layers.0"),
    ({"embeddings": {"method": "binary"}}, "embed_tokens.weight is dense in the file"),
    ({"format_version": 3}, "pip install -U bitlm"),
    ({"scheme": {"method": "ternary", "novelty": 1}}, "unknown scheme key 'novelty'"),
    ({"novelty": 1}, "unknown key 'novelty'"),
    ({"scheme": {"method": "octal"}}, "unknown method 'octal'"),
])
def test_an_edited_configuration(changes, words, directory):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=words):
        load(directory)
    assert any(words.split(".")[0].split("'")[0] in problem for problem in deep_verify(directory))


def test_a_missing_shard(tmp_path):
    zoo.packed("llama").save_pretrained(tmp_path, max_shard_size="16KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((OSError, ValueError), match=shard.name):
        load(tmp_path)
    assert shard.name in deep_verify(tmp_path)[0]


def test_a_truncated_shard_is_named_before_loading(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load(directory)
    assert "truncated" in deep_verify(directory)[0]


@pytest.mark.parametrize("name, scheme", [
    ("llama", "binary"), ("gpt2", "binary"), ("mixtral", "ternary"), ("mixtral", "salient"),
    ("llama", {"method": "ternary", "trits": True}), ("llama", {"planes": 2}),
    ("mixtral", {"method": "salient", "salient": 0.1, "salient_layout": "columns"}),
    ("llama", {"method": "grid", "planes": 3, "center": "shift"}),
], ids=str)
def test_deep_verify_finds_nothing_wrong(name, scheme, tmp_path):
    zoo.pack(zoo.make(name), BitlmConfig(scheme, embeddings=8)).save_pretrained(tmp_path)
    assert deep_verify(tmp_path) == []



@pytest.mark.parametrize("scheme, tensor, value, words", [
    ("ternary", "plane0.scales", float("nan"), "plane0.scales has values that are not finite"),
    ("ternary", "plane0.scales", float("inf"), "plane0.scales has values that are not finite"),
    ("ternary", "plane0.signs", 255, "plane0.signs has bits set where the mask is 0"),
    ("trits", "plane0.trits", 250, "plane0.trits has bytes above 242"),
    ("trits", "plane0.trits", 242, "plane0.trits has padding digits"),
    ("salient", "plane0.signs", 255, "plane0.signs has bits set under salient entries"),
    ("salient", "salient.mask", 255, "salient.mask has more bits set|under salient entries"),
    ("salient", "salient.values", 9, "salient.values is not 0 behind the last entry"),
    ("columns", "salient.columns", 31, "salient.columns is not sorted"),
    ("columns", "salient.columns", 99, "salient.columns is not sorted or not within 0..31"),
    ("columns", "plane0.signs", 255, "plane0.signs has bits set under salient entries"),
])
def test_deep_verify_finds_damage(scheme, tensor, value, words, tmp_path):
    schemes = {"trits": {"method": "ternary", "trits": True},
               "columns": {"method": "salient", "salient": 0.1, "salient_layout": "columns"}}
    zoo.pack(zoo.make("llama"), BitlmConfig(schemes.get(scheme, scheme))).save_pretrained(tmp_path)

    def change(tensors):
        if tensor == "salient.values":  # one value more than the bitmap has
            name = f"{WEIGHT}.salient.values"
            tensors[name] = torch.cat([tensors[name], torch.full((1, 1), value).byte()], 1)
            return
        row = slice(None) if tensor in ("salient.mask", "plane0.signs") else 0
        column = slice(None) if "signs" in tensor else -1 if "trits" in tensor else 0
        tensors[f"{WEIGHT}.{tensor}"][row, column] = value

    rewrite(tmp_path, change)
    problems = deep_verify(tmp_path)
    assert problems and all(problem.startswith(WEIGHT) for problem in problems)
    import re
    assert re.search(words, problems[0])


def test_padding_bits(tmp_path):
    model = zoo.pack(zoo.make("llama", intermediate_size=44))
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t["model.layers.0.mlp.down_proj.weight.plane0.signs"].bitwise_or_(
        torch.tensor([0] * 5 + [0x80], dtype=torch.uint8)))
    assert deep_verify(tmp_path) == [
        "model.layers.0.mlp.down_proj.weight.plane0.signs has padding bits that are not 0"]


def test_a_dense_checkpoint_is_not_packed(tmp_path):
    zoo.make("llama").save_pretrained(tmp_path)
    assert "is not packed" in deep_verify(tmp_path)[0]


def test_a_large_header_is_read_fast(tmp_path):
    import time

    entries = {f"model.layers.{i // 350}.w{i % 350}.weight.plane0.signs":
               {"dtype": "U8", "shape": [1, 1], "data_offsets": [i, i + 1]} for i in range(44_800)}
    path = write(tmp_path / "model.safetensors", entries, b"\0" * 44_800)
    start = time.perf_counter()
    assert len(read_headers([path])) == 44_800
    assert time.perf_counter() - start < 5
