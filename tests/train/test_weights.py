"""Fake-quant weights: what they dequantize to, bit for bit, their gradients, and the notes."""

import copy

import pytest
import torch
from torch import nn

from bitlm.methods import EncodeError, encode
from bitlm.ops import dequantize
from bitlm.ops.form import Form, check
from bitlm.scheme import Scheme, SchemeError
from bitlm.train.coded import code
from bitlm.train.estimators import ESTIMATORS, row_unit
from bitlm.train.weights import (
    FrozenSalient,
    LearnedScales,
    MeasuredScales,
    quantizer,
    second_basis,
)

ROW = Scheme(group_size="row", scale_dtype="float32")
SMALL = torch.tensor([[.9, -.4, .1, -.2], [-.6, .3, .05, 1.5]])
SIZES = [1, 3, 32, 128, "row", "tensor"]
SHAPES = [(1, 1), (5, 13), (16, 64), (7, 172)]


def random_weight(rows, columns, scale=.02, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * columns)
    weight = torch.randn(rows, columns, generator=generator) * scale
    if rows >= 7:
        weight[1] = 0
        weight[2] = scale
        weight[3, columns // 2] = 100 * scale
    return weight.to(dtype)


def ready(scheme, weight, hessian=None, **options):
    """Return a quantizer initialised from the weight."""
    made = quantizer(scheme, tuple(weight.shape), **options)
    made.initialise(weight, hessian)
    return made


def dense(made, weight, dtype=torch.float32):
    """Return what the packed weight dequantizes to, after the format's own checks."""
    tensors, scheme = made.encode(weight), made.scheme
    form = Form(*weight.shape, tuple(tensors), scheme.columns_per_scale(weight.shape[1]),
                scheme.plane_ratio)
    assert check(form, {n: tuple(t.shape) for n, t in tensors.items()},
                 {n: t.dtype for n, t in tensors.items()}) == []
    return dequantize(list(tensors.values()), form.text, dtype)


def test_the_noise_of_fda_is_in_the_gradient_alone():
    weight = random_weight(16, 64)
    plain, noisy = (ready(ROW, weight, estimator="fda", noise=noise) for noise in (False, True))
    grads = []
    for made in (plain, noisy):
        own = weight.clone().requires_grad_()
        values = made(own)
        assert torch.equal(values, dense(made, weight))
        values.backward(torch.ones_like(weight))
        grads.append(own.grad)
    wanted = weight.clone().requires_grad_()
    noise = noisy.noise(wanted, noisy.amount, row_unit(weight))
    noise.backward(torch.ones_like(weight))
    assert wanted.grad.any() and noisy.noise.up.grad.any()
    torch.testing.assert_close(grads[1] - grads[0], wanted.grad)


def same(one, two):
    assert one.keys() == two.keys() and list(one) == list(two)
    for name in one:
        assert one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]), name


def grad_of(made, weight, upstream):
    weight = weight.clone().requires_grad_()
    made.zero_grad()
    made(weight).backward(upstream)
    return weight.grad


def close(actual, expected, tolerance=2e-6):
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected, dtype=actual.dtype),
                               atol=tolerance, rtol=tolerance)


# --- trained and packed agree, bit for bit -------------------------------------------------------

MEASURED = [Scheme(center=center) for center in ("none", "threshold", "drop", "shift")]
MEASURED += [Scheme("ternary", center=center, levels=levels) for center in ("none", "drop", "shift")
             for levels in ("tbt", "twn", "absmean")]
MEASURED += [Scheme("ternary", trits=True), Scheme(planes=2), Scheme(planes=3, center="shift"),
             Scheme(planes=2, refit=3), Scheme("ternary", refit=2), Scheme("ternary", 2),
             Scheme("grid", 2), Scheme("grid", 8, center="shift")]
LEARNED = [Scheme(center=center) for center in ("none", "threshold", "drop", "shift")]
LEARNED += [Scheme("ternary", center=center) for center in ("none", "drop", "shift")]
LEARNED += [Scheme("ternary", trits=True), Scheme(planes=2), Scheme(planes=2, refit=5)]
SALIENT = [Scheme("salient", salient=.1).replace(**changes) for changes in (
    {}, {"center": "shift"}, {"salient_scope": "tensor"}, {"salient_layout": "columns"},
    {"salient_statistics": "diluted", "center": "shift"}, {"salient": .5}, {"salient": 1.0},
    {"salient": .001})]
