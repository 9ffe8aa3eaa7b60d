"""Products of many tokens on the emulated GPU, in each of their ways, and which way is taken."""

from __future__ import annotations

import itertools

import pytest
import torch

from bitlm.ops import cuda, cuda_check, cuda_launch, cuda_table, cuda_terms, reference
from tests.native.cuda_host import launched, native
from tests.native.test_kernel import error
from tests.ops import plain
from tests.weights import random_weight

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_many_tokens_are_multiplied_by_dense_pieces(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(cuda_launch, "settings_of", lambda device: cuda_table.Settings(
        dense_tokens=1, dense_tokens_alone=1))
    monkeypatch.setattr(cuda_table, "DENSE_PIECE_BYTES", 0)
    for columns, kinds in ((256, ("binary", "ternary")), (250, ("trits",))):
        form, tensors = random_weight(300, columns, 64, kinds, shift=True)
        x, bias = torch.randn(2, 3, columns).to(dtype), torch.randn(300)
        y = native(x, tensors, form, bias)
        weight = reference.dequantize(tensors, form.text, dtype)
        exact = torch.nn.functional.linear(x, weight, bias.to(dtype))
        assert torch.allclose(y, exact, rtol=1e-2, atol=0.1)
        full = reference.packed_linear(x.double(), tensors, form.text, bias)
        assert (y - full).norm() < 2 * torch.finfo(dtype).eps * full.norm()


# Widths, groups and rows of products of many tokens; 37 and 150 rows are no whole blocks.
@pytest.mark.parametrize("tiles", (1, 2))
@pytest.mark.parametrize("rows, columns, group, kinds", [
    (37, 64, None, ("binary",)), (150, 384, 128, ("binary",)), (64, 256, 64, ("ternary", "binary")),
    (128, 320, None, ("ternary",))])
def test_many_tokens(rows, columns, group, kinds, tiles, kernels, monkeypatch):
    monkeypatch.setattr(cuda_launch, "settings_of",
                        lambda device: cuda_table.Settings(many_tiles=tiles))
    form, tensors = random_weight(rows, columns, group, kinds, shift=columns > 256)
    for backwards, dtype in enumerate((torch.float16, torch.bfloat16)):
        kernels.bitlm_cuda_emulate_backwards(backwards)
        x, bias = torch.randn(131, columns).to(dtype), torch.randn(rows)
        y = native(x, tensors, form, bias)
        # Codes are exact and sums in fp32, so that only the result is rounded.
        exact = reference.packed_linear(x.double(), tensors, form.text, bias)
        rounding = torch.finfo(dtype).eps * 0.51
        noise = 1e-5 * exact.norm(dim=-1, keepdim=True) / rows ** 0.5
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= exact.abs() * rounding + noise).all()


# One and two bits of every kind; rows and tokens that are no whole blocks, more steps than stages.
@pytest.mark.parametrize("tiles", (1, 2, 4))
@pytest.mark.parametrize("rows, columns, group, kinds, shift", [
    (37, 64, None, ("binary",), False), (150, 640, 128, ("binary",), True),
    (300, 448, 64, ("ternary",), False), (70, 512, None, ("ternary",), True),
    (65, 384, 128, ("binary", "binary"), False), (20, 1344, 64, ("binary",), False),
    (40, 576, 192, ("binary", "binary"), True)])
def test_many_tokens_of_sm_90a(rows, columns, group, kinds, shift, tiles, kernels, monkeypatch):
    names = launched(monkeypatch, cuda_table.Settings(wide_tokens=1, wide_tiles=tiles))
    form, tensors = random_weight(rows, columns, group, kinds, shift=shift)
    for turn, (dtype, tokens) in enumerate(((torch.float16, 3), (torch.bfloat16, 265),
                                            (torch.float16, 40))):
        kernels.bitlm_cuda_emulate_backwards(turn)
        x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows)
        y = native(x, tensors, form, bias)
        # Weights are rounded as those of a dense layer, sums are not before the result.
        weight = reference.dequantize(tensors, form.text, torch.float32).to(dtype).double()
        exact = x.double() @ weight.T + bias
        rounding = torch.finfo(dtype).eps * 0.51
        noise = 1e-5 * exact.norm(dim=-1, keepdim=True) / rows ** 0.5
        assert y.dtype == dtype
        assert ((y.double() - exact).abs() <= exact.abs() * rounding + noise).all()
    assert names == {"bitlm_cuda_wide_launch"}


def test_tokens_anywhere_in_memory(monkeypatch):
    names = launched(monkeypatch, cuda_table.Settings(wide_tokens=1))
    form, tensors = random_weight(20, 64, 64, ("binary",))
    x = torch.randn(5 * 64 + 1).bfloat16()[1:].view(5, 64)
    assert x.data_ptr() % 16
    y = native(x, tensors, form)
    assert names == {"bitlm_cuda_wide_launch"} and torch.equal(y, native(x.clone(), tensors, form))


