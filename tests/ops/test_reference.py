"""The reference ops against plain Python loops, and as torch ops: gradients, compile, export."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import embedding
from torch.nn.functional import linear as dense_linear

from bitlm import ops
from bitlm.ops import reference
from bitlm.ops.form import Form
from tests.ops import plain

KINDS = {"binary": ("signs",), "ternary": ("mask",), "trits": ("trits",),
         "unlike": ("signs", "trits", "mask"), "five": ("signs",) * 5}
TERMS = [(), ("columns",), ("zones",), ("zones", "shift"), ("columns", "zones", "shift"),
         ("rank",), ("rank", "columns", "shift"), ("shift",), ("input_scales",), ("chain",),
         ("chains",), ("low_rank",), ("salient.mask",), ("salient.columns",),
         ("shift", "salient.mask", "low_rank", "chain", "input_scales"),
         ("zones", "columns", "shift", "salient.columns", "low_rank", "chains", "input_scales")]
SIZES = {"short last group": dict(), "one row": dict(rows=1, columns=9, group_size=4),
         "under a byte": dict(rows=3, columns=5, group_size=2),
         "one column": dict(rows=2, columns=1, group_size=1),
         "one group": dict(columns=16, group_size=128)}
# Chosen so that the ops' own machinery is met once: a plain weight, and one of everything.
FEW = {"plain": dict(kinds=("signs",), rows=6, columns=24),
       "everything": dict(kinds=("mask", "trits"), terms=TERMS[-1], rows=6, columns=24, parts=2)}


def pieces(form, named):
    return [named[name] for name in form.names], form.text


def compare(actual, expected, dtype=torch.float64):
    """Compare with the largest magnitude as the yardstick."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    if not expected.numel():
        return
    epsilon = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3,
               torch.bfloat16: 1e-2}[dtype]
    error = (actual.double() - expected).abs().max()
    assert error <= epsilon * max(float(expected.abs().max()), 1), float(error)


# --- dequantize ----------------------------------------------------------------------------------

@pytest.mark.parametrize("terms", TERMS, ids="+".join)
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_terms(kinds, terms):
    form, named = plain.example(kinds, terms)
    compare(reference.dequantize(*pieces(form, named), torch.float64), plain.dense(form, named))


@pytest.mark.parametrize("parts, experts", [(2, 0), (1, 3), (2, 3)])
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
def test_parts_and_experts(terms, parts, experts):
    form, named = plain.example(("mask", "trits"), terms, parts=parts, experts=experts)
    compare(reference.dequantize(*pieces(form, named), torch.float64), plain.dense(form, named))


@pytest.mark.parametrize("terms", [(), ("shift",), ("zones", "shift"), ("columns",), ("rank",),
                                   ("columns", "zones", "shift")], ids="+".join)
@pytest.mark.parametrize("kinds", [("signs",) * 4, ("mask", "signs", "trits")],
                         ids=["4 bits", "mix"])
def test_planes_whose_scales_halve(kinds, terms):
    form, named = plain.example(kinds, terms, plane_ratio=2)
    compare(reference.dequantize(*pieces(form, named), torch.float64), plain.dense(form, named))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("terms", [("shift",), TERMS[-2], TERMS[-1]], ids="+".join)
def test_odd_sizes(terms, size):
    form, named = plain.example(("signs", "mask", "trits"), terms, **size)
    compare(reference.dequantize(*pieces(form, named), torch.float64), plain.dense(form, named))


@pytest.mark.parametrize("seed", range(60))
def test_any_weight(seed):
    form, named = plain.any_example(seed)
    expected = plain.dense(form, named)
    dtype = (torch.float64, torch.float32, torch.bfloat16, torch.float16)[seed % 4]
    compare(ops.dequantize(*pieces(form, named), dtype), expected, dtype)


def test_names_in_any_order():
    form, named = plain.example(**FEW["everything"])
    backwards = dict(reversed(named.items()))
    other = Form(form.rows, form.columns, tuple(backwards), form.group_size, form.plane_ratio,
                 form.parts)
    assert torch.equal(ops.dequantize(*pieces(form, named), torch.float32),
                       ops.dequantize(*pieces(other, backwards), torch.float32))


