"""Format version 1, byte by byte: weights whose packed tensors were worked out by hand.

A change of these bytes is a change of the file format: raise format_version, do not edit them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bitlm.hf.config import BitlmConfig
from bitlm.methods import encode
from bitlm.modules import PackedLinear
from bitlm.scheme import Scheme
from bitlm.weight import from_encoded


def half(*rows):
    return torch.tensor(rows, dtype=torch.float16)


def byte(*rows):
    return torch.tensor(rows, dtype=torch.uint8)


# name: (scheme, dense weight, tensors, what they stand for)
GOLDEN = {
    # Two groups, the second one short. Bits of row 0: 0, 2, 4, 5 = 1 + 4 + 16 + 32; sign(0) = +1.
    "binary": (
        Scheme(group_size=8),
        [[1, -1, 1, -1, 1, 1, -1, -1, 3, -1], [-2, 2, 2, 2, -2, -2, -2, 2, 0, -.5]],
        {"plane0.signs": byte([53, 1], [142, 1]), "plane0.scales": half([1, 2], [2, .25])},
        [[1, -1, 1, -1, 1, 1, -1, -1, 2, -2], [-2, 2, 2, 2, -2, -2, -2, 2, .25, -.25]]),
    # The mean of |W| is 2, what is at most 1 becomes 0: mask 0, 1, 7; of these 1 is negative.
    "ternary": (
        Scheme(method="ternary", levels="absmean"), [[4, -4, 0, 0, 1, -1, 0, 6]],
        {"plane0.signs": byte([129]), "plane0.mask": byte([131]), "plane0.scales": half([2])},
        [[2, -2, 0, 0, 0, 0, 0, 2]]),
    # The same as digits 2 0 1 1 1 | 1 1 2 (0 0): 162 + 0 + 9 + 3 + 1, 81 + 27 + 18.
    "trits": (
        Scheme(method="ternary", levels="absmean", trits=True), [[4, -4, 0, 0, 1, -1, 0, 6]],
        {"plane0.trits": byte([175, 126]), "plane0.scales": half([2])},
        [[2, -2, 0, 0, 0, 0, 0, 2]]),
    "two planes": (
        Scheme(planes=2), [[3, 1, -1, -3]],
        {"plane0.signs": byte([3]), "plane0.scales": half([2]),
         "plane1.signs": byte([5]), "plane1.scales": half([1])},
        [[3, 1, -1, -3]]),
    "shift": (
        Scheme(center="shift", scale_dtype="float32"), [[5, 1]],
        {"plane0.signs": byte([1]), "plane0.scales": torch.tensor([[2.]]),
         "shift": torch.tensor([[3.]])},
        [[5, 1]]),
    # Levels 1.5 +- 1 +- 0.5: plane 1 has the scale of plane 0 halved, and stores none.
    "grid": (
        Scheme(method="grid", planes=2, center="shift"), [[0, 1, 2, 3]],
        {"plane0.signs": byte([12]), "plane0.scales": half([1]), "plane1.signs": byte([10]),
         "shift": half([1.5])},
        [[0, 1, 2, 3]]),
    # 50 and -50 are salient: scales (50 + 1) / 255 = 0.2, in float16 0.199951171875; zeros
    # round(1 / 0.2) and round(50 / 0.2); values 250 + 5 and -250 + 250, row-major, one part. The
    # sign bits of salient entries are 0.
    "salient": (
        Scheme(method="salient", salient=.25), [[50, 1, -1, 1], [-1, 1, -50, 1]],
        {"plane0.signs": byte([10], [10]), "plane0.scales": half([1], [1]),
         "salient.mask": byte([1], [4]), "salient.values": byte([255, 0]),
         "salient.scales": half(.2, .2), "salient.zeros": byte(5, 250)},
        [[49.98779296875, 1, -1, 1], [-1, 1, -49.98779296875, 1]]),
    "salient columns": (
        Scheme(method="salient", salient=.25, salient_layout="columns"),
        [[1, 50, -1, 1], [-1, -50, 1, 1]],
        {"plane0.signs": byte([9], [12]), "plane0.scales": half([1], [1]),
         "salient.columns": torch.tensor([[1]], dtype=torch.int32),
         "salient.values": byte([255], [0]), "salient.scales": half(.2, .2),
         "salient.zeros": byte(5, 250)},
        [[1, 49.98779296875, -1, 1], [-1, -49.98779296875, 1, 1]]),
}
HALVES = {0.25: "0034", 1: "003c", 1.5: "003e", 2: "0040", 0.2: "6632"}


def packed(scheme, dense):
    encoded = encode(torch.tensor(dense, dtype=torch.float32), scheme)
    shape = (len(dense), len(dense[0]))
    return from_encoded(encoded.tensors, shape, encoded.group_size, scheme.plane_ratio,
                        torch.float32)


@pytest.mark.parametrize("name", GOLDEN)
def test_bytes(name):
    scheme, dense, expected, values = GOLDEN[name]
    weight = packed(scheme, dense)
    tensors = {n: t.detach() for n, t in weight.named_tensors()}
    assert list(tensors) == list(expected)
    for tensor, want in expected.items():
        assert tensors[tensor].dtype == want.dtype and torch.equal(tensors[tensor], want), tensor
    assert weight.dequantize().tolist() == values


def test_bytes_of_a_file(tmp_path):
    """What lies on disk: names after the dense one's, rows one behind the other, little-endian."""
    scheme, dense, _, _ = GOLDEN["binary"]
    model = nn.ModuleDict({"up": PackedLinear(packed(scheme, dense), None)})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        found = {name: (file.get_slice(name).get_dtype(), file.get_tensor(name).tobytes().hex())
                 for name in file.keys()}
    assert found == {
        "up.weight.plane0.signs": ("U8", "35018e01"),
        "up.weight.plane0.scales": ("F16", "".join(HALVES[v] for v in (1, 2, 2, .25)))}


