"""The format table as data: names, the form as text, and what `check` says of wrong tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitlm.ops import form as forms
from bitlm.ops.form import Form, check, parse
from tests.ops import plain

EVERYTHING = dict(kinds=("signs", "mask", "trits"), rows=4, columns=20, group_size=8)
TERMS = ("columns", "zones", "shift", "input_scales", "chains", "low_rank")


def problems(form, named, **changes):
    """Check a weight with some tensors replaced; None takes one away."""
    named = {n: t for n, t in (named | changes).items() if t is not None}
    return check(form, {n: tuple(t.shape) for n, t in named.items()},
                 {n: t.dtype for n, t in named.items()})


@pytest.mark.parametrize("form", [
    Form(3, 7, ("plane0.signs", "plane0.scales"), 7),
    Form(48, 256, ("plane0.trits", "plane0.scales", "shift"), 128, 2, 2, 8),
    Form(1, 1, (), 1),
])
def test_text_round_trip(form):
    assert parse(form.text) == form
    assert isinstance(form.text, str) and parse(form.text).text == form.text


def test_forms_that_differ_differ_as_text():
    form = Form(8, 16, ("plane0.signs", "plane0.scales"), 4)
    others = [replace(form, **{field: 9}) for field in
              ("rows", "columns", "group_size", "plane_ratio", "parts", "experts")]
    others.append(replace(form, names=form.names[::-1]))
    assert len({other.text for other in (form, *others)}) == 8


@pytest.mark.parametrize("columns, group_size, groups", [(128, 128, 1), (129, 128, 2), (1, 1, 1),
                                                         (96, 40, 3), (7, 128, 1)])
def test_groups(columns, group_size, groups):
    assert Form(1, columns, (), group_size).groups == groups


def test_numbers_of_planes_and_chains():
    names = {"plane10.signs", "plane2.signs", "plane2.scales", "chain0.left", "shift", "low_rank.u"}
    assert forms.planes(names) == [2, 10] and forms.chains(names) == [0]
    assert forms.kind("plane10.signs") == "plane.signs" and forms.kind("shift") == "shift"


def test_row_of_salient_values_depends_on_the_layout():
    assert forms.row("salient.values", ("salient.mask",)).axes == ("P", "M")
    assert forms.row("salient.values", ("salient.columns",)).axes == ("N", "S")


@pytest.mark.parametrize("name", ["plane0.bits", "gamma", "plane.signs0", "low_rank.w", "planes"])
def test_unknown_names(name):
    with pytest.raises(KeyError):
        forms.row(name, (name,))


@pytest.mark.parametrize("seed", range(60))
def test_right_weights_have_no_problem(seed):
    form, named = plain.any_example(seed)
    assert problems(form, named) == []


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("terms", [(*TERMS, "salient.mask"), (*TERMS, "salient.columns"),
                                   ("rank",)])
def test_every_tensor_is_checked(terms, experts):
    form, named = plain.example(terms=terms, experts=experts, **EVERYTHING)
    for name, tensor in named.items():
        assert f"{name} is missing" in problems(form, named, **{name: None})
        wrong_rank = problems(form, named, **{name: tensor.unsqueeze(0)})
        assert any(p.startswith(f"{name} has shape [1, ") for p in wrong_rank), wrong_rank
        wrong_type = problems(form, named, **{name: tensor.to(torch.int64)})
        assert any(p.startswith(f"{name} is int64, expected") for p in wrong_type), wrong_type
        scalar = problems(form, named, **{name: tensor.flatten()[0]})
        assert any(p.startswith(f"{name} has shape []") for p in scalar), scalar
        if experts:
            fewer = problems(form, named, **{name: tensor[1:]})
            assert any(p.startswith(f"{name} has shape [1, ") for p in fewer), fewer


@pytest.mark.parametrize("shape", [(), (4,), (2, 2), (1, 2, 3, 4)])
@pytest.mark.parametrize("experts", [0, 2])
def test_hostile_shapes_are_described(shape, experts):
    form, named = plain.example(terms=("columns", "chain", "low_rank", "salient.columns"),
                                experts=experts, **EVERYTHING)
    for name, tensor in named.items():
        found = problems(form, named, **{name: tensor.new_zeros(shape)})
        if tuple(tensor.shape) != shape:
            assert found, name


def test_messages():
    form, named = plain.example(("mask",), ("shift",), rows=4, columns=20, group_size=8)
    assert problems(form, named, **{"plane0.signs": torch.zeros(4, 2, dtype=torch.uint8)}) == [
        "plane0.signs has shape [4, 2], expected [4, 3]"]
    assert problems(form, named, shift=torch.zeros(4, 3, dtype=torch.bfloat16)) == [
        "shift is bfloat16, expected float16 or float32"]
    assert problems(form, named, **{"plane0.mask": torch.zeros(4, 3, dtype=torch.int8)}) == [
        "plane0.mask is int8, expected uint8"]
    assert problems(form, named, input_scales=torch.ones(1, 20)) == [
        "input_scales is not part of this weight"]
    assert problems(form, {}) == [f"{name} is missing" for name in form.names]


def test_free_axes_are_named_in_messages():
    form, named = plain.example((), ("low_rank", "salient.mask"), rows=4, columns=20)
    assert problems(form, named, **{"salient.values": torch.zeros(5, dtype=torch.uint8)}) == [
        "salient.values has shape [5], expected [1, 'M']"]
    assert problems(form, named, **{"low_rank.u": torch.zeros(5, 2)}) == [
        "low_rank.u has shape [5, 2], expected [4, 'r']"]


def test_sizes_that_come_from_the_data_must_agree():
    form, named = plain.example(("signs", "mask"), ("columns", "chain", "low_rank",
                                                    "salient.columns"), rows=4, columns=20)
    fewer = problems(form, named, **{"plane1.columns": named["plane1.columns"][:, :8]})
    assert fewer == ["plane1.signs has shape [4, 2], expected [4, 1]",
                     "plane1.mask has shape [4, 2], expected [4, 1]",
                     "plane1.scales has shape [4, 2], expected [4, 1]"]
    assert problems(form, named, **{"chain0.right": named["chain0.right"][:, :2]}) == [
        "chain0.rank_scales has shape [1, 3], expected [1, 2]"]
    assert problems(form, named, **{"low_rank.v": named["low_rank.v"][:, :1]}) == [
        "low_rank.v has shape [1, 1, 20], expected [1, 2, 20]"]
    assert problems(form, named, **{"salient.values": named["salient.values"][:, :5]}) == [
        "salient.values has shape [4, 5], expected [4, 6]"]
    form, named = plain.example(("signs",), ("rank",), rows=4, columns=20)
    assert problems(form, named, **{"plane0.row_scales": named["plane0.row_scales"][:, :2]}) == [
        "plane0.column_scales has shape [1, 3, 20], expected [1, 2, 20]"]


@pytest.mark.parametrize("names, problem", [
    (("plane0.signs",), "plane0 has signs, it needs"),
    (("plane0.mask", "plane0.scales"), "plane0 has mask, scales"),
    (("plane0.signs", "plane0.row_scales"), "plane0 has row_scales, signs"),
    (("plane0.signs", "plane0.scales", "salient.mask", "salient.values"), "salient has mask"),
    (("plane0.signs", "plane0.scales", "low_rank.u"), "low_rank has u, it needs u, v"),
    (("plane0.signs", "plane0.scales", "chain0.left", "chain0.right"), "chain0 has left, right"),
])
def test_terms_that_lack_a_tensor(names, problem):
    assert problem in forms.incomplete(Form(8, 16, names, 8))[0]


def test_only_plane_0_of_a_grid_needs_scales():
    names = ("plane0.signs", "plane0.scales", "plane1.signs")
    assert forms.incomplete(Form(8, 16, names, 8, plane_ratio=2)) == []
    assert forms.incomplete(Form(8, 16, names, 8)) != []


@pytest.mark.parametrize("form, problem", [
    (forms.Form(9, 16, ("plane0.signs", "plane0.scales"), 8, parts=2),
     "9 rows do not divide into 2 parts"),
    (forms.Form(8, 16, ("plane0.signs", "plane0.trits", "plane0.scales"), 8),
     "plane0 has signs and trits"),
    (forms.Form(8, 16, ("plane0.signs", "plane0.zones", "plane0.row_scales",
                        "plane0.column_scales"), 8), "plane0 has zones and row_scales"),
    (forms.Form(8, 16, ("plane0.signs", "plane0.scales", "plane1.signs", "plane1.scales"), 8,
                plane_ratio=2), "plane1 has scales, but its scales are those of plane0"),
    (forms.Form(8, 16, ("plane0.signs", "plane0.scales", "plane1.signs", "plane1.zones"), 8,
                plane_ratio=2), "plane1 has zones"),
])
def test_what_cannot_be_together(form, problem):
    found = forms.check(form, {}, {})
    assert [text for text in found if text.startswith(problem)]