def test_onebit_is_a_plane_of_rank_one_scales():
    """OneBit: W = a bT * sign; the row scale and the column scale by hand."""
    named = {"plane0.signs": torch.tensor([[0b01], [0b10]], dtype=torch.uint8),
             "plane0.row_scales": torch.tensor([[2.0], [3.0]]),
             "plane0.column_scales": torch.tensor([[[5.0, 7.0]]])}
    dense = ops.dequantize(*pieces(Form(2, 2, tuple(named), 2), named), torch.float32)
    assert dense.tolist() == [[10, -14], [-15, 21]]


def test_bitstack_worked_example():
    """The two blocks of the notes' 4 x 4 example: signs as the original packs them, row by row."""
    rows = torch.tensor([[189, 105], [1, 62]], dtype=torch.uint8)
    u = torch.tensor([[.928640, 1.034844, .876563, 1.184330],
                      [.845872, .894473, .512215, .381784]])
    v = torch.tensor([[1.249811, 1.100009, .723123, .899624],
                      [.650377, .678271, .360669, .954243]])
    named = {}
    for block in range(2):
        halves = [byte >> shift & 15 for byte in rows[block].tolist() for shift in (4, 0)]
        # The original puts the first column into the highest bit.
        nibbles = [int(f"{half:04b}"[::-1], 2) for half in halves]
        named |= {f"plane{block}.signs": torch.tensor(nibbles, dtype=torch.uint8).unsqueeze(1),
                  f"plane{block}.row_scales": u[block].unsqueeze(1),
                  f"plane{block}.column_scales": v[block].reshape(1, 1, 4)}
    dense = ops.dequantize(*pieces(Form(4, 4, tuple(named), 4), named), torch.float64)
    expected = [[.610489, -1.595242, .366441, .028259], [.711615, .531643, -1.070928, 1.784515],
                [-1.428671, .616807, .818603, -.299799], [1.728493, -1.043821, -.718718, .701136]]
    assert (dense - torch.tensor(expected, dtype=torch.float64)).abs().max() < 5e-6


def test_a_salient_entry_replaces_planes_and_shift_only():
    named = {"plane0.signs": torch.tensor([[0b11]], dtype=torch.uint8),
             "plane0.scales": torch.tensor([[10.0]]), "shift": torch.tensor([[100.0]]),
             "input_scales": torch.tensor([[2.0, 2.0]]),
             "low_rank.u": torch.tensor([[1.0]]), "low_rank.v": torch.tensor([[[1000.0, 2000.0]]]),
             "salient.mask": torch.tensor([[0b10]], dtype=torch.uint8),
             "salient.values": torch.tensor([[7]], dtype=torch.uint8),
             "salient.scales": torch.tensor([0.5]), "salient.zeros": torch.tensor([3]).byte()}
    dense = ops.dequantize(*pieces(Form(1, 2, tuple(named), 2), named), torch.float32)
    assert dense.tolist() == [[2 * (10 + 100 + 1000), 2 * (0.5 * (7 - 3) + 2000)]]


# --- packed_linear -------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("few", FEW)
def test_linear(few, lead, dtype):
    form, named = plain.example(**FEW[few])
    x, bias = torch.randn(*lead, form.columns, dtype=dtype), torch.randn(form.rows, dtype=dtype)
    weight = plain.dense(form, named)
    for own in (None, bias):
        compare(ops.packed_linear(x, *pieces(form, named), own),
                plain.linear(form, weight, x, own), dtype)


@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_linear_of_any_weight(seed):
    form, named = plain.any_example(seed)
    weight, x = plain.dense(form, named), torch.randn(4, form.columns)
    offsets = [1, 1, 3] if form.experts else None
    ends = torch.tensor(offsets, dtype=torch.int32) if offsets else None
    compare(ops.packed_linear(x, *pieces(form, named), None, ends),
            plain.linear(form, weight, x, None, offsets), torch.float32)