def test_the_version():
    assert BitlmConfig().to_dict()["format_version"] == 1


# --- GGUF Q1_0: blocks of 128, fp16 d, then 16 bytes of sign bits, lowest bit first ---------------

def q1_0_encode(weight: np.ndarray) -> bytes:
    """Encode [N, K] as llama-quantize does: d = mean |w| of the block, bit 1 = +d."""
    blocks = []
    for block in weight.reshape(-1, 128):
        signs = sum(1 << e for e, value in enumerate(block) if value >= 0)
        blocks.append(np.float16(np.abs(block.astype(np.float64)).mean()).tobytes()
                      + signs.to_bytes(16, "little"))
    return b"".join(blocks)


def q1_0_decode(data: bytes, rows: int) -> np.ndarray:
    values = []
    for start in range(0, len(data), 18):
        d = np.frombuffer(data[start:start + 2], "<f2")[0]
        for e in range(128):
            bit = data[start + 2 + e // 8] >> (e % 8) & 1
            values.append(d if bit else -d)
    return np.array(values, dtype=np.float32).reshape(rows, -1)


def q1_0_from_planes(signs: np.ndarray, scales: np.ndarray) -> bytes:
    """Only move bytes: a scale before its 16 sign bytes, repeated where a group is longer."""
    rows, width = signs.shape
    blocks = width // 16
    d = np.repeat(scales, blocks // scales.shape[1], axis=1).reshape(rows, blocks, 1)
    return np.concatenate([d.view(np.uint8), signs.reshape(rows, blocks, 16)], axis=2).tobytes()


def test_q1_0_vector():
    alternating = np.tile([0.5, -0.5], 64)[None].astype(np.float32)
    data = bytes.fromhex("0038" + "55" * 16)
    assert q1_0_encode(alternating) == data
    assert (q1_0_decode(data, 1) == alternating).all()
    weight = packed(Scheme(), alternating.tolist())
    assert q1_0_from_planes(weight.plane0.signs.numpy(), weight.plane0.scales.numpy()) == data


@pytest.mark.parametrize("columns, group_size", [(128, 128), (384, 128), (512, 256), (256, "row"),
                                                 (256, "tensor")])
def test_binary_layers_are_q1_0_blocks(columns, group_size):
    weight = packed(Scheme(group_size=group_size), torch.randn(5, columns).tolist())
    data = q1_0_from_planes(weight.plane0.signs.numpy(), weight.plane0.scales.numpy())
    dense = weight.dequantize().numpy()
    assert len(data) == 5 * columns // 128 * 18
    assert data == q1_0_encode(dense)
    assert (q1_0_decode(data, 5) == dense).all()
