"""Packed weights on the CPU: prepared when first used, stored tensors released and brought back."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from bitlm.hf import BitlmConfig
from bitlm.modules import PackedEmbedding, PackedLinear, packed_weights
from bitlm.ops import cache, library, stored
from bitlm.ops.structs import DWORDS
from bitlm.weight import PackedWeight
from tests import zoo
from tests.ops import plain

pytestmark = [
    pytest.mark.skipif(library.load().library is None, reason=str(library.load().reason)),
    pytest.mark.skipif(sys.platform != "linux", reason="releasing needs /proc"),
    pytest.mark.skipif(not stored.RELEASES, reason="this torch keeps the stored tensors"),
]


def make(kinds=("mask",), terms=("shift",), rows=70, columns=40, **more) -> PackedWeight:
    """Return a weight that nobody else holds a tensor of."""
    form, named = plain.example(kinds, terms, rows, columns, **more)
    return PackedWeight(named, form, torch.float32)


def used(*args, **more):
    """Return a weight after its first call, what it held before, an input and the output."""
    weight = make(*args, **more)
    before = {name: tensor.clone() for name, tensor in weight.state_dict().items()}
    x = torch.randn(3, weight.form.columns)
    return weight, before, x, weight(x)


def away(weight: nn.Module) -> bool:
    return weight._stored is not None and weight._stored.away


def same(one: dict, other: dict) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)


# --- releasing -----------------------------------------------------------------------------------


def test_the_first_call_releases_and_later_ones_agree():
    weight = make()
    x, dense = torch.randn(3, 40), weight.dequantize()
    memory = [weakref.ref(tensor) for _, tensor in weight.named_tensors()]
    y = weight(x)
    assert away(weight) and not any(ref() is not None for ref in memory)
    torch.testing.assert_close(y, linear(x, dense))
    assert torch.equal(weight(x), y) and away(weight)


@pytest.mark.parametrize("kinds", [("signs",), ("mask", "trits"), ("signs",) * 4])
@pytest.mark.parametrize("terms", [(), ("shift",), ("columns",), ("input_scales",), ("chain",),
                                   ("zones",), ("salient.mask",), ("salient.columns",)],
                         ids="+".join)
def test_the_state_is_the_same_after_it(kinds, terms):
    for more in ({}, dict(parts=2), dict(plane_ratio=2)):
        weight, before, _, _ = used(kinds, terms, **more)
        assert away(weight) or "salient.mask" in terms or "zones" in terms
        assert same(weight.state_dict(), before) and not away(weight)


ASK = {
    "parameters": lambda w: list(w.parameters()),
    "parameters of a parent": lambda w: list(nn.ModuleDict({"w": w}).parameters()),
    "state_dict": lambda w: w.state_dict(),
    "named_tensors": lambda w: list(w.named_tensors()),
    "tensors": lambda w: w.tensors(),
    "attribute": lambda w: w.plane0.signs,
    "own attribute": lambda w: w.shift,
    "get_parameter": lambda w: w.get_parameter("plane0.scales"),
    "_parameters": lambda w: w.plane0._parameters["signs"],
    "term": lambda w: w.plane0(),
    "clone": lambda w: w.to(torch.bfloat16),
}


@pytest.mark.parametrize("ask", ASK)
def test_whoever_asks_gets_them(ask):
    weight, before, x, y = used()
    assert away(weight)
    ASK[ask](weight)
    assert not away(weight) and same(weight.state_dict(), before)
    assert all(not t.is_meta and not t.requires_grad for t in weight.parameters())
    assert torch.equal(weight(x), y)


def test_looking_on_does_not_bring_them_back():
    weight, before, x, _ = used()
    size = sum(t.numel() * t.element_size() for t in before.values())
    assert weight.device.type == "cpu" and weight.nbytes() == size and weight.shape == (70, 40)
    twin = PackedWeight(before, weight.form, torch.float32)
    assert torch.equal(weight.dequantize(), twin.dequantize())
    assert repr(weight) and weight.dtype == torch.float32
    assert away(weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w)),
                                    copy.copy], ids=["deepcopy", "pickle", "copy"])
def test_copies(copied):
    weight, before, x, y = used()
    twin = copied(weight)
    assert twin._stored is None and same(twin.state_dict(), before)
    assert torch.equal(twin(x), y) and torch.equal(weight(x), y)
    if copied is copy.deepcopy:
        twin.plane0.scales.mul_(2)
        twin.shift.mul_(2)
        torch.testing.assert_close(twin(x), 2 * y)
        assert torch.equal(weight(x), y)


def test_marks_on_the_parameters_stay():
    weight = make()
    for name in weight.form.names:
        weight.get_parameter(name)._is_hf_initialized = True
    weight(torch.randn(1, 40))
    assert away(weight)
    assert all(p._is_hf_initialized for p in weight.parameters())


def test_what_others_hold_is_not_released():
    for hold in (lambda w: w.plane0.signs, lambda w: w.plane0.signs.detach(),
                 lambda w: w.state_dict(), lambda w: w.plane0.signs.untyped_storage(),
                 lambda w: w.plane0.signs[3:5], lambda w: w.plane0.signs.numpy()):
        weight = make()
        held = hold(weight)
        weight(torch.randn(1, 40))
        assert not away(weight), held
        del held


def test_bits_without_a_meaning_are_kept():
    weight = make(columns=21)
    weight.plane0.signs[0, -1] |= 128
    state = {name: tensor.clone() for name, tensor in weight.state_dict().items()}
    weight(torch.randn(1, 21))
    assert not away(weight) and same(weight.state_dict(), state)


def test_not_again_and_again():
    weight, _, x, _ = used()
    for _ in range(stored.MOST_RELEASES - 1):
        list(weight.parameters())
        weight(x)
        assert away(weight)
    list(weight.parameters())
    weight(x)
    assert not away(weight)


def test_a_weight_in_shared_memory_stays():
    weight = make()
    weight.share_memory()
    weight(torch.randn(1, 40))
    assert not away(weight) and all(t.is_shared() for t in weight.parameters())


# --- what changes it -----------------------------------------------------------------------------


def test_a_loaded_state_is_used():
    weight, before, x, y = used()
    doubled = {n: t * 2 if t.is_floating_point() else t for n, t in before.items()}
    for assign in (False, True):
        weight.load_state_dict(doubled, assign=assign)
        torch.testing.assert_close(weight(x), 2 * y)
        weight.load_state_dict(before, assign=assign)
        torch.testing.assert_close(weight(x), y)


def test_changes_in_place_are_seen():
    weight, _, x, y = used()
    with torch.no_grad():
        weight.plane0.scales.mul_(3)
        weight.shift.mul_(3)
    torch.testing.assert_close(weight(x), 3 * y)
    weight.plane0.scales = nn.Parameter(weight.plane0.scales / 3, requires_grad=False)
    weight.shift = nn.Parameter(weight.shift / 3, requires_grad=False)
    torch.testing.assert_close(weight(x), y)
    for parameter in (weight.plane0.scales, weight.shift):
        parameter.data = parameter.data * 2
    torch.testing.assert_close(weight(x), 2 * y)


def test_moving_away_drops_the_prepared_weight():
    weight, before, x, y = used()
    blob = weakref.ref(weight._stored._kept)
    weight.to("meta")
    gc.collect()
    assert blob() is None and all(t.is_meta for t in weight.parameters())
    weight.to_empty(device="cpu").load_state_dict(before)
    assert torch.equal(weight(x), y)


def test_a_weight_that_goes_takes_all_with_it():
    gc.collect()
    known = len(cache._known)
    weight, _, _, _ = used()
    blob = weakref.ref(weight._stored._kept)
    del weight
    gc.collect()
    assert blob() is None and len(cache._known) == known


def test_tied_weights_share_it():
    weight = make(("signs",), ())
    twin = PackedWeight(dict(weight.named_tensors()), weight.form, torch.float32)
    x = torch.randn(2, 40)
    assert torch.equal(weight(x), twin(x))
    assert not away(weight) and not away(twin)
    assert weight._stored._entry() is twin._stored._entry()
    table = PackedEmbedding(twin)
    known = len(cache._known)
    assert torch.equal(table(torch.tensor([3, 0])), weight.dequantize()[[3, 0]])
    assert len(cache._known) == known


def test_another_instruction_set():
    if library.native().bitlm_cpu_order() != DWORDS:
        pytest.skip("this machine has one order of codes")
    weight, before, x, y = used()
    assert away(weight)
    try:
        library.limit_instruction_set("scalar")
        for _ in range(3):
            torch.testing.assert_close(weight(x), y)
    finally:
        library.limit_instruction_set(None)
    torch.testing.assert_close(weight(x), y)
    assert same(weight.state_dict(), before)


# --- ways to call it -----------------------------------------------------------------------------


def test_gradients_after_a_release():
    weight, _, x, y = used()
    layer = PackedLinear(weight, torch.randn(70))
    assert away(weight)
    batch = x.clone().requires_grad_()
    layer(batch).sum().backward()
    torch.testing.assert_close(batch.grad, weight.dequantize().sum(0).expand(3, 40))
    assert layer.bias.grad is not None and not layer(batch).isnan().any()


def test_first_used_in_inference_mode():
    weight = make()
    with torch.inference_mode():
        x = torch.randn(3, 40)
        y = weight(x)
        assert torch.equal(y, weight(x)) and away(weight)
        list(weight.parameters())
    assert not any(t.is_inference() for t in weight.parameters())
    batch = x.clone().requires_grad_()
    weight(batch).sum().backward()
    torch.testing.assert_close(weight(x.clone()), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    weight, _, x, y = used()
    bias = torch.randn(70, dtype=dtype)
    result = weight(x.to(dtype), bias)
    assert result.dtype == dtype
    tolerance = dict(atol=0.2, rtol=0.05) if dtype.itemsize == 2 else dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(result, (y + bias).to(dtype), **tolerance)


@pytest.mark.parametrize("mode", ["float", "int16", "int8", "uint1"])
def test_activation_modes(mode):
    weight, _, x, _ = used(("signs",), ())
    weight.activation = mode
    twin = copy.deepcopy(weight)
    assert twin.activation == mode
    native = weight(x)
    slow = weight(x.double()).float()
    torch.testing.assert_close(native, slow, atol=1e-2, rtol=1e-2)
    batch = x.clone().requires_grad_()
    torch.testing.assert_close(twin(batch), native)  # the op with gradients has the mode too


def test_transforms_and_modes_see_an_op():
    weight, _, x, y = used(("signs",), ())
    with torch.profiler.profile() as profile:
        weight(x)
    assert "bitlm::prepared_linear" in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(torch.vmap(weight)(x.unsqueeze(1)).squeeze(1), y)


def test_threads_that_begin_together():
    weight = make(rows=700, columns=520)
    x = torch.randn(4, 520)
    expected = linear(x, weight.dequantize())
    start, wrong = threading.Barrier(6), []

    def work(number: int) -> None:
        start.wait(30)
        for turn in range(10):
            if turn % 3 == 2 and number % 2:
                weight.state_dict()
            if not torch.allclose(weight(x), expected, atol=1e-2):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


# --- compiled and exported -----------------------------------------------------------------------


def like(weight) -> int:
    """Return how many weights of this form are prepared: others come and go meanwhile."""
    return sum(entry.form == weight.form for entry in list(cache._known.values()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reset", [False, True])
def test_compile_after_a_release(backend, reset):
    torch._dynamo.reset()
    gc.collect()
    weight, before, x, y = used()
    layer = PackedLinear(weight, nn.Parameter(torch.randn(70), requires_grad=False))
    expected = layer(x)
    assert away(weight)
    if reset:
        torch._dynamo.reset()  # drops all callbacks, too
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        known = like(weight)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected)
        assert 1 <= like(weight) <= known + 1
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(compiled(x), expected)
    batch = x.clone().requires_grad_()
    compiled(batch).sum().backward()
    torch.testing.assert_close(batch.grad, weight.dequantize().sum(0).expand(3, 40))
    assert same(weight.state_dict(), before)


@pytest.mark.parametrize("strict", [False, True])
def test_export_after_a_release(strict):
    torch._dynamo.reset()
    weight, before, x, y = used()
    layer = PackedLinear(weight, nn.Parameter(torch.randn(70), requires_grad=False))
    expected = layer(x)
    assert away(weight)
    program = torch.export.export(layer, (x,), strict=strict)
    calls = [node for node in program.graph.nodes if "bitlm.packed_linear" in str(node.target)]
    assert len(calls) == 1  # with the stored tensors: they are the same on every machine
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(layer(x), expected)
    state = {n: program.state_dict[f"weight.{n}"] for n in before}
    assert same(state, before)


# --- models --------------------------------------------------------------------------------------


def released(model) -> dict[str, bool]:
    return {name: away(weight) for name, weight in packed_weights(model).items()}


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert"])
def test_models_packed_in_memory(name, tmp_path):
    model = zoo.pack(zoo.make(name), BitlmConfig("ternary"))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    expected = zoo.output(model, name)
    assert all(released(model).values())
    model.save_pretrained(tmp_path)
    loaded = zoo.auto_class(name).from_pretrained(tmp_path)
    assert same(dict(sorted(loaded.state_dict().items())), dict(sorted(before.items())))
    torch.testing.assert_close(zoo.output(loaded, name), expected)
    torch.testing.assert_close(zoo.output(model, name), expected)


def test_mapped_tensors_stay_and_joined_experts_go(tmp_path):
    zoo.pack(zoo.make("mixtral"), BitlmConfig("ternary")).save_pretrained(tmp_path)
    model = zoo.auto_class("mixtral").from_pretrained(tmp_path)
    zoo.output(model, "mixtral")
    for name, gone in released(model).items():
        assert gone == ("experts" in name), name