def test_many_tokens_of_sm_90a_in_the_order_of_blocks(monkeypatch):
    # More slices of tokens than a chunk has, and several blocks of rows.
    names = launched(monkeypatch, cuda_table.Settings(wide_tokens=1, dense_tokens=1 << 30,
                                                       dense_tokens_wide=1 << 30, wide_tiles=1))
    form, tensors = random_weight(130, 64, 64, ("binary",))
    x = torch.randn(17 * 128 + 5, 64).half()
    y = native(x, tensors, form)
    weight = reference.dequantize(tensors, form.text, torch.float32)
    assert "bitlm_cuda_wide_launch" in names
    assert (y.float() - x.float() @ weight.T).norm() < 1e-3 * y.float().norm()


def test_what_sm_90a_has_no_product_for(monkeypatch):
    settings = cuda_table.Settings(wide_tokens=1, many_tokens=1)
    three = ("binary",) * 3, torch.float16
    mixed = ("ternary", "binary"), torch.float16
    wide_scales = ("binary",), torch.float32  # fp16 does not hold them
    for (kinds, scales), dtypes in ((three, set()), (mixed, set()),
                                    (wide_scales, {torch.bfloat16})):
        form, tensors = random_weight(20, 128, 64, kinds, scales=scales)
        assert cuda_terms.terms(form.text, tensors).wide == dtypes
        with monkeypatch.context() as patch:
            names = launched(patch, settings)
            native(torch.randn(5, 128).half(), tensors, form)
        assert names == {"bitlm_cuda_order_launch", "bitlm_cuda_many_launch"}


