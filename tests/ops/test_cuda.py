"""The ops on a GPU: the kernels against the reference in float64, and what torch does around them.

What depends on neither a GPU nor torch.cuda is in tests/native/test_cuda_host.py and runs anywhere.
"""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch import Tensor

from bitlm.ops import (
    cuda,
    cuda_launch,
    cuda_table,
    dequantize,
    library,
    packed_embedding,
    packed_linear,
    reference,
)
from bitlm.ops.structs import ACTIVATIONS
from tests.native.test_kernel import (
    FLOATS,
    PLANES,
    SIZES,
    TOLERANCES,
    cases,
    error,
    example,
    expected,
    prepared,
)
from tests.ops import plain
from tests.ops.test_reference import TERMS
from tests.weights import random_weight

_reason = library.load("bitlm_cuda").reason or (
    None if torch.cuda.is_available() else "there is no GPU that torch can use")
pytestmark = pytest.mark.skipif(_reason is not None, reason=str(_reason))

GPU = "cuda"
DECODE = dict(rows=4096, columns=4096, group=128, kinds=("binary",))


@pytest.fixture(autouse=True)
def nothing_is_handed_back(monkeypatch):
    monkeypatch.setattr(cuda, "handed_back", {})


def native(x: Tensor, tensors: list[Tensor], form, bias=None, offsets=None, *args) -> Tensor:
    """Return the op's result on the GPU, which must be native, on the CPU."""
    def there(t):
        return None if t is None else t.to(GPU)

    poison = torch.full((1 << 22,), float("nan"), device=GPU)  # what outputs are allocated in
    del poison
    y = packed_linear(there(x), [there(t) for t in tensors], form.text, there(bias),
                      there(offsets), *args)
    assert not cuda.handed_back and y.is_cuda
    return y.cpu()


def test_grid():
    for seed, case in enumerate(cases(140, seed=3)):
        form, tensors, x, bias, exact = prepared(seed, case)
        y = native(x, tensors, form, bias)
        few = form.rows < 16
        assert error(y.view(1, -1) if few else y, exact.view(1, -1) if few else exact) < 1e-5, case


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_term(activation: str):
    for seed in range(len(TERMS) * len(PLANES)):
        form, tensors, x, bias, ends = example(seed)
        if "chain0.left" in form.names and activation in ("int1", "int2"):
            continue  # sums of signs are often 0, where these levels jump
        y = native(x, tensors, form, bias, ends, activation)
        wrong = error(y.view(1, -1), expected(seed, activation).view(1, -1))
        assert wrong < TOLERANCES.get(activation, 1e-5), (form, wrong)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("batch", (1, 2, 4, 8, 16, 65, 200))
def test_layers_of_a_language_model(batch: int, dtype: torch.dtype):
    for rows, columns, group, kinds in ((4096, 4096, 128, ("binary",)),
                                        (1024, 11008, None, ("ternary",)),
                                        (4096, 1024, 64, ("binary",) * 3),
                                        (1000, 4104, 128, ("trits",))):
        form, tensors = random_weight(rows, columns, group, kinds)
        x, bias = torch.randn(batch, columns).to(dtype), torch.randn(rows)
        y = native(x, tensors, form, bias)
        exact = packed_linear(x.float(), tensors, form.text, bias).double()  # 1e-5, on the CPU
        rounding = torch.finfo(dtype).eps * 0.51 + 1e-6
        noise = (3e-5 if dtype == torch.float32 else 3e-4) * exact.norm(dim=-1, keepdim=True)
        if batch >= 96 and dtype != torch.float32 and cuda_launch.wide_cards:
            noise = noise + 4 * torch.finfo(dtype).eps * exact.norm(dim=-1, keepdim=True)
        assert ((y.double() - exact).abs() <= exact.abs() * rounding + noise / rows ** 0.5).all()


@pytest.mark.parametrize("tiles", (1, 2, 4))
def test_products_of_sm_90a(tiles: int, monkeypatch):
    if not cuda_launch.has_wide(torch.cuda.get_device_capability()):
        pytest.skip("this card, or this library, has no products of sm_90a")
    card = torch.device(GPU, torch.cuda.current_device())
    assert cuda.unfit(card) is None and cuda.not_used(card) is None
    settings = cuda_table.Settings(wide_tokens=1, wide_tiles=tiles,
                                   dense_tokens_wide=cuda_table.NEVER)
    monkeypatch.setattr(cuda_launch, "settings_of", lambda device: settings)
    for rows, columns, group, kinds, shift in (
            (4096, 4096, 128, ("binary",), False), (1000, 4096, None, ("ternary",), True),
            (4104, 1088, 64, ("binary", "binary"), True), (70, 64, None, ("ternary",), False)):
        form, tensors = random_weight(rows, columns, group, kinds, shift=shift)
        for batch, dtype in itertools.product((1, 130, 700), (torch.float16, torch.bfloat16)):
            x, bias = torch.randn(batch, columns).to(dtype), torch.randn(rows)
            weight = dequantize(tensors, form.text, torch.float32).to(dtype)
            exact = x.double() @ weight.double().T + bias
            y = native(x, tensors, form, bias)
            rounding = torch.finfo(dtype).eps * 0.51 + 1e-6
            noise = 3e-5 * exact.norm(dim=-1, keepdim=True) / rows ** 0.5
            assert ((y.double() - exact).abs() <= exact.abs() * rounding + noise).all()


