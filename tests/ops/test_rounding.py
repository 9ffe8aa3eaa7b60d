"""Activation modes: the rounding itself, and what of a weight reads rounded inputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from bitlm.ops import packed_linear, reference
from bitlm.ops.rounding import rounded
from bitlm.ops.structs import ACTIVATIONS
from bitlm.scheme import ACTIVATIONS as OF_SCHEMES
from tests.ops import plain
from tests.ops.test_reference import KINDS, TERMS

X = torch.tensor([[-4.0, -1.5, -0.5, 0.0, 0.5, 1.5, 4.0, 4.0]])  # mean of |x| is 2


def test_schemes_have_the_same_modes():
    assert ACTIVATIONS == OF_SCHEMES


@pytest.mark.parametrize("mode, expected", [
    ("float", X[0].tolist()),
    ("int2", [-3, -1, -1, 1, 1, 1, 3, 3]),
    ("int1", [-2, -2, -2, 2, 2, 2, 2, 2]),
    ("uint1", [0, 0, 0, 0, 0, 0, 4, 4]),
])
def test_levels(mode, expected):
    assert rounded(X, mode).tolist() == [expected]


def test_levels_of_a_given_step():
    x = torch.tensor([-1.0, -0.2, 0.2, 0.6, 1.2, 9.0])
    step = torch.tensor(0.5)
    assert rounded(x, "uint2", step).tolist() == [0, 0, 0, 0.5, 1, 1.5]
    assert rounded(x, "int2", step).tolist() == [-0.75, -0.25, 0.25, 0.75, 0.75, 0.75]
    assert rounded(x, "uint1", step).tolist() == [0, 0, 0, 0.5, 0.5, 0.5]
    assert rounded(x, "int1", step).tolist() == [-0.5, -0.5, 0.5, 0.5, 0.5, 0.5]
    mean = torch.tensor([0.0, 1.0, 2.0, 9.0])
    a = 2 * 3 / 3 ** 0.5
    assert torch.allclose(rounded(mean, "uint2"), torch.tensor([0, 0, a, 3 * a]))


@pytest.mark.parametrize("mode, most", [("int8", 127), ("int16", 32512)])
def test_integers(mode, most):
    x = torch.randn(5, 40) * torch.tensor([1e-3, 1, 10, 1e5, 0]).unsqueeze(-1)
    y = rounded(x, mode)
    step = x.abs().amax(-1, keepdim=True) / most
    assert ((x - y).abs() <= step / 2 * 1.001).all()
    integers = (y / step.clamp(min=1e-30)).double()
    assert (integers - integers.round()).abs().max() < 0.01
    assert not torch.equal(x, y) and torch.equal(y[-1], x[-1])


def test_tokens_that_are_not_finite_stay():
    x = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0], [1.0, 0.3]])
    for mode in ACTIVATIONS:
        y = rounded(x, mode)
        assert torch.equal(y[:2].nan_to_num(7.0), x[:2].nan_to_num(7.0))
        assert mode == "float" or not torch.equal(y[2], x[2])


@pytest.mark.parametrize("parts, experts", [(1, 0), (2, 3)])
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("terms", TERMS, ids="+".join)
@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_the_terms_are_the_weight(kinds, terms, ratio, parts, experts, monkeypatch):
    """With a rounding that changes nothing the terms together are the dense weight."""
    monkeypatch.setattr(reference, "rounded", lambda x, activation, step: x)
    form, named = plain.example(kinds, terms, plane_ratio=ratio, parts=parts, experts=experts)
    x = torch.randn(4, form.columns, dtype=torch.float64)
    offsets = torch.tensor([1, 1, 4]) if experts else None
    arguments = x, list(named.values()), form.text, None, offsets
    y = reference.packed_linear(*arguments, "int8")
    expected = reference.packed_linear(*arguments)
    assert (y - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_what_is_rounded_alone():
    """Each input by itself: columns of a plane, salient columns, chains; low rank not at all."""
    form, named = plain.example(("signs",), ("low_rank",), rows=4, columns=16)
    x = torch.randn(3, 16)
    low = (x @ named["low_rank.v"][0].float().T) @ named["low_rank.u"].float().T
    bare = dict(list(named.items())[:2])
    plane = plain.dense(form, bare).float()
    y = reference.packed_linear(x, list(named.values()), form.text, None, None, "int1")
    torch.testing.assert_close(y, low + linear(rounded(x, "int1"), plane))

    form, named = plain.example(("signs",), ("salient.columns",), rows=4, columns=16)
    columns = named["salient.columns"][0].long()
    whole = plain.dense(form, named).float()
    rest = x.clone()
    rest[:, columns] = 0
    expected = linear(rounded(x[:, columns], "int8"), whole[:, columns])
    whole[:, columns] = 0
    expected += linear(rounded(rest, "int8"), whole)
    y = reference.packed_linear(x, list(named.values()), form.text, None, None, "int8")
    torch.testing.assert_close(y, expected)


def test_gradients_pass_straight_through():
    form, named = plain.example(("signs",), rows=6, columns=12)
    x = torch.randn(2, 12, requires_grad=True)
    packed_linear(x, list(named.values()), form.text, None, None, "int1").sum().backward()
    dense = plain.dense(form, named).float()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, 12))