CASES = ([(scheme, False) for scheme in MEASURED] + [(scheme, True) for scheme in LEARNED]
         + [(scheme, False) for scheme in SALIENT])


def names(cases):
    return [f"{s.to_dict()}{' learned' if learned else ''}" for s, learned in cases]


@pytest.mark.parametrize("scheme, learned", CASES, ids=names(CASES))
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_forward_is_what_encode_dequantizes_to(scheme, learned, scale_dtype):
    for shape in SHAPES:
        weight = random_weight(*shape)
        for size in SIZES:
            made = ready(scheme.replace(group_size=size, scale_dtype=scale_dtype), weight,
                         learned=learned)
            same(made.encode(weight), encode(weight, made.scheme).tensors)
            assert torch.equal(made(weight), dense(made, weight)), (shape, size)
            # After a step, where scales that were measured once would be off.
            moved = weight + .01 * torch.randn_like(weight)
            with torch.no_grad():
                for parameter in made.parameters():
                    parameter += .002 * torch.randn_like(parameter)
            assert torch.equal(made(moved), dense(made, moved)), (shape, size)
            if type(made) is MeasuredScales:
                same(made.encode(moved), encode(moved, made.scheme).tensors)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("scheme", [Scheme(group_size=32), Scheme("ternary", group_size="row"),
                                    Scheme(group_size=32, center="threshold")])
def test_a_weight_of_several_chunks_of_the_encoder(scheme, learned):
    weight = torch.randn(700, 500) * .02
    made = ready(scheme, weight, learned=learned)
    same(made.encode(weight), encode(weight, scheme).tensors)
    assert torch.equal(made(weight), dense(made, weight))


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("scheme, learned", [
    (Scheme(group_size=32), False), (Scheme(group_size="row", center="threshold"), False),
    (Scheme(group_size=32, center="shift"), True), (Scheme(group_size="row", planes=2), True),
    (Scheme("ternary", group_size=32, center="shift"), False),
    (Scheme("ternary", group_size="row"), True),
    (Scheme("salient", group_size=32, salient=.1), False)])
def test_every_estimator_agrees_with_its_packed_form(name, scheme, learned):
    weight = random_weight(7, 172)
    if name == "biper" and scheme.method != "binary":
        with pytest.raises(SchemeError, match="biper"):
            quantizer(scheme, (7, 172), learned=learned, estimator=name)
        return
    made = ready(scheme, weight, learned=learned, estimator=name)
    for parameter in (None, 2.0):
        made.parameter = parameter
        assert torch.equal(made(weight), dense(made, weight))
        grad = grad_of(made, weight, torch.ones_like(weight))
        assert torch.isfinite(grad).all() and grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme, learned", [
    (Scheme(planes=2), True), (Scheme(planes=2), False), (Scheme("ternary", center="shift"), False),
    (Scheme("salient", salient=.2, center="shift"), False)])
def test_other_dtypes(scheme, learned, dtype):
    weight = random_weight(16, 200, dtype=dtype)
    made = ready(scheme, weight, learned=learned)
    now = made(weight.requires_grad_())
    assert now.dtype == dtype
    assert torch.equal(now, dense(made, weight, torch.float32).to(dtype))
    now.sum().backward()
    assert weight.grad.dtype == dtype


@pytest.mark.parametrize("factor", [1e7, 1e-6])
@pytest.mark.parametrize("scheme, learned", [
    (Scheme(), False), (Scheme(), True), (Scheme("ternary", center="shift"), True),
    (Scheme("salient", salient=.2), False)])
def test_scales_that_do_not_fit_float16(scheme, learned, factor):
    weight = random_weight(16, 64) * factor
    made = ready(scheme, weight, learned=learned)
    assert made.encode(weight)["plane0.scales"].dtype == torch.float32
    same(made.encode(weight), encode(weight, scheme).tensors)
    assert torch.equal(made(weight), dense(made, weight))


