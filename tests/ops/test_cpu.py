"""`torch.ops.bitlm.packed_linear` on the CPU: what goes native, shapes, threads and forks."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

import pytest
import torch

from bitlm.ops import cpu, library, packed_linear, reference
from bitlm.ops.form import Form
from tests.weights import random_weight

native = pytest.mark.skipif(library.load().library is None, reason=str(library.load().reason))

# Large enough for several threads.
BIG = dict(rows=2048, columns=2048, group=128, kinds=("binary",))


def names(form: Form, *more: str) -> Form:
    return replace(form, names=(*form.names, *more))


@native
def test_unsupported_says_why():
    form, _ = random_weight(8, 64, 32, ("binary",))
    assert cpu.unsupported(form, torch.float32) is None
    assert cpu.unsupported(form, torch.float64) == "float64 inputs have no kernel"
    salient = names(form, "salient.mask", "salient.values", "salient.scales", "salient.zeros")
    assert cpu.unsupported(salient, torch.float32) == "salient entries have no kernel yet"
    assert cpu.unsupported(names(form, "low_rank.u", "low_rank.v"), torch.float32) == \
        "low-rank terms have no kernel yet"
    assert cpu.unsupported(replace(form, experts=4), torch.float32) == "experts have no kernel yet"
    nine, _ = random_weight(8, 64, 32, ("binary",) * 9)
    assert cpu.unsupported(nine, torch.float32) == "9 planes have no kernel, 1 to 8 have"


@native
def test_fused_parts_are_native():
    form, tensors = random_weight(8, 64, 32, ("ternary",))
    fused = replace(form, parts=2)
    assert cpu.unsupported(fused, torch.float32) is None
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


def test_uncovered_forms_take_the_reference():
    form, tensors = random_weight(8, 64, 32, ("binary",))
    form = names(form, "low_rank.u", "low_rank.v")
    tensors = [*tensors, torch.randn(8, 2), torch.randn(1, 2, 64)]
    x = torch.randn(3, 64)
    assert torch.equal(packed_linear(x, tensors, form.text),
                       reference.packed_linear(x, tensors, form.text))
    double = x.double()
    assert torch.equal(packed_linear(double, tensors, form.text),
                       reference.packed_linear(double, tensors, form.text))


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
    with pytest.raises(RuntimeError, match="the input has 63 features, the weight 64"):
        packed_linear(x[:, :63], tensors, form.text)
    with pytest.raises(RuntimeError, match=r"plane0.signs is torch.uint8 \[7, 8\]"):
        packed_linear(x, [tensors[0][:7], tensors[1]], form.text)
    with pytest.raises(RuntimeError, match="plane0.scales is torch.float64"):
        packed_linear(x, [tensors[0], tensors[1].double()], form.text)
    with pytest.raises(RuntimeError, match=r"the bias has shape \[7\]"):
        packed_linear(x, tensors, form.text, torch.zeros(7))


def test_gradients_flow():
    form, tensors = random_weight(12, 40, 8, ("ternary",), shift=True, scales=torch.float32)
    x = torch.randn(3, 40, requires_grad=True)
    bias = torch.randn(12, requires_grad=True)
    packed_linear(x, tensors, form.text, bias).sum().backward()
    dense = reference.dequantize(tensors, form.text, torch.float32)
    assert torch.allclose(x.grad, dense.sum(0).expand(3, 40), atol=1e-4)
    assert torch.equal(bias.grad, torch.full((12,), 3.0))


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
