"""The CUDA kernels and their binding on the host: cuda_emulation.h stands for the GPU.

The same sources, launches and Python as on a GPU, on tensors in host memory, against the reference.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitlm.ops import cuda, cuda_launch, cuda_table, cuda_terms, reference
from bitlm.ops.structs import ACTIVATIONS
from tests.native import cuda_host
from tests.native.cuda_host import native
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

pytestmark = pytest.mark.usefixtures("kernels")


def test_grid(kernels):
    for seed, case in enumerate(cases(70, seed=5)):
        kernels.bitlm_cuda_emulate_backwards(seed % 2)
        form, tensors, x, bias, exact = prepared(seed + 1000, case)
        x = x[:20]  # batches of 128 would only take longer
        y, exact = native(x, tensors, form, bias), exact[:20]
        few = form.rows < 16
        assert error(y.view(1, -1) if few else y, exact.view(1, -1) if few else exact) < 1e-5, case


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_term(activation: str):
    # All of them in float; in the other modes a third of them, not the same in each.
    start, step = (0, 1) if activation == "float" else (ACTIVATIONS.index(activation) % 3, 3)
    for seed in range(start, len(TERMS) * len(PLANES), step):
        form, tensors, x, bias, ends = example(seed)
        if "chain0.left" in form.names and activation in ("int1", "int2"):
            continue  # sums of signs are often 0, where these levels jump
        y = native(x, tensors, form, bias, ends, activation)
        wrong = error(y.view(1, -1), expected(seed, activation).view(1, -1))
        assert wrong < TOLERANCES.get(activation, 1e-5), (form, wrong)


# Widths and groups of each way to read codes: 16 bytes a load, or words of bits anywhere.
@pytest.mark.parametrize("columns, group", [(1280, 128), (640, 256), (384, None), (1152, 384),
                                            (896, 64), (250, 250), (96, 32)])
@pytest.mark.parametrize("kinds", [("binary",), ("ternary",), ("trits", "binary")])
def test_every_batch_and_dtype(columns: int, group: int | None, kinds: tuple[str, ...]):
    form, tensors = random_weight(37, columns, group, kinds, shift=True)
    for batch, dtype in itertools.product((1, 2, 3, 8, 9), FLOATS):
        x, bias = torch.randn(batch, columns).to(dtype), torch.randn(37)
        y = native(x, tensors, form, bias)
        exact = reference.packed_linear(x.double(), tensors, form.text, bias)
        assert y.dtype == dtype and y.shape == (batch, 37)
        # The rounding of the result to `dtype`, and what 16 bits of x cost where it has 16.
        rounding = torch.finfo(dtype).eps * 0.51 + 1e-6
        noise = (1e-5 if dtype == torch.float32 else 2e-4) * exact.norm(dim=-1, keepdim=True)
        assert ((y.double() - exact).abs() <= exact.abs() * rounding + noise / 37 ** 0.5).all()


def test_float_mode_of_16_bits_is_far_below_their_own_rounding():
    form, tensors = random_weight(64, 1024, 128, ("binary",), scales=torch.float32)
    for dtype, batch in itertools.product((torch.float16, torch.bfloat16), (1, 5)):
        x = torch.randn(batch, 1024).to(dtype)
        x[:, ::97] *= 50  # as activations of language models are
        exact = reference.packed_linear(x.double(), tensors, form.text)
        assert error(_in_fp32(x, form, tensors), exact) < 2e-4


def _in_fp32(x: Tensor, form, tensors) -> Tensor:
    """Return a product of 16-bit inputs before it is rounded to their dtype."""
    part = cuda_terms.terms(form.text, tensors).parts[0]
    call = cuda_launch._Call(cuda_terms.terms(form.text, tensors), {}, x, 0, None,
                             cuda_table.DEFAULT)
    y = torch.full((len(x), form.rows), float("nan"))
    call._product(part.products[0], y, 0)
    return y


@pytest.mark.parametrize("few_tokens", (1, 1 << 30))  # 1 and 2 bits: in both ways
def test_tokens_do_not_depend_on_the_batch(few_tokens: int, monkeypatch):
    settings = cuda_table.Settings(few_tokens=few_tokens)
    monkeypatch.setattr(cuda_launch, "settings_of", lambda device: settings)
    form, tensors = random_weight(70, 896, 128, ("binary", "ternary"), shift=True)
    modes = ("int1", "uint2") if few_tokens == 1 else ("float", "int8", "int1")
    for activation, dtype in itertools.product(modes, FLOATS):
        x = torch.randn(17, 896).to(dtype)
        whole = native(x, tensors, form, None, None, activation)
        for token in (0, 7, 16):
            one = native(x[token], tensors, form, None, None, activation)
            assert torch.equal(one, whole[token])


def test_a_block_may_stage_its_token_or_not(monkeypatch):
    for kinds, columns in ((("binary",), 768), (("trits",), 300)):
        form, tensors = random_weight(40, columns, 128, kinds)
        x = torch.randn(1, columns)
        for activation in ACTIVATIONS:
            alone = native(x, tensors, form, None, None, activation)
            with monkeypatch.context() as patch:
                patch.setattr(cuda_table, "MOST_STAGING_BYTES", 0)
                assert torch.equal(native(x, tensors, form, None, None, activation), alone)


def test_experts(kernels):
    for kinds, group in ((("binary",), 128), (("mask", "trits"), 32)):
        kinds = tuple({"binary": "signs"}.get(kind, kind) for kind in kinds)
        form, named = plain.example(kinds, ("shift",), 40, 256, group, experts=4)
        tensors, bias = list(named.values()), torch.randn(4, 40)
        for ends in ([0, 0, 0, 0], [3, 3, 9, 20], [20, 20, 20, 20], [1, 2, 3, 4], [5, 11, 11, 18]):
            kernels.bitlm_cuda_emulate_backwards(ends[0] % 2)
            offsets = torch.tensor(ends, dtype=torch.int32)
            x = torch.randn(20, 256)
            y = native(x, tensors, form, bias, offsets)
            exact = reference.packed_linear(x.double(), tensors, form.text, bias, offsets)
            assert torch.allclose(y.double(), exact, atol=1e-4)
            assert not y[ends[-1]:].any()


# Of one part and of two; empty experts, tokens that are nobody's, and no planes at all.
@pytest.mark.parametrize("activation", ("float", "int8"))
@pytest.mark.parametrize("parts", (1, 2))
def test_experts_with_every_term(parts: int, activation: str, kernels):
    every = [*itertools.product(TERMS, (("mask", "trits"),)), (("chain", "low_rank"), ()),
             (("salient.mask", "input_scales"), ()), (("salient.columns",), ()),
             (("salient.mask", "columns", "zones", "shift"), ("signs", "mask")),
             (("salient.mask", "columns", "rank"), ("signs", "trits", "mask"))]
    for seed, (terms, codes) in enumerate(every):
        kernels.bitlm_cuda_emulate_backwards(seed % 2)
        form, named = plain.example(codes, terms, 20, 90, 32, 1 + seed % 2, parts, 3)
        tensors, x, bias = list(named.values()), torch.randn(11, 90), torch.randn(3, form.rows)
        x = x.half() if seed % 3 == 0 else x
        for ends in ([4, 4, 9], [0, 11, 11], [0, 0, 0]):
            offsets = torch.tensor(ends, dtype=torch.int32)
            y = native(x, tensors, form, bias, offsets, activation)
            exact = reference.packed_linear(x.double() if activation == "float" else x, tensors,
                                            form.text, bias, offsets, activation)
            wrong = (y.double() - exact).norm()
            limit = max(TOLERANCES.get(activation, 1e-5), 1e-3 * (x.dtype == torch.float16))
            assert wrong <= limit * exact.norm(), (terms, ends)
            assert not y[ends[-1]:].any()


@pytest.mark.parametrize("activation", ("int2", "uint2", "int1", "uint1"))
def test_steps(activation: str):
    form, tensors = random_weight(83, 300, 64, ("ternary",), shift=True)
    for batch, step in itertools.product((1, 6), (torch.tensor(0.7), torch.tensor([0.0]))):
        x = torch.randn(batch, 300)
        y = native(x, tensors, form, None, None, activation, step)
        exact = reference.packed_linear(x, tensors, form.text, None, None, activation, step)
        assert (y - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("scale", (0.0, 1e-28, 1e29, 1e36))
@pytest.mark.parametrize("activation", ("float", "int8"))
def test_small_and_huge_inputs(scale: float, activation: str):
    form, tensors = random_weight(64, 256, 128, ("binary",), scales=torch.float32)
    x = torch.randn(2, 256).clamp(-3, 3) * scale
    exact = reference.packed_linear(x.double(), tensors, form.text, None, None, activation)
    y = native(x, tensors, form, None, None, activation)
    tolerance = TOLERANCES.get(activation, 1e-5)
    assert y.isfinite().all()
    assert (y.double() - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_token_with_an_infinity_or_nan_is_nan(value: float, activation: str):
    form, tensors = random_weight(70, 256, 64, ("ternary",))
    x = torch.randn(5, 256)
    x[3, 77] = value
    for step in (None, torch.tensor(0.5)):
        y = native(x, tensors, form, None, None, activation, step)
        assert y[3].isnan().all()
        assert y[[0, 1, 2, 4]].isfinite().all()


def test_shapes_and_strides():
    form, tensors = random_weight(70, 96, 32, ("binary",))
    strided = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in tensors]
    for x in (torch.randn(96), torch.randn(2, 3, 96), torch.randn(96, 5).t(),
              torch.randn(4, 192)[:, ::2], torch.randn(1, 96).expand(5, 96), torch.randn(0, 96),
              torch.randn(2, 0, 96)):
        exact = reference.packed_linear(x, tensors, form.text)
        for given in (tensors, strided):
            y = native(x, given, form)
            assert y.shape == exact.shape and torch.allclose(y, exact, atol=1e-4)


def test_the_rounding_of_ties_is_that_of_the_reference():
    form, tensors = random_weight(16, 128, 128, ("binary",))
    x = (torch.arange(128) - 64) / 2.0
    x[0] = 127.0  # a scale of 1: every second value lies between two integers
    y = native(x, tensors, form, None, None, "int8")
    assert torch.allclose(y, reference.packed_linear(x, tensors, form.text, None, None, "int8"))


# --- rows ----------------------------------------------------------------------------------------


def test_rows_and_dense_weights():
    for seed, (terms, codes) in enumerate(itertools.product(TERMS, PLANES)):
        ratio, parts, experts, rows, columns, group = SIZES[seed % len(SIZES)]
        form, named = plain.example(codes, terms, rows, columns, group, ratio, parts, experts)
        tensors = list(named.values())
        ids = torch.tensor([[0, form.rows - 1], [rows // 2, 0]])
        for dtype in (torch.float32, torch.float16):
            dense = cuda.dequantize(tensors, form.text, dtype)
            exact = reference.dequantize(tensors, form.text, torch.float64)
            assert dense.dtype == dtype and dense.shape == exact.shape
            atol = 4 * torch.finfo(dtype).eps * exact.abs().max()
            assert torch.allclose(dense.double(), exact, rtol=0, atol=atol), (terms, codes)
            if parts == 1 and not experts:
                picked = cuda.packed_embedding(ids, tensors, form.text, dtype)
                assert torch.equal(picked, dense[ids])


def test_ids_outside_of_the_embedding_are_nan():
    form, tensors = random_weight(70, 40, 8, ("binary",))
    rows = cuda.packed_embedding(torch.tensor([70, 3, -1]), tensors, form.text, torch.float32)
    assert rows[[0, 2]].isnan().all() and rows[1].isfinite().all()


# --- the binding ---------------------------------------------------------------------------------


def test_changed_tensors_are_looked_at_again():
    form, named = plain.example(("signs",), ("salient.mask",), 20, 64, 32)
    x = torch.randn(2, 64)
    for _ in range(2):
        tensors = list(named.values())
        exact = reference.packed_linear(x, tensors, form.text)
        assert torch.allclose(native(x, tensors, form), exact, atol=1e-3)
        named["salient.mask"].copy_(named["salient.mask"].flip(0))


@pytest.mark.parametrize("terms", (("salient.columns",), ("columns", "rank"), ("input_scales",)))
def test_another_default_dtype(terms: tuple[str, ...]):
    form, named = plain.example(("signs", "mask"), terms, 24, 128, 64)
    tensors, x = list(named.values()), torch.randn(3, 128)
    expected = reference.packed_linear(x, tensors, form.text)
    try:
        torch.set_default_dtype(torch.float64)
        y = native(x, tensors, form)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(y, expected, atol=1e-3)


def test_many_experts_of_few_tokens(kernels):
    # More experts than a warp has lanes, most of them without a token.
    form, named = plain.example(("signs",), ("salient.mask",), 6, 128, 64, experts=70)
    tensors, x = list(named.values()), torch.randn(9, 128)
    ends = torch.zeros(70, dtype=torch.int32)
    for places, values in (((3, 40, 69), (2, 7, 9)), ((0, 31, 32), (1, 1, 9)), ((69,), (0,))):
        own = ends.clone()
        own[list(places)] = torch.tensor(values, dtype=torch.int32)
        offsets = own.cummax(0).values.to(torch.int32)
        for backwards in (0, 1):
            kernels.bitlm_cuda_emulate_backwards(backwards)
            y = native(x, tensors, form, None, offsets)
            exact = reference.packed_linear(x.double(), tensors, form.text, None, offsets)
            assert torch.allclose(y.double(), exact, atol=1e-4)


def test_terms_go_with_their_tensors():
    form, tensors = random_weight(70, 96, 32, ("binary",))
    before = len(cuda_terms._known)
    native(torch.randn(96), tensors, form)
    assert len(cuda_terms._known) == before + 1
    del tensors
    assert len(cuda_terms._known) == before


def test_damaged_tensors_are_refused():
    form, named = plain.example(("signs", "signs"), ("columns",), 20, 64, 32)
    named["plane1.columns"][0, -1] = 64
    with pytest.raises(ValueError, match="plane1.columns is not sorted or not within 0..63"):
        native(torch.randn(64), list(named.values()), form)
    form, named = plain.example(("signs",), ("salient.mask",), 20, 64, 32)
    named["salient.values"] = named["salient.values"][:, :-5].clone()
    with pytest.raises(ValueError, match="more bits than salient.values has values"):
        native(torch.randn(64), list(named.values()), form)


def test_what_has_no_kernel_goes_to_the_reference_with_a_reason():
    form, tensors = random_weight(8, 64, 32, ("binary",))
    x = torch.randn(3, 64, dtype=torch.float64)
    assert torch.equal(cuda.packed_linear(x, tensors, form.text),
                       reference.packed_linear(x, tensors, form.text))
    assert cuda.handed_back == {"float64 inputs have no kernel": 1}


def test_cards_that_the_library_was_not_built_for():
    assert [cuda._no_code("80 86 90", *card) for card in ((8, 0), (8, 9), (9, 0), (12, 0))] == \
        [None] * 4
    assert cuda._no_code("90", 8, 0) == "the CUDA kernels are built for 90, this card has 80"
    assert cuda._no_code("86", 8, 0) and not cuda._no_code("80", 8, 6)
    assert cuda._no_code("90a", 10, 0) and not cuda._no_code("80 90a", 9, 0)
    assert not cuda._no_code("80 90 90a", 12, 0)


def test_tensors_on_another_device_are_refused():
    form, tensors = random_weight(8, 64, 32, ("binary",))
    x = torch.randn(3, 64)
    elsewhere = [tensor.to("meta") for tensor in tensors]
    for call in (lambda: cuda.packed_linear(x, elsewhere, form.text),
                 lambda: cuda.packed_linear(x, tensors, form.text, torch.zeros(8, device="meta")),
                 lambda: cuda.packed_embedding(torch.tensor([1]), elsewhere, form.text,
                                               torch.float32)):
        with pytest.raises(RuntimeError, match="expected all tensors on cpu, one is on meta"):
            call()


def test_a_card_whose_kernels_are_wrong_goes_to_the_reference(monkeypatch):
    assert cuda.disagreement(torch.device("cpu")) is None
    product, rows = cuda_launch.linear, cuda_launch.rows
    wrong = {"linear": lambda *args: product(*args) * 1.05,
             "rows": lambda *args: rows(*args).roll(1, 0)}
    for name, kernel in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(cuda_launch, name, kernel)
            assert "than the reference (72x512 signs" in cuda.disagreement(torch.device("cpu"))
    monkeypatch.setattr(cuda_launch, "linear", lambda *args: product(*args) * float("nan"))
    assert "other products" in cuda.disagreement(torch.device("cpu"))


def test_a_card_on_which_kernels_fail_goes_to_the_reference(monkeypatch):
    def launch(*args):
        raise RuntimeError("cudaErrorNoKernelImageForDevice")

    monkeypatch.setattr(cuda_launch, "_launch", launch)
    assert cuda.disagreement(torch.device("cpu")) == \
        "the CUDA kernels failed on 72x512 signs: cudaErrorNoKernelImageForDevice"


def test_errors_have_their_name(kernels, monkeypatch):
    form, tensors = random_weight(8, 64, 32, ("binary",))
    monkeypatch.setattr(cuda_table, "staging_bytes", lambda units, digits: 0)
    monkeypatch.setattr(cuda_launch, "units_of", lambda columns, group: (1 << 20, 1))
    with pytest.raises(RuntimeError, match="cudaErrorInvalidConfiguration"):
        native(torch.randn(1, 64), tensors, form)


def test_staging_bytes_are_those_of_the_kernel():
    text = (cuda_host.SOURCES / "cuda_product.h").read_text()
    assert "units * (staged_row_words(digits) * 4 + (digits == 3 ? 32 : 16) + 4)" in text
    assert cuda_table.staging_bytes(10, 2) == 10 * ((2 * 32 + 4) * 4 + 16 + 4)
    assert cuda_table.staging_bytes(1, 3) == (3 * 32 + 4) * 4 + 32 + 4