def test_a_zero_row_stays_zero():
    weight = random_weight(7, 32)
    for learned in (False, True):
        made = ready(Scheme(), weight, learned=learned)
        assert made.encode(weight)["plane0.scales"].dtype == torch.float16
        assert not made(weight)[1].any()


def test_sign_of_zero():
    weight = torch.tensor([[0.0, -0.0, 1, -1]])
    for learned in (False, True):
        made = ready(ROW, weight, learned=learned)
        assert made(weight).tolist() == [[.5, .5, .5, -.5]]
        assert made.encode(weight)["plane0.signs"].tolist() == [[0b0111]]


# --- measured scales -----------------------------------------------------------------------------

@pytest.mark.parametrize("scheme, expected", [
    (ROW, [[.4, -.4, .4, -.4], [-.6125, .6125, .6125, .6125]]),
    (ROW.replace(method="ternary"), [[.533333, -.533333, 0, 0], [-.816667, 0, 0, .816667]]),
    (ROW.replace(method="ternary", levels="twn"), [[.65, -.65, 0, 0], [-1.05, 0, 0, 1.05]]),
    (ROW.replace(center="threshold"), [[.4, -.4, -.4, -.4], [-.6125, -.6125, -.6125, .6125]]),
    (ROW.replace(center="threshold", group_size="tensor"),
     [[.50625, -.50625, -.50625, -.50625], [-.50625, .50625, -.50625, .50625]]),
])
def test_tbt_bwn_twn(scheme, expected):
    weight = SMALL.clone()
    weight[0, 2] -= 1e-6  # at its row's mean: which side it falls is rounding
    made = ready(scheme, weight)
    close(made(weight), expected, 2e-6)
    upstream = torch.randn(2, 4)
    assert torch.equal(grad_of(made, weight, upstream), upstream)


def test_the_paper_form_of_tbt_clips():
    weight, upstream = SMALL.clone(), torch.randn(2, 4)
    for method, scale in (("binary", 1), ("ternary", 4 / 3)):
        made = ready(ROW.replace(method=method, center="drop"), weight, clip=True)
        rest = weight - weight.mean(1, keepdim=True)
        inside = rest.abs() < scale * rest.abs().mean(1, keepdim=True)
        assert 0 < inside.sum() < 8
        close(grad_of(made, weight, upstream), upstream * inside)


def test_an_estimator_looks_at_normalised_weights():
    weight, upstream = random_weight(6, 64), torch.randn(6, 64)
    made = ready(Scheme(group_size=16), weight, estimator="ede", parameter=2.0)
    z = weight / row_unit(weight)
    close(grad_of(made, weight, upstream), upstream * 2 * (1 - (2 * z).tanh() ** 2))
    made = ready(Scheme(group_size="row", center="threshold"), weight, estimator="bireal", unit=.05)
    z = (weight - weight.mean(1, keepdim=True)) / .05
    close(grad_of(made, weight, upstream), upstream * (2 - 2 * z.abs()).clamp(min=0), 1e-5)


@pytest.mark.parametrize("levels", ["tbt", "twn"])
def test_a_ternary_estimator_follows_both_steps(levels):
    weight = random_weight(6, 64)
    made = ready(Scheme("ternary", group_size=16, levels=levels, scale_dtype="float32"), weight,
                 estimator="bireal")
    sizes = weight.view(6, 4, 16).abs().mean(-1).repeat_interleave(16, 1)
    cut, unit = sizes * (2 / 3 if levels == "tbt" else .7), weight.abs().mean(1, keepdim=True)
    expected = sum((2 - 2 * ((weight + side * cut) / unit).abs()).clamp(min=0) / 2
                   for side in (1, -1))
    close(grad_of(made, weight, torch.ones(6, 64)), expected, 1e-5)


def test_biper_codes_are_those_of_the_sine():
    weight = random_weight(6, 64, scale=1.0)
    made = ready(ROW, weight, estimator="biper", unit=1.0)
    codes = torch.where((20 * weight).sin() >= 0, 1.0, -1.0)
    assert not torch.equal(codes, weight.sign())
    close(made(weight), codes * weight.abs().mean(1, keepdim=True))
    close(grad_of(made, weight, torch.ones(6, 64)), 20 * (20 * weight).cos(), 1e-4)


