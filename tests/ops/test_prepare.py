"""Prepared weights read back by their own description, and the stored tensors out of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitlm.ops import library, reference
from bitlm.ops.form import Form
from bitlm.ops.prepare import prepare
from bitlm.ops.restore import restorable, restore
from bitlm.ops.structs import BYTES, DWORDS
from tests.ops import blob, plain
from tests.ops.test_reference import KINDS, SIZES, TERMS
from tests.weights import random_weight

pytestmark = pytest.mark.skipif(library.load().library is None,
                                reason=str(library.load().reason))
both_orders = pytest.mark.parametrize("order", [BYTES, DWORDS], ids=["bytes", "dwords"])


def check(form, named, order):
    """Compare a prepared weight, and what comes back out of it, with the tensors."""
    made, origins = prepare(form, list(named.values()), order)
    expected = reference.dequantize(list(named.values()), form.text, torch.float64)
    got = blob.dense(made)
    assert got.shape == expected.shape
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error < 1e-6, float(error)
    names = restorable(origins, named)
    for name, tensor in restore(made, origins, {n: named[n].to("meta") for n in names}).items():
        assert torch.equal(tensor, named[name]), name
    return made, names


@both_orders
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_terms(kinds, terms, ratio, order):
    check(*plain.example(kinds, terms, plane_ratio=ratio), order)


@both_orders
@pytest.mark.parametrize("parts, experts", [(2, 0), (1, 3), (2, 3)])
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
def test_parts_and_experts(terms, parts, experts, order):
    check(*plain.example(("mask", "trits"), terms, parts=parts, experts=experts), order)


@both_orders
@pytest.mark.parametrize("size", [*SIZES.values(), dict(rows=130, columns=300, group_size=128),
                                  dict(rows=64, columns=256, group_size=32),
                                  dict(rows=65, columns=161, group_size=40)], ids=str)
@pytest.mark.parametrize("terms", [("shift", "salient.mask"), TERMS[-2], TERMS[-1]], ids="+".join)
def test_sizes(terms, size, order):
    for kinds in (("signs", "mask", "trits"), ("signs",) * 3):
        check(*plain.example(kinds, terms, **size), order)


@both_orders
@pytest.mark.parametrize("seed", range(60))
def test_any_weight(seed, order):
    check(*plain.any_example(seed), order)


@both_orders
def test_names_in_any_order(order):
    form, named = plain.example(("mask", "signs"), TERMS[-1], rows=6, columns=24, parts=2)
    backwards = dict(reversed(named.items()))
    check(replace(form, names=tuple(backwards)), backwards, order)


@both_orders
def test_strided_tensors(order):
    form, named = plain.example(("mask",), ("shift", "salient.mask"), rows=70, columns=40)
    strided = {n: torch.stack([t, t], dim=-1)[..., 0] for n, t in named.items()}
    whole, _ = prepare(form, list(named.values()), order)
    assert torch.equal(prepare(form, list(strided.values()), order)[0], whole)


@both_orders
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_write_the_same(threads, order):
    form, tensors = random_weight(700, 520, 128, ("binary", "trits"))
    one, _ = prepare(form, tensors, order)
    assert torch.equal(prepare(form, tensors, order, threads)[0], one)


def test_bits_past_the_last_column_mean_nothing():
    form, named = plain.example(("signs",), ("salient.mask",), rows=3, columns=13)
    expected = blob.dense(prepare(form, list(named.values()), BYTES)[0])
    for name in ("plane0.signs", "salient.mask"):
        named[name][:, -1] |= 0b11100000
    assert torch.equal(blob.dense(prepare(form, list(named.values()), BYTES)[0]), expected)


# --- what it is made of --------------------------------------------------------------------------


@pytest.mark.parametrize("kinds, terms, ratio, matrices", [
    (("signs",), (), 1, 1),
    (("signs",) * 8, (), 2, 1),  # one grid
    (("signs",) * 9, (), 2, 9),  # more bits than a grid has
    (("signs",) * 8, (), 1, 8),
    (("signs", "mask"), (), 2, 2),
    (("signs",), ("zones",), 1, 2),  # no ternary ones: they would take twice the memory
    (("mask",), ("zones", "shift"), 1, 3),
    (("signs",) * 2, ("rank",), 1, 2),
    (("signs",), ("chain",), 1, 3),
    (("signs",), ("salient.columns",), 1, 2),
    (("signs",), ("salient.mask",), 1, 1),
])
def test_number_of_matrices(kinds, terms, ratio, matrices):
    form, named = plain.example(kinds, terms, plane_ratio=ratio)
    made, _ = prepare(form, list(named.values()), BYTES)
    assert blob.count(made, "matrices") == matrices


def test_parts_without_a_difference_are_one():
    form, tensors = random_weight(128, 64, 32, ("binary",))
    fused = replace(form, parts=2)
    assert torch.equal(prepare(fused, tensors, BYTES)[0], prepare(form, tensors, BYTES)[0])


@both_orders
@pytest.mark.parametrize("kinds, terms, kept", [
    (("signs",), (), set()),
    (("mask", "trits"), ("shift",), set()),
    (("signs",) * 4, (), set()),
    (("signs",), ("input_scales",), {"input_scales"}),
    (("signs",), ("zones",), {"plane0.zones", "plane0.scales"}),
    (("mask",), ("salient.mask",), {"plane0.signs", "plane0.mask", "salient.mask",
                                    "salient.values", "salient.scales", "salient.zeros"}),
])
def test_what_can_be_read_back(kinds, terms, kept, order):
    form, named = plain.example(kinds, terms, rows=70, columns=50)
    _, names = check(form, named, order)
    assert set(named) - set(names) == kept


def test_one_bit_weights_take_little_more_than_a_bit():
    form, tensors = random_weight(1024, 1024, 128, ("binary",))
    made, _ = prepare(form, tensors, DWORDS)
    assert len(made) <= (1024 * 1024 // 8 + 1024 * 8 * 2) * 1.01
    assert made.data_ptr() % 64 == 0


def test_a_salient_list_that_is_too_short_is_refused():
    form, named = plain.example(("signs",), ("salient.mask",), rows=6, columns=24)
    named["salient.values"] = named["salient.values"][:, :-1]
    with pytest.raises(ValueError, match=r"salient.mask has more bits set than the \d+"):
        prepare(form, list(named.values()), BYTES)


@both_orders
@pytest.mark.parametrize("named", [
    {"plane0.signs": torch.zeros(4, 2, dtype=torch.uint8), "plane0.row_scales": torch.zeros(4, 0),
     "plane0.column_scales": torch.zeros(1, 0, 16)},
    {"plane0.signs": torch.zeros(4, 2, dtype=torch.uint8), "plane0.scales": torch.ones(4, 2),
     "salient.columns": torch.zeros(1, 0, dtype=torch.int32),
     "salient.values": torch.zeros(4, 0, dtype=torch.uint8), "salient.scales": torch.ones(4),
     "salient.zeros": torch.ones(4, dtype=torch.uint8)},
    {"plane0.signs": torch.zeros(4, 0, dtype=torch.uint8), "plane0.scales": torch.zeros(4, 0),
     "plane0.columns": torch.zeros(1, 0, dtype=torch.int32)},
    {"low_rank.u": torch.zeros(4, 0), "low_rank.v": torch.zeros(1, 0, 16)},
], ids=["rank 0", "no salient column", "no covered column", "no low rank"])
def test_terms_of_nothing(named, order):
    check(Form(4, 16, tuple(named), 8), named, order)


def test_a_weight_without_rows():
    named = {"plane0.signs": torch.zeros(0, 2, dtype=torch.uint8),
             "plane0.scales": torch.ones(0, 2)}
    made, _ = prepare(Form(0, 16, tuple(named), 8), list(named.values()), BYTES)
    assert blob.dense(made).shape == (0, 16)


@pytest.mark.parametrize("columns", ([3, 2], [0, 16], [-1, 4]))
def test_a_damaged_list_of_columns_is_refused(columns):
    named = {"plane0.signs": torch.zeros(4, 1, dtype=torch.uint8),
             "plane0.scales": torch.ones(4, 1),
             "plane0.columns": torch.tensor([columns], dtype=torch.int32)}
    with pytest.raises(ValueError, match="plane0.columns is not sorted or not within 0..15"):
        prepare(Form(4, 16, tuple(named), 8), list(named.values()), BYTES)