@pytest.mark.parametrize("offsets", [[2, 5, 9], [0, 0, 9], [9, 9, 9], [3, 3, 6], [0, 0, 0]],
                         ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_experts(offsets, index):
    """Empty experts do nothing, and rows past the last end belong to none: they give 0."""
    form, named = plain.example(("mask",), ("shift", "salient.mask"), rows=3, columns=10, parts=2,
                                experts=3)
    x, bias = torch.randn(9, 10, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    weight, ends = plain.dense(form, named), torch.tensor(offsets, dtype=index)
    for own in (None, bias):
        y = ops.packed_linear(x, *pieces(form, named), own, ends)
        compare(y, plain.linear(form, weight, x, own, offsets))
        assert not y[offsets[-1]:].any()
    grad = torch.randn(9, 6, dtype=torch.float64)
    dx = torch.ops.bitlm.packed_linear_dx(grad, *pieces(form, named), ends)
    slices = [grad[start:end] @ weight[e]
              for e, (start, end) in enumerate(zip([0, *offsets[:-1]], offsets, strict=True))]
    compare(dx, torch.cat([*slices, torch.zeros(9 - offsets[-1], 10, dtype=torch.float64)]))


@pytest.mark.parametrize("few", FEW)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_dx(few, dtype):
    form, named = plain.example(**FEW[few])
    grad = torch.randn(2, 3, form.rows, dtype=dtype)
    compare(torch.ops.bitlm.packed_linear_dx(grad, *pieces(form, named)),
            grad.double() @ plain.dense(form, named), dtype)


# --- packed_embedding ----------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
def test_embedding(terms, shape):
    form, named = plain.example(("mask", "trits"), terms, rows=7, columns=10, group_size=4)
    ids = torch.randint(0, 7, shape)
    compare(ops.packed_embedding(ids, *pieces(form, named), torch.float64),
            embedding(ids, plain.dense(form, named)))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_embedding_repeats_and_types(index):
    form, named = plain.example(("signs",), ("salient.mask",), rows=9, columns=11)
    ids = torch.tensor([8, 0, 8, 3, 3], dtype=index)
    compare(ops.packed_embedding(ids, *pieces(form, named), torch.bfloat16),
            plain.dense(form, named)[ids], torch.bfloat16)
    with pytest.raises(IndexError):
        ops.packed_embedding(torch.tensor([9]), *pieces(form, named), torch.float32)


def test_an_embedding_has_one_part():
    form, named = plain.example(parts=2)
    with pytest.raises(ValueError, match="one part"):
        ops.packed_embedding(torch.tensor([0]), *pieces(form, named), torch.float32)


# --- gradients -----------------------------------------------------------------------------------

@pytest.mark.parametrize("few", FEW)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_are_those_of_a_dense_linear(few, with_bias):
    form, named = plain.example(**FEW[few])
    weight = plain.dense(form, named)
    x = torch.randn(2, 3, form.columns, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(form.rows, dtype=torch.float64, requires_grad=True) if with_bias else None
    inputs = [x, bias] if with_bias else [x]
    grad = torch.randn(2, 3, form.rows, dtype=torch.float64)
    packed = torch.autograd.grad(ops.packed_linear(x, *pieces(form, named), bias), inputs, grad)
    dense = torch.autograd.grad(dense_linear(x, weight, bias), inputs, grad)
    for one, other in zip(packed, dense, strict=True):
        compare(one, other)


def test_gradcheck():
    form, named = plain.example(**FEW["everything"])
    x = torch.randn(2, form.columns, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(form.rows, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, bias: ops.packed_linear(x, *pieces(form, named), bias), (x, bias))


@pytest.mark.parametrize("offsets", [[2, 2, 7], [0, 4, 4], [9, 9, 9]], ids=str)
def test_gradients_of_experts(offsets):
    form, named = plain.example(("mask",), ("shift",), rows=4, columns=10, experts=3)
    weight, ends = plain.dense(form, named), torch.tensor(offsets, dtype=torch.int32)
    x = torch.randn(9, 10, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(9, 4, dtype=torch.float64)
    packed = torch.autograd.grad(ops.packed_linear(x, *pieces(form, named), bias, ends),
                                 (x, bias), grad)
    starts = [0, *offsets[:-1]]
    dense = torch.cat([dense_linear(x[start:end], weight[e], bias[e])
                       for e, (start, end) in enumerate(zip(starts, offsets, strict=True))])
    expected = torch.autograd.grad(dense, (x, bias), grad[:offsets[-1]])
    for one, other in zip(packed, expected, strict=True):
        compare(one, other)


def test_expert_bias_gradients_of_low_precision_are_summed_in_float32():
    form, named = plain.example(("signs",), rows=2, columns=8, experts=2)
    bias = torch.zeros(2, 2, requires_grad=True)
    x = torch.zeros(600, 8, dtype=torch.bfloat16)
    ends = torch.tensor([300, 600], dtype=torch.int32)
    ops.packed_linear(x, *pieces(form, named), bias, ends).sum().backward()
    assert torch.equal(bias.grad, torch.full((2, 2), 300.0))


def test_no_gradient_without_need():
    form, named = plain.example(**FEW["plain"])
    tensors = pieces(form, named)
    assert not ops.packed_linear(torch.randn(2, 24), *tensors).requires_grad
    assert not ops.packed_embedding(torch.tensor([1]), *tensors, torch.float32).requires_grad
    bias = torch.zeros(form.rows, requires_grad=True)
    y = ops.packed_linear(torch.randn(2, 24), *tensors, bias)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.full((form.rows,), 2.0))


# --- as torch ops --------------------------------------------------------------------------------

@pytest.mark.parametrize("few", FEW)
def test_opcheck(few):
    form, named = plain.example(**FEW[few])
    tensors, text = pieces(form, named)
    x = torch.randn(3, form.columns, requires_grad=True)
    bias = torch.randn(form.rows, requires_grad=True)
    check = torch.library.opcheck
    check(torch.ops.bitlm.dequantize.default, (tensors, text, torch.bfloat16))
    check(torch.ops.bitlm.packed_linear.default, (x, tensors, text))
    check(torch.ops.bitlm.packed_linear.default, (x, tensors, text, bias))
    check(torch.ops.bitlm.packed_linear_dx.default, (torch.randn(3, form.rows), tensors, text))
    if form.parts == 1:
        check(torch.ops.bitlm.packed_embedding.default,
              (torch.tensor([[1, 2]]), tensors, text, torch.float32))


def test_opcheck_of_experts():
    form, named = plain.example(("mask",), ("salient.mask",), rows=4, columns=10, experts=3)
    tensors, text = pieces(form, named)
    x, ends = torch.randn(6, 10, requires_grad=True), torch.tensor([2, 2, 5], dtype=torch.int32)
    bias = torch.randn(3, 4, requires_grad=True)
    check = torch.library.opcheck
    check(torch.ops.bitlm.dequantize.default, (tensors, text, torch.float32))
    check(torch.ops.bitlm.packed_linear.default, (x, tensors, text, bias, ends))
    check(torch.ops.bitlm.packed_linear_dx.default, (torch.randn(6, 4), tensors, text, ends))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("few", FEW)
def test_compile(few, backend):
    torch.compiler.reset()
    form, named = plain.example(**FEW[few])
    tensors, text = pieces(form, named)

    def step(x, bias):
        y = ops.packed_linear(x.relu(), tensors, text, bias)
        return (y * 2).sum(-1) + ops.dequantize(tensors, text, torch.float32).sum()

    x, bias = torch.randn(3, form.columns), torch.randn(form.rows)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for batch in (x, torch.randn(5, form.columns)):
        inputs = [t.clone().requires_grad_() for t in (batch, bias)]
        result = torch.autograd.grad(compiled(*inputs).sum(), inputs)
        expected = torch.autograd.grad(step(*inputs).sum(), inputs)
        torch.testing.assert_close(compiled(*inputs), step(*inputs))
        torch.testing.assert_close(result, expected)


def test_compile_embedding_and_experts():
    torch.compiler.reset()
    form, named = plain.example(("signs",), ("salient.mask",), rows=9, columns=12)
    tensors, text = pieces(form, named)
    expert_form, expert_named = plain.example(("mask",), rows=4, columns=12, experts=3)
    experts, expert_text = pieces(expert_form, expert_named)

    def step(ids, ends):
        x = ops.packed_embedding(ids, tensors, text, torch.float32)
        return ops.packed_linear(x, experts, expert_text, None, ends)

    ids, ends = torch.tensor([3, 1, 4, 1, 5, 8]), torch.tensor([2, 2, 5], dtype=torch.int32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, ends), step(ids, ends))


@pytest.mark.parametrize("few", FEW)
def test_export(few):
    form, named = plain.example(**FEW[few])

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i, tensor in enumerate(named.values()):
                self.register_buffer(f"tensor{i}", tensor)

        def forward(self, x):
            return ops.packed_linear(x, list(self.buffers()), form.text).relu()

    layer, x = Layer(), torch.randn(4, form.columns)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    other = torch.randn(7, form.columns)
    torch.testing.assert_close(program.module()(other), layer(other))
