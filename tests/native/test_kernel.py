"""The native kernels of every instruction set against the reference."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest
import torch
from torch import Tensor

from bitlm.ops import cpu, library, reference
from bitlm.ops.structs import ACTIVATIONS
from tests.ops import plain
from tests.ops.test_reference import TERMS
from tests.weights import random_weight

pytestmark = pytest.mark.skipif(library.load().library is None,
                                reason=str(library.load().reason))

ROWS = (1, 2, 7, 16, 31, 64, 67, 130, 257)
COLUMNS = (1, 5, 8, 31, 32, 33, 100, 128, 255, 509, 512, 768, 1031)
BATCHES = (1, 2, 3, 15, 16, 17, 128)
GROUPS = (32, 64, 100, 128, None)
KINDS = (
    ("binary",), ("ternary",), ("trits",), ("binary", "ternary"), ("trits", "binary", "ternary"),
    ("binary",) * 4, ("ternary",) * 5, ("binary",) * 8,
)
# Of weights with all kinds of terms: planes; ratio, parts, experts, rows of a part, columns, group.
PLANES = (("signs",), ("mask",), ("trits",), ("signs", "trits", "mask"), ("signs",) * 4)
SIZES = ((1, 1, 0, 70, 300, 128), (2, 1, 0, 130, 97, 32), (1, 2, 0, 33, 150, 64),
         (1, 2, 3, 20, 140, 100))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# What rounding may cost: float and levels differ from the reference by noise of fp32, integers
# where a value lies between two of them.
TOLERANCES = {"int16": 1e-4, "int8": 3e-3}


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest):
    used = library.limit_instruction_set(request.param)
    if used != request.param:
        library.limit_instruction_set(None)
        pytest.skip(f"this machine has no {request.param}")
    yield used
    library.limit_instruction_set(None)


def cases(count: int, seed: int) -> list[tuple]:
    """Return `count` random points of the grid in which every value of every axis occurs."""
    axes = (ROWS, COLUMNS, BATCHES, GROUPS, KINDS, (1, 2), (False, True),
            (torch.float16, torch.float32), (False, True))
    pick = random.Random(seed)
    columns = []
    for axis in axes:
        values = [value for value, _ in zip(itertools.cycle(axis), range(count))]
        pick.shuffle(values)
        columns.append(values)
    return list(zip(*columns))


def error(y: Tensor, exact: Tensor) -> float:
    """Return the largest relative error over the output vectors."""
    norms = exact.norm(dim=-1).clamp_min(1e-30)
    return ((y.double() - exact).norm(dim=-1) / norms).max().item()


@cache
def prepared(seed: int, case: tuple) -> tuple:
    """Return form, tensors, x, bias and the exact result of a case, once for all kernels."""
    rows, columns, batch, group, kinds, ratio, shift, scales, with_bias = case
    form, tensors = random_weight(rows, columns, group, kinds, ratio, shift, scales, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, columns, generator=generator)
    bias = torch.randn(rows, generator=generator) if with_bias else None
    return form, tensors, x, bias, reference.packed_linear(x.double(), tensors, form.text, bias)


def test_grid(instruction_set: str):
    for seed, case in enumerate(cases(140, seed=3)):
        form, tensors, x, bias, exact = prepared(seed, case)
        y = cpu.packed_linear(x, tensors, form.text, bias)
        # One row of few columns may cancel to nearly nothing, so compare the whole output then.
        few = form.rows < 16
        assert error(y.view(1, -1) if few else y, exact.view(1, -1) if few else exact) < 1e-5, case


@cache
def example(seed: int) -> tuple:
    """Return form, tensors, x, bias and offsets of any mix of terms, once for all kernels."""
    terms, codes = list(itertools.product(TERMS, PLANES))[seed]
    ratio, parts, experts, rows, columns, group = SIZES[seed % len(SIZES)]
    form, named = plain.example(codes, terms, rows, columns, group, ratio, parts, experts)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn((experts, form.rows) if experts else (form.rows,), generator=generator)
    ends = torch.tensor([2, 2, 4], dtype=torch.int32) if experts else None
    return form, list(named.values()), torch.randn(5, columns, generator=generator), bias, ends


@cache
def expected(seed: int, activation: str) -> Tensor:
    form, tensors, x, bias, ends = example(seed)
    x = x.double() if activation == "float" else x
    return reference.packed_linear(x, tensors, form.text, bias, ends, activation).double()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_term(instruction_set: str, activation: str):
    for seed in range(len(TERMS) * len(PLANES)):
        form, tensors, x, bias, ends = example(seed)
        if "chain0.left" in form.names and activation in ("int1", "int2"):
            continue  # sums of signs are often 0, where these levels jump
        y = cpu.packed_linear(x, tensors, form.text, bias, ends, activation)
        wrong = error(y.view(1, -1), expected(seed, activation).view(1, -1))
        assert wrong < TOLERANCES.get(activation, 1e-5), (form, wrong)


@pytest.mark.parametrize("activation", ("int2", "uint2", "int1", "uint1"))
def test_steps(instruction_set: str, activation: str):
    form, tensors = random_weight(83, 300, 64, ("ternary",), shift=True)
    step = torch.tensor(0.7)
    for batch in (1, 6, 40):
        x = torch.randn(batch, 300)
        y = cpu.packed_linear(x, tensors, form.text, None, None, activation, step)
        exact = reference.packed_linear(x, tensors, form.text, None, None, activation, step)
        assert error(y, exact.double()) < 1e-5


@pytest.mark.parametrize("activation", ("float", "int16", "int8"))
def test_batches_agree_with_single_tokens(instruction_set: str, activation: str):
    form, tensors = random_weight(200, 700, 128, ("binary", "trits"), shift=True)
    x = torch.randn(130, 700)
    whole = cpu.packed_linear(x, tensors, form.text, None, None, activation)
    for token in (0, 7, 129):
        one = cpu.packed_linear(x[token], tensors, form.text, None, None, activation)
        assert error(one.unsqueeze(0), whole[token].unsqueeze(0).double()) < 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(instruction_set: str, dtype: torch.dtype):
    for (columns, bias_dtype), batch in itertools.product(
            zip((40, 129, 256), (torch.float32, torch.bfloat16, torch.float16)), (1, 5, 70)):
        form, tensors = random_weight(83, columns, 64, ("binary", "ternary"), scales=torch.float32)
        x = torch.randn(batch, columns).to(dtype)
        bias = torch.randn(83).to(bias_dtype)
        y = cpu.packed_linear(x, tensors, form.text, bias)
        exact = reference.packed_linear(x.double(), tensors, form.text, bias)
        assert y.dtype == dtype and y.shape == (batch, 83)
        # Nothing but the rounding of the result to `dtype`: half a unit, and a little fp32 noise.
        rounding = torch.finfo(dtype).eps * 0.51 + 1e-6
        noise = 1e-5 * exact.abs().amax(-1, keepdim=True)
        assert ((y.double() - exact).abs() <= exact.abs() * rounding + noise).all()


@pytest.mark.parametrize("group", (1, 3, 7, 33, 250))
def test_odd_groups(instruction_set: str, group: int):
    form, tensors = random_weight(70, 601, group, ("binary", "trits"), shift=True)
    x = torch.randn(6, 601)
    exact = reference.packed_linear(x.double(), tensors, form.text)
    assert error(cpu.packed_linear(x, tensors, form.text), exact) < 1e-5


def test_long_rows(instruction_set: str):
    """Rows that need more than one pass over their columns."""
    for group, batch in ((None, 1), (128, 1), (32, 3), (64, 40)):
        form, tensors = random_weight(70, 17001, group, ("binary",), shift=True)
        x = torch.randn(batch, 17001)
        exact = reference.packed_linear(x.double(), tensors, form.text)
        assert error(cpu.packed_linear(x, tensors, form.text), exact) < 1e-5


@pytest.mark.parametrize("scale", (0.0, 1e-42, 1e-38, 1e29, 1e36))
def test_small_and_huge_inputs(instruction_set: str, scale: float):
    form, tensors = random_weight(64, 256, 128, ("binary",), scales=torch.float32)
    x = torch.randn(2, 256).clamp(-3, 3) * scale
    exact = reference.packed_linear(x.double(), tensors, form.text)
    y = cpu.packed_linear(x, tensors, form.text)
    assert y.isfinite().all()
    # Denormals have an absolute spacing.
    assert torch.allclose(y.double(), exact, rtol=0, atol=1e-5 * exact.abs().max().item() + 1e-43)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_not_finite_inputs(instruction_set: str, value: float):
    for kinds in (("binary",), ("ternary",), ("trits",), ("binary", "trits")):
        form, tensors = random_weight(70, 256, 64, kinds)
        x = torch.randn(5, 256)
        x[3, 77] = value
        y = cpu.packed_linear(x, tensors, form.text)
        expected = reference.packed_linear(x, tensors, form.text)
        assert torch.equal(y.isfinite(), expected.isfinite())
        if len(kinds) == 1:  # planes of different signs make NaN of infinity
            assert torch.allclose(y, expected, rtol=1e-4, atol=1e-3, equal_nan=True)
        finite = expected.isfinite()
        assert torch.allclose(y[finite], expected[finite], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_results_overflow_where_they_should(instruction_set: str, dtype: torch.dtype):
    form, tensors = random_weight(70, 64, 64, ("binary",), scales=torch.float32)
    x = torch.randn(3, 64) * (torch.finfo(dtype).max / 8)
    x = x.clamp(-torch.finfo(dtype).max / 2, torch.finfo(dtype).max / 2).to(dtype)
    y = cpu.packed_linear(x, tensors, form.text)
    expected = reference.packed_linear(x.double(), tensors, form.text).to(dtype)
    assert expected.isinf().any() and not expected.isinf().all()
    assert torch.equal(y.isinf(), expected.isinf()) and not y.isnan().any()


def test_threads_change_no_bit(instruction_set: str):
    before = torch.get_num_threads()
    try:
        for batch, columns, kinds in ((1, 4096, ("binary",)), (40, 1000, ("binary", "ternary"))):
            form, tensors = random_weight(1500, columns, 128, kinds)
            x = torch.randn(batch, columns)
            results = []
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(cpu.packed_linear(x, tensors, form.text))
            assert all(torch.equal(results[0], result) for result in results[1:])
    finally:
        torch.set_num_threads(before)
