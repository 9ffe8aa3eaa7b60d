"""`PackedWeight` answers like the dense weight, keeps its stored dtypes, stacks and moves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from bitlm.methods import encode
from bitlm.ops.form import TABLE, Form
from bitlm.scheme import Scheme
from bitlm.weight import PackedWeight, Term, from_encoded, stack_experts
from tests.ops import plain
from tests.weights import random_weight

ALL = ("zones", "columns", "shift", "input_scales", "chain", "low_rank", "salient.mask")


def make(*args, dtype=torch.float32, **kwargs):
    form, named = plain.example(*args, **kwargs)
    return PackedWeight(named, form, dtype)


def encoded(weight, **scheme):
    scheme = Scheme(**scheme)
    found = encode(weight, scheme)
    return from_encoded(found.tensors, tuple(weight.shape), found.group_size, scheme.plane_ratio,
                        weight.dtype)


def test_it_looks_like_the_dense_weight():
    weight = make(("mask",), rows=5, columns=12, dtype=torch.bfloat16)
    assert weight.shape == (5, 12) == weight.size() and weight.size(-1) == 12
    assert (weight.ndim, weight.dim(), weight.numel()) == (2, 2, 60)
    assert weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    assert weight.requires_grad is False
    assert weight.dequantize().dtype == torch.bfloat16 and weight.T.shape == (12, 5)
    assert make(experts=3, rows=4, columns=9, parts=2).shape == (3, 8, 9)
    assert "plane0.signs" in repr(weight)


def test_torch_functions_and_operators_take_it():
    weight, x = make(("signs",), ("shift",), rows=5, columns=12), torch.randn(3, 12)
    dense = weight.dequantize()
    expected = x @ dense.T
    assert torch.equal(linear(x, weight), expected)
    assert torch.equal(x @ weight.T, expected)
    assert torch.equal(torch.matmul(x, weight.T), expected)
    other = torch.randn(12, 2)
    assert torch.equal(weight @ other, dense @ other)
    assert torch.equal(x[:, :5] @ weight, x[:, :5] @ dense)
    assert torch.equal(torch.nn.functional.embedding(torch.tensor([4, 0]), weight), dense[[4, 0]])
    torch.testing.assert_close(weight(x), expected)
    assert torch.equal(weight(torch.tensor([[4, 0]])), dense[[4, 0]][None])


def test_names_of_the_state_dict_are_those_of_the_table():
    weight = make(("signs", "mask", "trits"), ALL, rows=5, columns=12)
    state = weight.state_dict()
    assert set(state) == set(weight.form.names)
    kinds = {name.replace("0.", ".").replace("1.", ".").replace("2.", ".") for name in state}
    assert kinds <= set(TABLE)
    assert [n for n, _ in weight.named_tensors()] == list(weight.form.names)
    assert all(isinstance(module, Term) for module in weight.children())
    assert weight.nbytes() == sum(t.numel() * t.element_size() for t in state.values())
    empty = {n: torch.zeros_like(t) for n, t in state.items()}
    twin = PackedWeight(empty, weight.form, weight.dtype)
    twin.load_state_dict(state)
    assert torch.equal(twin.dequantize(), weight.dequantize())


@pytest.mark.parametrize("cast", [lambda w: w.to(torch.bfloat16), lambda w: w.bfloat16(),
                                  lambda w: nn.ModuleDict({"w": w}).to(torch.bfloat16)["w"]])
def test_casts_change_the_dtype_it_claims_and_no_tensor(cast):
    weight = make(("mask", "trits"), ALL, rows=5, columns=12)
    before = {n: t.clone() for n, t in weight.state_dict().items()}
    weight = cast(weight)
    assert weight.dtype == weight.dequantize().dtype == torch.bfloat16
    for name, tensor in weight.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    assert weight(torch.randn(2, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_moves_to_meta_and_back():
    weight = make(("mask",), ("shift",), rows=5, columns=12)
    state = weight.state_dict()
    weight = weight.to("meta")
    assert weight.device.type == "meta" and weight.dequantize().is_meta
    weight = weight.to_empty(device="cpu")
    weight.load_state_dict(state)
    assert weight.device.type == "cpu"
    assert weight.state_dict()["shift"].dtype == state["shift"].dtype


def test_deepcopy_is_independent():
    weight = make(("signs",), ("shift",), rows=5, columns=12)
    twin = copy.deepcopy(weight)
    assert twin.form == weight.form and torch.equal(twin.dequantize(), weight.dequantize())
    twin.plane0.signs.data.bitwise_not_()
    assert not torch.equal(twin.dequantize(), weight.dequantize())


def test_nothing_is_trained():
    weight = make(("signs",), ALL, rows=5, columns=12)
    assert not any(p.requires_grad for p in weight.parameters())


def test_given_parameters_are_shared():
    weight = make(("signs",), rows=5, columns=12)
    twin = PackedWeight(dict(weight.named_tensors()), weight.form, weight.dtype)
    assert twin.plane0.signs is weight.plane0.signs


def test_wrong_tensors_are_all_named():
    form, named = plain.example(("mask",), ("shift",), rows=5, columns=12)
    named["plane0.signs"] = named["plane0.signs"][:4]
    del named["shift"]
    with pytest.raises(ValueError, match=r"plane0.signs has shape \[4, 2\], expected \[5, 2\]; "
                                         "shift is missing"):
        PackedWeight(named, form, torch.float32)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(enabled):
    weight, bias = make(("signs",), rows=5, columns=12), torch.randn(5, requires_grad=True)
    x = torch.randn(3, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        y, expected = weight(x, bias), linear(x, weight.dequantize(), bias)
    assert y.dtype == expected.dtype == (torch.bfloat16 if enabled else torch.float32)
    torch.testing.assert_close(y, expected, atol=0.1 if enabled else 1e-5, rtol=0.02)
    y.sum().backward()
    assert x.grad.dtype == bias.grad.dtype == torch.float32


# --- experts -------------------------------------------------------------------------------------

@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("scheme", [
    dict(), dict(method="ternary", trits=True), dict(planes=2, center="shift", group_size=8),
    dict(method="grid", planes=3, center="shift"), dict(method="salient", salient=0.2),
    dict(method="salient", salient=0.2, salient_layout="columns", group_size=8)], ids=str)
def test_stacked_experts(scheme, parts):
    dense = [torch.randn(4, 20) for _ in range(3 * parts)]
    weights = [encoded(matrix, **scheme) for matrix in dense]
    stacked = stack_experts(weights, parts)
    assert stacked.shape == (3, 4 * parts, 20)
    assert (stacked.form.experts, stacked.form.parts) == (3, parts)
    expected = torch.stack([weight.dequantize() for weight in weights]).reshape(3, 4 * parts, 20)
    assert torch.equal(stacked.dequantize(), expected)


def salient(counts):
    """Return a weight of 2 x 9 with the given number of salient entries in each row."""
    mask = torch.tensor([[(1 << min(c, 8)) - 1, c // 9] for c in counts], dtype=torch.uint8)
    tensors = {"plane0.signs": torch.randint(0, 256, (2, 2), dtype=torch.uint8) & torch.tensor(
                   [255, 1], dtype=torch.uint8),
               "plane0.scales": torch.rand(2, 1).half(), "salient.mask": mask,
               "salient.values": torch.randint(1, 256, (1, sum(counts)), dtype=torch.uint8),
               "salient.scales": torch.rand(2), "salient.zeros": torch.tensor([3, 200]).byte()}
    return PackedWeight(tensors, Form(2, 9, tuple(tensors), 9), torch.float32)


def test_ragged_salient_counts_are_padded():
    weights = [salient(counts) for counts in ((0, 3), (9, 2), (0, 0), (1, 1))]
    for parts in (1, 2):
        stacked = stack_experts(weights, parts)
        assert stacked.salient.values.shape == (4 // parts, parts, 11)
        expected = torch.stack([w.dequantize() for w in weights])
        assert torch.equal(stacked.dequantize(), expected.reshape(stacked.shape))


def test_no_salient_entry_at_all():
    weights = [salient((0, 0)), salient((0, 0))]
    stacked = stack_experts(weights)
    assert stacked.salient.values.shape == (2, 1, 0)
    assert torch.equal(stacked.dequantize(), torch.stack([w.dequantize() for w in weights]))


def test_one_expert_that_needs_float32_scales_makes_all_float32():
    weights = [encoded(torch.randn(4, 20)), encoded(torch.randn(4, 20) * 1e6)]
    assert [w.plane0.scales.dtype for w in weights] == [torch.float16, torch.float32]
    for order in (weights, weights[::-1]):
        stacked = stack_experts(order)
        assert stacked.plane0.scales.dtype == torch.float32
        assert torch.equal(stacked.dequantize(), torch.stack([w.dequantize() for w in order]))
    both = stack_experts(weights, 2)
    assert both.plane0.scales.dtype == torch.float32 and both.plane0.scales.shape == (1, 8, 1)


def test_stacking_keeps_planes_of_different_dtypes_apart():
    weight = make(("signs", "signs"), ("shift",), rows=3, columns=12)
    dtypes = {n: t.dtype for n, t in weight.named_tensors()}
    assert {n: t.dtype for n, t in stack_experts([weight, weight]).named_tensors()} == dtypes


def test_a_weight_on_meta_is_refused():
    form, tensors = random_weight(8, 32, 32, ("binary",))
    weight = PackedWeight(dict(zip(form.names, tensors)), form, torch.float32).to("meta")
    for x in (torch.ones(2, 32), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="is on meta"):
            weight(x)


def test_forward_mode_gradients():
    form, tensors = random_weight(8, 32, 32, ("binary",))
    weight = PackedWeight(dict(zip(form.names, tensors)), form, torch.float32)
    x, tangent = torch.randn(2, 32), torch.randn(2, 32)
    _, moved = torch.func.jvp(weight, (x,), (tangent,))
    assert torch.allclose(moved, tangent @ weight.dequantize().T, atol=1e-5)


def test_a_weight_without_columns():
    form = Form(3, 0, ("plane0.signs", "plane0.scales"), 32)
    weight = PackedWeight({"plane0.signs": torch.zeros(3, 0, dtype=torch.uint8),
                           "plane0.scales": torch.zeros(3, 0)}, form, torch.float32)
    with torch.no_grad():
        assert torch.equal(weight(torch.zeros(2, 0), torch.ones(3)), torch.ones(2, 3))
