"""The ops on the CPU: what goes native, shapes, the cached prepared weights, threads and forks."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch

from bitlm.ops import cache, cpu, library, packed_embedding, packed_linear, reference
from bitlm.ops.structs import DWORDS
from tests.ops import plain
from tests.ops.test_reference import TERMS
from tests.weights import random_weight

native = pytest.mark.skipif(library.load().library is None, reason=str(library.load().reason))

# Large enough for several threads.
BIG = dict(rows=2048, columns=2048, group=128, kinds=("binary",))


@native
def test_unsupported_says_why():
    form, _ = random_weight(8, 64, 32, ("binary",))
    assert cpu.unsupported(form, torch.float32) is None
    assert cpu.unsupported(form, torch.bfloat16) is None
    assert cpu.unsupported(form, torch.float64) == "float64 inputs have no kernel"


@native
def test_fused_parts_are_native():
    form, tensors = random_weight(8, 64, 32, ("ternary",))
    fused = replace(form, parts=2)
    x = torch.randn(3, 64)
    assert torch.allclose(packed_linear(x, tensors, fused.text),
                          reference.packed_linear(x, tensors, fused.text), atol=1e-4)


def test_describe_names_the_library_or_the_reason():
    about = cpu.describe()
    assert (about["library"] is None) == (about["reason"] is not None)
    assert about["instruction_set"] in (None, *library.INSTRUCTION_SETS)


def test_a_missing_library_has_a_reason():
    loaded = library.load("bitlm_nothing")
    assert loaded.library is None and "C++17 compiler" in loaded.reason


def test_float64_takes_the_reference():
    form, tensors = random_weight(8, 64, 32, ("binary",))
    x = torch.randn(3, 64, dtype=torch.float64)
    assert torch.equal(packed_linear(x, tensors, form.text),
                       reference.packed_linear(x, tensors, form.text))


def test_shapes_and_strides():
    form, tensors = random_weight(70, 96, 32, ("binary",))
    inputs = {
        "vector": torch.randn(96),
        "three axes": torch.randn(2, 3, 96),
        "transposed": torch.randn(96, 5).t(),
        "every second": torch.randn(4, 192)[:, ::2],
        "expanded": torch.randn(1, 96).expand(5, 96),
        "empty": torch.randn(0, 96),
        "empty inner": torch.randn(2, 0, 96),
    }
    for what, x in inputs.items():
        y = packed_linear(x, tensors, form.text)
        expected = reference.packed_linear(x, tensors, form.text)
        assert y.shape == expected.shape, what
        assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4), what


@native
def test_strided_weights():
    form, tensors = random_weight(70, 96, 32, ("binary",))
    strided = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in tensors]
    x = torch.randn(3, 96)
    assert torch.equal(packed_linear(x, strided, form.text), packed_linear(x, tensors, form.text))


@native
def test_wrong_tensors_are_refused():
    form, tensors = random_weight(8, 64, 32, ("binary",))
    x = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="the input has 63 features"):
        packed_linear(x[:, :63], tensors, form.text)
    with pytest.raises(RuntimeError, match=r"plane0.signs has shape \[7, 8\], expected"):
        packed_linear(x, [tensors[0][:7], tensors[1]], form.text)
    with pytest.raises(RuntimeError, match="plane0.scales is float64"):
        packed_linear(x, [tensors[0], tensors[1].double()], form.text)
    with pytest.raises(RuntimeError, match=r"the bias has shape \[7\]"):
        packed_linear(x, tensors, form.text, torch.zeros(7))
    with pytest.raises(RuntimeError, match="a weight of 3 experts needs 3 offsets"):
        form, named = plain.example(("signs",), rows=4, columns=10, experts=3)
        packed_linear(x[:, :10], list(named.values()), form.text, None, torch.tensor([1, 2]))


def test_gradients_flow():
    form, tensors = random_weight(12, 40, 8, ("ternary",), shift=True, scales=torch.float32)
    x = torch.randn(3, 40, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    packed_linear(x, tensors, form.text, bias).sum().backward()
    dense = reference.dequantize(tensors, form.text, torch.float32)
    assert torch.allclose(x.grad, dense.sum(0).expand(3, 40), atol=1e-4)
    assert torch.equal(bias.grad, torch.full((12,), 3.0))


@native
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets", [[2, 5, 9], [0, 0, 9], [3, 3, 6], [0, 0, 0]], ids=str)
def test_experts(offsets, index):
    form, named = plain.example(("mask",), ("shift", "salient.mask"), rows=3, columns=10, parts=2,
                                experts=3)
    x, bias, ends = torch.randn(9, 10), torch.randn(3, 6), torch.tensor(offsets, dtype=index)
    for own in (None, bias, bias.double()):
        y = packed_linear(x, list(named.values()), form.text, own, ends)
        expected = plain.linear(form, plain.dense(form, named), x, own, offsets)
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
def test_embedding(terms, dtype):
    form, named = plain.example(("mask", "signs"), terms, rows=70, columns=40)
    tensors = list(named.values())
    ids = torch.tensor([[0, 69, 5], [5, 64, 63]])
    rows = packed_embedding(ids, tensors, form.text, dtype)
    assert rows.shape == (2, 3, 40) and rows.dtype == dtype
    exact = reference.dequantize(tensors, form.text, torch.float64)[ids]
    rounding = torch.finfo(dtype).eps * 0.51
    assert ((rows.double() - exact).abs() <= exact.abs() * rounding + 1e-5).all()
    assert packed_embedding(ids[:0], tensors, form.text, dtype).shape == (0, 3, 40)


@native
@pytest.mark.parametrize("ids", [[70], [-1], [3, 1 << 40]])
def test_ids_outside_of_the_embedding(ids):
    form, tensors = random_weight(70, 40, 8, ("binary",))
    with pytest.raises(IndexError, match="the embedding has 70 rows"):
        packed_embedding(torch.tensor(ids), tensors, form.text, torch.float32)


# --- the prepared weight -------------------------------------------------------------------------


def found(form, tensors):
    return cache.prepared(form.text, tensors)


@native
def test_a_weight_is_prepared_once():
    form, tensors = random_weight(70, 96, 32, ("binary",))
    first = found(form, tensors)
    assert found(form, tensors) is first
    assert found(form, [tensor.detach() for tensor in tensors]) is first  # as compiled graphs do
    with torch.inference_mode():
        assert found(form, tensors) is first


@native
@pytest.mark.parametrize("which", [0, 1])
def test_changed_tensors_are_prepared_again(which):
    form, tensors = random_weight(70, 96, 32, ("binary",))
    x = torch.randn(2, 96)
    for _ in range(2):
        packed_linear(x, tensors, form.text)
        tensors[which].copy_(tensors[which].flip(0))
        expected = reference.packed_linear(x, tensors, form.text)
        assert torch.allclose(packed_linear(x, tensors, form.text), expected, atol=1e-4)
    other = [tensors[0], tensors[1] * 2]
    assert torch.allclose(packed_linear(x, other, form.text), 2 * expected, atol=1e-4)
    halves = replace(form, group_size=33, names=form.names)
    assert torch.allclose(packed_linear(x, tensors, halves.text),
                          reference.packed_linear(x, tensors, halves.text), atol=1e-4)


@native
def test_the_prepared_weight_goes_with_its_tensors():
    gc.collect()
    form, tensors = random_weight(70, 96, 32, ("binary",))
    known, blob = len(cache._known), weakref.ref(found(form, tensors))
    assert len(cache._known) == known + 1
    del tensors
    gc.collect()
    assert blob() is None and len(cache._known) == known


@native
def test_another_instruction_set_prepares_again():
    if library.native().bitlm_cpu_order() != DWORDS:
        pytest.skip("this machine has one order of codes")
    form, tensors = random_weight(70, 96, 32, ("ternary",), shift=True)
    x = torch.randn(2, 96)
    first = found(form, tensors)
    try:
        library.limit_instruction_set("scalar")
        for op in (torch.ops.bitlm.prepared_linear, cpu.prepared_linear):
            with pytest.raises(RuntimeError, match="prepare it again"):
                op(x, first.blob, 70)
        y = packed_linear(x, tensors, form.text)
        assert found(form, tensors) is not first
        assert torch.allclose(y, reference.packed_linear(x, tensors, form.text), atol=1e-4)
    finally:
        library.limit_instruction_set(None)


@native
def test_the_op_for_prepared_weights():
    form, tensors = random_weight(70, 96, 32, ("ternary",), shift=True)
    blob, x, bias = found(form, tensors).blob, torch.randn(2, 3, 96), torch.randn(70)
    op = torch.ops.bitlm.prepared_linear
    assert torch.equal(op(x, blob, 70, bias), packed_linear(x, tensors, form.text, bias))
    assert torch.equal(op(x, blob, 70, bias, None, None, 2),
                       packed_linear(x, tensors, form.text, bias, None, "int8"))
    for name in ("test_schema", "test_faketensor"):
        torch.library.opcheck(op.default, (x, blob, 70, bias), test_utils=name)
    wrong = {"the input has 95 features": (x[..., 1:], blob, 70), "71 are asked for": (x, blob, 71),
             "takes float32, float16": (x.double(), blob, 70)}
    for message, arguments in wrong.items():
        for own in (op, cpu.prepared_linear):
            with pytest.raises(RuntimeError, match=message):
                own(*arguments)
    for own in (op, cpu.prepared_linear):
        with pytest.raises(RuntimeError, match=r"the bias has shape \[69\], expected \[70\]"):
            own(x, blob, 70, bias[:69])


@native
def test_calls_from_many_threads_agree():
    form, tensors = random_weight(**BIG)
    xs = [torch.randn(1 + i, 2048) for i in range(6)]
    expected = [packed_linear(x, tensors, form.text) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(packed_linear(xs[i], tensors, form.text), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong


def _wait(child: int, seconds: float = 30) -> int:
    """Return the exit status of a child, or kill it when it hangs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the forked child hangs")


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_forked_children_compute_on_their_own_threads():
    form, tensors = random_weight(**BIG)
    x = torch.randn(2, 2048)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            packed_linear(x, tensors, form.text)

    busy = threading.Thread(target=keep_busy)
    try:
        expected = packed_linear(x, tensors, form.text)
        busy.start()
        for _ in range(5):
            child = os.fork()
            if child == 0:
                try:
                    y = packed_linear(x, tensors, form.text)
                    os._exit(0 if torch.equal(y, expected) else 3)
                finally:
                    os._exit(4)
            assert _wait(child) == 0
    finally:
        stop.set()
        busy.join(30)
        torch.set_num_threads(before)