def test_wrong_products_of_sm_90a_are_left_out(monkeypatch):
    names = launched(monkeypatch, cuda_table.Settings(wide_tokens=1, many_tokens=1))
    # As on a card, with weights that an emulation has time for.
    device = torch.device("cpu")
    cases = tuple(((rows // 4, columns // 4, min(group, columns // 4)), names)
                  for (rows, columns, group), names in cuda_check.WIDE_CASES)
    monkeypatch.setattr(cuda_check, "WIDE_CASES", cases)
    monkeypatch.setattr(cuda_launch, "wide_cards", set())
    monkeypatch.setattr(cuda, "_not_used", {})
    cuda._try_wide(device)
    assert "bitlm_cuda_wide_launch" in names
    assert cuda_launch.wide_cards == {device} and cuda.not_used(device) is None
    cuda_launch.wide_cards.clear()
    product = cuda_launch.linear
    monkeypatch.setattr(cuda_launch, "linear", lambda *args: product(*args) * 1.05)
    cuda._try_wide(device)
    assert not cuda_launch.wide_cards and "than the reference" in cuda.not_used(device)
    monkeypatch.setenv("BITLM_WGMMA", "0")
    cuda._try_wide(device)
    assert not cuda_launch.wide_cards and cuda.not_used(device) == "BITLM_WGMMA=0"


@pytest.mark.parametrize("activation", ("int2", "uint2", "int1", "uint1"))
@pytest.mark.parametrize("rows, columns, group, kinds", [
    (70, 1280, 128, ("binary",)), (64, 384, None, ("ternary",)), (33, 768, 256, ("binary",) * 2),
    (65, 640, None, ("ternary", "binary"))])
def test_many_tokens_of_few_levels(rows, columns, group, kinds, activation, kernels, monkeypatch):
    names = launched(monkeypatch, cuda_table.Settings(few_tokens=1))
    form, tensors = random_weight(rows, columns, group, kinds, shift=rows % 2 == 0)
    for turn, (tokens, dtype) in enumerate(((1, torch.float32), (9, torch.float16),
                                            (77, torch.bfloat16), (40, torch.float32))):
        kernels.bitlm_cuda_emulate_backwards(turn % 2)
        x, bias = torch.randn(tokens, columns).to(dtype), torch.randn(rows)
        x[0, 5] = float("nan") if tokens == 77 else 1.0
        for step in (None, torch.tensor(0.8)):
            y = native(x, tensors, form, bias, None, activation, step)
            exact = reference.packed_linear(x.float(), tensors, form.text, bias, None, activation,
                                            step)
            assert y.dtype == dtype and (tokens < 77 or y[0].isnan().all())
            rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
            own = slice(tokens == 77, None)
            assert error(y[own], exact[own].double()) < rounding
    assert names == {"bitlm_cuda_stage", "bitlm_cuda_few_launch"}


def test_many_tokens_of_few_levels_and_other_terms(monkeypatch):
    names = launched(monkeypatch, cuda_table.Settings(few_tokens=1))
    offsets = torch.tensor([5, 5, 40], dtype=torch.int32)
    for terms, experts, activation in itertools.product(
            (("rank",), ("input_scales", "low_rank"), ("salient.columns", "shift")), (0, 3),
            ("int1", "uint2")):
        form, named = plain.example(("signs", "mask"), terms, 20, 256, 128, 1, 2, experts)
        tensors, x = list(named.values()), torch.randn(45, 256)
        bias = torch.randn((experts, form.rows) if experts else (form.rows,))
        arguments = (bias, offsets if experts else None, activation)
        names.clear()
        y = native(x, tensors, form, *arguments)
        assert "bitlm_cuda_few_launch" in names
        exact = reference.packed_linear(x, tensors, form.text, *arguments)
        assert (y - exact).norm() <= 1e-5 * exact.norm(), (terms, experts)


def test_input_scales_are_not_rounded_to_16_bits(monkeypatch):
    monkeypatch.setattr(cuda_launch, "settings_of",
                        lambda device: cuda_table.Settings(many_tokens=1))
    form, named = plain.example(("signs",), ("input_scales",), 24, 128, 64)
    named["input_scales"] *= 8000
    named["plane0.scales"] /= 10000
    x = torch.randn(5, 128).half() * 30  # times its scale, far above what fp16 holds
    tensors = list(named.values())
    y = native(x, tensors, form)
    exact = reference.packed_linear(x.double(), tensors, form.text)
    assert y.isfinite().all() and (y - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("way, code, dtype, rounding", [
    ("many", "signs", torch.float16, 1e-3), ("wide", "mask", torch.bfloat16, 8e-3)])
def test_many_tokens_of_experts(way, code, dtype, rounding, kernels, monkeypatch):
    names = launched(monkeypatch, cuda_table.Settings(**{f"{way}_tokens": 1}))
    form, named = plain.example((code,), ("shift",), 70, 128, 64, experts=4)
    tensors, bias = list(named.values()), torch.randn(4, 70)
    for ends in ([0, 0, 0, 0], [3, 3, 9, 140], [140, 140, 140, 140], [5, 133, 133, 138]):
        kernels.bitlm_cuda_emulate_backwards(ends[0] % 3)
        offsets, x = torch.tensor(ends, dtype=torch.int32), torch.randn(140, 128).to(dtype)
        y = native(x, tensors, form, bias, offsets)
        exact = reference.packed_linear(x.double(), tensors, form.text, bias, offsets)
        assert (y - exact).norm() <= rounding * exact.norm()
        assert not y[ends[-1]:].any()
    assert f"bitlm_cuda_{way}_launch" in names


def test_infinities_and_nan_in_many_tokens(monkeypatch):
    monkeypatch.setattr(cuda_launch, "settings_of",
                        lambda device: cuda_table.Settings(many_tokens=1))
    form, tensors = random_weight(70, 128, 64, ("ternary",))
    x = torch.randn(4, 128).half()
    x[1, 77], x[2, 3] = float("nan"), float("inf")
    y = native(x, tensors, form)
    assert not y[1:3].isfinite().any() and y[[0, 3]].isfinite().all()


def test_which_work_tokens_are():
    own = cuda_table.Settings((1, 2, 8, 4), many_tokens=10, dense_tokens=100, dense_tokens_alone=50,
                              wide_tokens=20, dense_tokens_wide=200)
    assert [own.block(tokens) for tokens in (1, 2, 3, 4, 5, 99)] == [1, 2, 8, 8, 4, 4]
    assert [own.work(n, True, False, True) for n in (9, 10, 20, 100)] == \
        ["bits", "many", "many", "dense"]
    assert [own.work(n, True, True, True) for n in (9, 10, 20, 199, 200)] == \
        ["bits", "many", "wide", "wide", "dense"]
    assert cuda_table.Settings(dense_tokens=100).work(100, True, True, True) == "dense"
    assert [own.work(n, True, True, False) for n in (9, 10, 100)] == ["bits", "many", "wide"]
    assert [own.work(n, False, False, True) for n in (49, 50)] == ["bits", "dense"]
    assert own.work(100, False, False, False) == "bits"
    assert [own.tiles(256, 128, blocks) for blocks in (2, 3)] == [2, 1]
    assert cuda_table.Settings(many_tiles=1).tiles(4096, 4096, 1) == 1
    assert [own.tiles_wide(4096, tokens, 132) for tokens in (96, 256, 512, 1024, 8192)] == \
        [1, 1, 2, 4, 4]
    assert own.tiles_wide(14336, 2048, 132) == 4
    assert own.tiles_wide(1536, 100, 132, 128) == 2  # of experts, whose tokens fill no more
    assert [own.tiles(256, 128, 4, experts) for experts in (1, 2)] == [1, 2]
    assert cuda_table.Settings(wide_tiles=2).tiles_wide(4096, 4096, 1) == 2
    assert cuda_table.DEFAULTS["9.0"].wide_tokens < cuda_table.NEVER


def test_the_table_of_cards(monkeypatch, tmp_path):
    shipped = cuda_table.read()
    assert all(set(own.block_tokens) <= {1, 2, 4, 8} for own in shipped.values())
    monkeypatch.setattr(cuda_table, "TABLE", tmp_path / "table.json")
    cuda_table.TABLE.write_text("{}")
    measured = cuda_table.Settings((2, 2, 4, 8), 32, 512, 128)
    cuda_table.settings.cache_clear()
    assert cuda_table.settings((9, 0)) == cuda_table.DEFAULTS["9.0"]
    cuda_table.write((9, 0), measured)
    assert cuda_table.settings((9, 0)) == measured
    assert cuda_table.settings((8, 0)) == cuda_table.DEFAULT
    cuda_table.settings.cache_clear()