def test_products_of_sm_90a_in_a_new_thread():
    # Which has no context of its own yet.
    form, tensors = random_weight(**DECODE)
    x, there = torch.randn(130, 4096, device=GPU).half(), [tensor.to(GPU) for tensor in tensors]
    packed_linear(x, there, form.text)
    found = []
    thread = threading.Thread(target=lambda: found.append(packed_linear(x, there, form.text)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], packed_linear(x, there, form.text))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_very_many_tokens_are_those_of_a_dense_layer(dtype: torch.dtype):
    form, tensors = random_weight(1000, 4104, 128, ("trits",))
    x = torch.randn(1500, 4104).to(dtype)
    y = native(x, tensors, form)
    exact = packed_linear(x.float(), tensors, form.text).double()
    assert (y.double() - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()


def test_tensors_on_another_device_are_refused():
    form, tensors = random_weight(70, 256, 128, ("binary",))
    there = [tensor.to(GPU) for tensor in tensors]
    for x, own in ((torch.randn(3, 256), there), (torch.randn(3, 256, device=GPU), tensors)):
        with pytest.raises(RuntimeError, match="expected all tensors on"):
            packed_linear(x, own, form.text)


def test_a_weight_with_terms_must_be_used_before_a_capture():
    form, named = plain.example(("signs",), ("input_scales",), 24, 128, 64)
    there = [tensor.to(GPU) for tensor in named.values()]
    x = torch.randn(3, 128, device=GPU)
    packed_linear(x, there, form.text)  # the card itself is known then
    fresh = [tensor.clone() for tensor in there]
    with pytest.raises(RuntimeError, match="call the model once before"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            packed_linear(x, fresh, form.text)


def test_tokens_do_not_depend_on_the_batch():
    form, tensors = random_weight(**DECODE)
    x = torch.randn(70, 4096)
    for activation in ("float", "int8"):
        whole = native(x, tensors, form, None, None, activation)
        for token in (0, 7, 69):
            one = native(x[token:token + 1], tensors, form, None, None, activation)
            assert error(one, whole[token:token + 1].double()) < 1e-5


def test_the_same_call_gives_the_same_bits():
    form, tensors = random_weight(**DECODE)
    x = torch.randn(5, 4096)
    results = [native(x, tensors, form) for _ in range(20)]
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_experts():
    form, named = plain.example(("signs",), ("shift",), 48, 256, 128, experts=8)
    tensors, bias = list(named.values()), torch.randn(8, 48)
    for ends in ([0] * 8, [3, 3, 9, 20, 20, 31, 32, 40], [40] * 8, list(range(1, 9))):
        offsets, x = torch.tensor(ends, dtype=torch.int32), torch.randn(40, 256)
        y = native(x, tensors, form, bias, offsets)
        exact = reference.packed_linear(x.double(), tensors, form.text, bias, offsets)
        assert torch.allclose(y.double(), exact, atol=1e-4)


@pytest.mark.parametrize("parts", (1, 2))
def test_experts_with_every_term(parts: int):
    for terms, dtype in itertools.product(TERMS, (torch.float32, torch.float16)):
        form, named = plain.example(("mask", "trits"), terms, 20, 90, 32, 1, parts, 3)
        tensors, bias = list(named.values()), torch.randn(3, form.rows)
        x, offsets = torch.randn(60, 90).to(dtype), torch.tensor([4, 4, 50], dtype=torch.int32)
        for activation in ("float", "int8", "uint2"):
            y = native(x, tensors, form, bias, offsets, activation)
            exact = reference.packed_linear(x.double() if activation == "float" else x.float(),
                                            tensors, form.text, bias, offsets, activation)
            limit = max(TOLERANCES.get(activation, 1e-5), 1e-3 * (dtype == torch.float16))
            assert (y.double() - exact).norm() <= limit * exact.norm(), (terms, activation)
            assert not y[50:].any()


@pytest.mark.parametrize("activation", ("int2", "uint2", "int1", "uint1"))
@pytest.mark.parametrize("rows, columns, group, kinds", [
    (1000, 4096, 128, ("binary",)), (70, 1280, None, ("ternary",)), (33, 768, 256, ("binary",) * 2),
    (65, 640, None, ("ternary", "binary"))])
def test_many_tokens_of_few_levels(rows, columns, group, kinds, activation):
    form, tensors = random_weight(rows, columns, group, kinds, shift=rows % 2 == 0)
    for tokens, dtype in ((16, torch.float32), (77, torch.float32), (600, torch.bfloat16)):
        x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows)
        y = native(x, tensors, form, bias, None, activation, torch.tensor(0.8))
        exact = reference.packed_linear(x.float(), tensors, form.text, bias, None, activation,
                                        torch.tensor(0.8))
        assert error(y, exact.double()) < (1e-5 if dtype == torch.float32 else 8e-3)


def test_rows_and_dense_weights():
    for seed, (terms, codes) in enumerate(itertools.product(TERMS, PLANES)):
        ratio, parts, experts, rows, columns, group = SIZES[seed % len(SIZES)]
        form, named = plain.example(codes, terms, rows, columns, group, ratio, parts, experts)
        tensors = list(named.values())
        there = [tensor.to(GPU) for tensor in tensors]
        for dtype in FLOATS:
            dense = dequantize(there, form.text, dtype).cpu()
            exact = reference.dequantize(tensors, form.text, torch.float64)
            atol = 4 * torch.finfo(dtype).eps * exact.abs().max()
            assert torch.allclose(dense.double(), exact, rtol=0, atol=atol), (terms, codes)
            if parts == 1 and not experts:
                ids = torch.tensor([[0, form.rows - 1], [rows // 2, 0]])
                picked = packed_embedding(ids.to(GPU), there, form.text, dtype).cpu()
                assert torch.allclose(picked.double(), exact[ids], rtol=0, atol=atol)


# --- torch around the kernels --------------------------------------------------------------------


def test_cuda_graphs_replay_with_new_inputs():
    form, tensors = random_weight(**DECODE)
    there = [tensor.to(GPU) for tensor in tensors]
    for batch, activation in itertools.product((1, 5, 40, 100), ("float", "int8", "int1")):
        x = torch.randn(batch, 4096, device=GPU, dtype=torch.float16)
        packed_linear(x, there, form.text, None, None, activation)  # looks at the tensors
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = packed_linear(x, there, form.text, None, None, activation)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(y, packed_linear(x, there, form.text, None, None, activation))


def test_streams():
    form, tensors = random_weight(**DECODE)
    there = [tensor.to(GPU) for tensor in tensors]
    x = torch.randn(3, 4096, device=GPU)
    expected = packed_linear(x, there, form.text)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = x * 2
        y = packed_linear(late, there, form.text)
    stream.synchronize()
    assert torch.allclose(y, expected * 2, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one GPU")
def test_other_devices():
    form, tensors = random_weight(70, 256, 128, ("binary",))
    x = torch.randn(3, 256)
    expected = reference.packed_linear(x, tensors, form.text)
    for device in ("cuda:1", "cuda:0"):
        y = packed_linear(x.to(device), [t.to(device) for t in tensors], form.text)
        assert y.device == torch.device(device)
        assert torch.allclose(y.cpu(), expected, atol=1e-4)


def test_gradients_reach_the_input():
    form, tensors = random_weight(70, 256, 128, ("ternary",), shift=True)
    there = [tensor.to(GPU) for tensor in tensors]
    x = torch.randn(3, 256, device=GPU, requires_grad=True)
    packed_linear(x, there, form.text).square().sum().backward()
    exact = x.detach().cpu().double().requires_grad_()
    reference.packed_linear(exact, tensors, form.text).square().sum().backward()
    assert torch.allclose(x.grad.cpu().double(), exact.grad, rtol=1e-4, atol=1e-2)


def test_compiled_without_breaks():
    form, tensors = random_weight(128, 256, 128, ("binary",))
    there = [tensor.to(GPU) for tensor in tensors]

    @torch.compile(fullgraph=True)
    def layer(x):
        return torch.relu(packed_linear(x, there, form.text))

    x = torch.randn(4, 256, device=GPU)
    assert torch.allclose(layer(x), torch.relu(packed_linear(x, there, form.text)), atol=1e-4)


def test_schema():
    form, tensors = random_weight(70, 256, 128, ("binary",))
    arguments = (torch.randn(3, 256, device=GPU), [t.to(GPU) for t in tensors], form.text)
    torch.library.opcheck(torch.ops.bitlm.packed_linear.default, arguments,
                          test_utils=("test_schema", "test_faketensor"))