def test_a_schedule_sets_the_parameter():
    weight = random_weight(6, 64)
    made = ready(ROW, weight, estimator="reste")
    ones = torch.ones(6, 64)
    assert (grad_of(made, weight, ones)[weight.abs() < 1.5 * row_unit(weight)] == 1).all()
    made.parameter = 3.0
    assert grad_of(made, weight, ones).max() > 4


# --- learned scales ------------------------------------------------------------------------------

def test_binary_dm():
    scheme = ROW.replace(planes=2)
    made = ready(scheme, SMALL, learned=True, estimator="clipped", unit=1.0)
    close(made.scales, [[.4], [.6125]])
    close(made.second_scales, [[.25], [.44375]])
    weight = SMALL.clone()
    weight[0, 1] += 1e-6  # its residual is an exact tie
    made.scales.data[0], made.second_scales.data[0] = .4, .25
    now = made(weight)
    close(now, [[.65, -.15, .15, -.15], [-.16875, .16875, .16875, 1.05625]])
    assert float((now[1] - weight[1]).detach().square().sum()) == pytest.approx(.414219, abs=1e-5)
    upstream = torch.tensor([[1., 2, 3, 4]] * 2)
    grad = grad_of(made, weight, upstream)
    close(made.scales.grad, [[-1.5], [4.45]])
    close(made.second_scales.grad, [[2 + 2], [0]])  # the note has B2 = 0 at the tie
    close(grad, [[.55, 1.1, 1.65, 2.2], [.784453, 1.568906, 2.353359, 1.775]])


def test_gradients_are_those_of_the_chain_rule():
    """Against the formulas of learnable_multibasis.md with any factor."""
    weight, upstream = random_weight(5, 40), torch.randn(5, 40)
    made = ready(ROW.replace(planes=2), weight, learned=True, estimator="bireal")
    grad = grad_of(made, weight, upstream)
    s1, s2, unit = made.scales.data, made.second_scales.data, row_unit(weight)
    b1 = torch.where(weight >= 0, 1.0, -1.0)
    rest = weight - s1 * b1
    b2 = torch.where(rest >= 0, 1.0, -1.0)
    f1, f2 = ((2 - 2 * (x / unit).abs()).clamp(min=0) for x in (weight, rest))
    close(grad, upstream * (s1 * f1 * (1 - s2 * f2) + s2 * f2))
    close(made.scales.grad, (upstream * b1 * (1 - s2 * f2)).sum(1, keepdim=True), 1e-5)
    close(made.second_scales.grad, (upstream * b2).sum(1, keepdim=True), 1e-5)


def test_least_squares_start():
    made = ready(ROW.replace(planes=2, refit=1), SMALL[1:], learned=True)
    close(made.scales, [[.908333]])
    close(made.second_scales, [[.591667]])
    assert float((made(SMALL[1:]) - SMALL[1:]).detach().square().sum()) == pytest.approx(.151667,
                                                                                        abs=1e-5)


def test_evolving_to_one_basis():
    weight = random_weight(5, 40)
    made = ready(Scheme(group_size="row", planes=2), weight, learned=True)
    layers = nn.ModuleList([made, copy.deepcopy(made), ready(Scheme(), weight, learned=True),
                            ready(Scheme(), weight)])
    layers[1].second_scales.data *= 3
    close(second_basis(layers), 2 * made.second_scales.mean(), 1e-6)
    second_basis(layers).backward()
    close(made.second_scales.grad, torch.full((5, 1), .1))
    for layer in layers[:2]:
        layer.drop_second()
        assert list(layer.state_dict()) == ["scales"] and layer.scheme.planes == 1
        assert sorted(layer.encode(weight)) == ["plane0.scales", "plane0.signs"]
        assert torch.equal(layer(weight), dense(layer, weight))
    with pytest.raises(ValueError, match="no weight of this model has two learned bases"):
        second_basis(layers)
    again = quantizer(made.scheme, (5, 40), learned=True)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(weight), made(weight))


def test_bivit():
    weight = SMALL.clone()
    weight[0, 2] -= 1e-6
    made = ready(ROW.replace(center="threshold"), weight, learned=True, estimator="clipped",
                 unit=1.0)
    close(made.scales, [[.4], [.6125]])
    close(made(weight), made.scales * torch.tensor([[1., -1, -1, -1], [-1, -1, -1, 1]]))
    upstream = torch.tensor([[1., 2, 3, 4], [5, 6, 7, 8]])
    grad = grad_of(made, weight, upstream)
    close(made.scales.grad, [[1 - 2 - 3 - 4.], [-5 - 6 - 7 + 8]])
    inside = (weight - weight.mean(1, keepdim=True)).abs() <= 1
    close(grad, upstream * inside * made.scales)
    assert not inside[1, 3]


def test_learned_scales_follow_a_gradient_and_stay_positive():
    weight = random_weight(4, 64)
    made = ready(Scheme(group_size=32), weight, learned=True)
    target = 3 * weight.detach()
    optimizer = torch.optim.Adam(made.parameters(), lr=2e-3)
    before = float((made(weight) - target).detach().square().sum())
    for _ in range(60):
        optimizer.zero_grad()
        (made(weight) - target).square().sum().backward()
        optimizer.step()
    assert float((made(weight) - target).detach().square().sum()) < .7 * before
    assert torch.equal(made(weight), dense(made, weight))
    made.scales.data[0, 0] = -.01
    made.zero_grad()
    now = made(weight)
    assert not now[0, :32].any() and torch.equal(now, dense(made, weight))
    (-(now * weight.sign())).sum().backward()
    assert float(made.scales.grad[0, 0]) == pytest.approx(-32, abs=1)  # a step brings it back


def test_a_learned_scale_for_all():
    weight, upstream = random_weight(6, 20), torch.randn(6, 20)
    made = ready(Scheme("ternary", group_size="tensor"), weight, learned=True)
    assert made.scales.shape == (1, 1)
    assert made.encode(weight)["plane0.scales"].shape == (6, 1)
    grad = grad_of(made, weight, upstream)
    codes = made(weight).sign()
    close(made.scales.grad, (upstream * codes).sum().view(1, 1), 1e-5)
    close(grad, upstream * made.scales.half().float())


# --- frozen salient weights ----------------------------------------------------------------------

def test_pb_llm_layer():
    scheme = Scheme("salient", group_size="tensor", salient=.25, scale_dtype="float32")
    made = ready(scheme, SMALL)
    assert made.mask.nonzero().tolist() == [[0, 0], [1, 3]]
    now = made(SMALL)
    close(now[~made.mask], [-.275, .275, -.275, -.275, .275, .275])
    close(now[made.mask], [.9, 1.5], 4e-3)  # 8 bits
    grad = grad_of(made, SMALL, torch.arange(1., 9).view(2, 4))
    close(grad, [[0, .55, .825, 1.1], [1.375, 1.65, 1.925, 0]])
    rows = ready(scheme.replace(group_size="row", salient_scope="tensor"), SMALL)
    close(rows.encode(SMALL)["plane0.scales"], [[.233333], [.316667]])


@pytest.mark.parametrize("layout", ["elements", "columns"])
def test_salient_weights_stay(layout):
    weight = random_weight(16, 64)
    made = ready(Scheme("salient", salient=.1, salient_layout=layout), weight)
    before = made(weight)[made.mask]
    moved = weight * 1.7  # weight decay, and a range that has grown
    assert torch.equal(made(moved)[made.mask], before)
    assert torch.equal(made(moved), dense(made, moved))
    again = quantizer(made.scheme, (16, 64))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(moved), made(moved))
    same(again.encode(moved), made.encode(moved))


def test_salience_by_hessian():
    weight = random_weight(16, 64)
    mix = torch.randn(200, 64) * torch.linspace(.1, 3, 64)
    hessian = mix.T @ mix
    scheme = Scheme("salient", salient=.1, salient_metric="hessian", group_size=32)
    made = ready(scheme, weight, hessian)
    same(made.encode(weight), encode(weight, scheme, hessian).tensors)
    with pytest.raises(EncodeError, match="layer.weight needs the Hessian"):
        ready(scheme, weight, name="layer.weight")


# --- as modules ----------------------------------------------------------------------------------

def test_scales_keep_float32_when_the_model_is_cast():
    weight = random_weight(8, 64)
    learned = ready(Scheme(), weight, learned=True)
    salient = ready(Scheme("salient", salient=.1), weight)
    before = [m(weight.bfloat16()) for m in (learned, salient)]
    for made, old in zip((learned, salient), before):
        made.to(torch.bfloat16)
        assert made.scales.dtype == torch.float32
        assert torch.equal(made(weight.bfloat16()), old)


@pytest.mark.parametrize("scheme, learned", [(Scheme(), False), (Scheme(planes=2), True),
                                             (Scheme("salient", salient=.1), False)])
def test_a_skeleton_on_the_meta_device(scheme, learned):
    weight = random_weight(8, 64)
    made = ready(scheme, weight, learned=learned)
    with torch.device("meta"):
        skeleton = quantizer(scheme, (8, 64), learned=learned)
    shapes = {name: t.shape for name, t in made.state_dict().items()}
    assert {name: t.shape for name, t in skeleton.state_dict().items()} == shapes
    skeleton.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(skeleton(weight), made(weight))


@pytest.mark.parametrize("scheme, learned, kind, state", [
    (Scheme("ternary"), False, MeasuredScales, []),
    (Scheme(), True, LearnedScales, ["scales"]),
    (Scheme(planes=2), True, LearnedScales, ["scales", "second_scales"]),
    (Scheme("salient", salient=.1), False, FrozenSalient, ["mask", "codes", "scales", "zeros"]),
])
def test_kinds(scheme, learned, kind, state):
    made = quantizer(scheme, (4, 8), learned=learned)
    assert type(made) is kind and list(made.state_dict()) == state
    assert "estimator=identity" in repr(made)


def test_code_is_the_encoders():
    weight = random_weight(7, 100)
    coded = code(weight, Scheme("ternary", 2, 32, "shift"))
    assert coded.codes.shape == (2, 7, 100) and coded.scales.shape == (2, 7, 4)
    assert coded.shift.shape == (7, 4) and coded.dtype == torch.float16
    same(coded.tensors(Scheme("ternary", 2, 32, "shift")),
         encode(weight, Scheme("ternary", 2, 32, "shift")).tensors)


# --- refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("scheme, options, words", [
    (Scheme(compensate=True), {}, "use compensate false"),
    (Scheme("unknown"), {}, "unknown method"),
    (Scheme(), {"estimator": "step"}, "unknown estimator"),
    (Scheme(planes=2), {"estimator": "ede"}, "use planes 1"),
    (Scheme(planes=2), {"clip": True}, "use planes 1"),
    (Scheme(), {"clip": True, "learned": True}, "clip is for measured scales"),
    (Scheme(planes=3), {"learned": True}, "learned scales are for one plane"),
    (Scheme(planes=2, center="drop"), {"learned": True}, "two of method binary with center none"),
    (Scheme("ternary", 2), {"learned": True}, "learned scales are for one plane"),
    (Scheme("grid", 4), {"learned": True}, "learned scales are for one plane"),
    (Scheme("salient", 2, salient=.1), {}, "planes 1"),
])
def test_schemes_that_cannot_be_trained(scheme, options, words):
    with pytest.raises(ValueError, match=words):
        quantizer(scheme, (4, 8), **options)


@pytest.mark.parametrize("scheme, learned", [(Scheme(), True),
                                             (Scheme("salient", salient=.1), False)])
def test_before_it_is_initialised(scheme, learned):
    made = quantizer(scheme, (4, 8), learned=learned, name="layer.weight")
    for use in (made, made.encode):
        with pytest.raises(EncodeError, match="layer.weight has .*initialise them"):
            use(torch.ones(4, 8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_weight_names_itself(value):
    weight = random_weight(4, 8)
    kinds = [ready(Scheme(), weight, name="layer.weight"),
             ready(Scheme(), weight, name="layer.weight", learned=True),
             ready(Scheme("salient", salient=.1), weight, name="layer.weight")]
    weight[1, 2] = value
    for made in kinds:
        with pytest.raises(EncodeError, match="layer.weight has NaN.*training has diverged"):
            made(weight)
