"""Every estimator against the value table of the notes, and how it acts as a gradient."""

import math

import pytest
import torch

from bitlm.train.estimators import (
    ESTIMATORS,
    FourierNoise,
    biper_coefficient,
    biper_penalty,
    ede_sharpness,
    fda_noise,
    fda_terms,
    reste_order,
    row_unit,
    sign,
    straight_through,
)

X = [-2, -1.2, -1, -.75, -.3, -.05, 0, .05, .3, .75, 1, 1.2, 2]
# f(x) for x >= 0; every factor is even.
TABLE = [
    ("identity", None, [1, 1, 1, 1, 1, 1, 1]),
    ("clipped", None, [1, 1, 1, 1, 1, 0, 0]),
    ("bireal", None, [2, 1.9, 1.4, .5, 0, 0, 0]),
    ("ede", .1, [1, 1, .9991, .9944, .9901, .9857, .9610]),
    ("ede", 1, [1, .9975, .9151, .5966, .4200, .3050, .0707]),
    ("ede", 10, [10, 7.8645, .0987, 0, 0, 0, 0]),
    ("fda", 9, [1.2732, 1.2711, 1.1984, .8475, .5798, 0, 0]),
    ("fda", 17, [2.2918, 2.2795, 1.8719, .3631, -.2822, 0, 0]),
    ("biper", 20, [20, 10.8060, 19.2034, -15.1938, 8.1616, 8.4836, -13.3388]),
    ("reste", 1, [1, 1, 1, 1, 1, 1, 0]),
    ("reste", 1.5, [2.1544, 2.1544, .9959, .7338, .6667, .6274, 0]),
    ("reste", 3, [4.6416, 4.6416, .7438, .4038, .3333, .2952, 0]),
    ("smoothsign", None, [100, .0182, 0, 0, 0, 0, 0]),
    ("tanh", None, [1.001, .9985, .9161, .5976, .4210, .3060, .0717]),
]
NAMES = [name for name in ESTIMATORS if name != "identity"]


def gradient(x, upstream=None, **how):
    x = torch.as_tensor(x).clone().requires_grad_()
    y = sign(x, **how)
    y.backward(torch.ones_like(y) if upstream is None else upstream)
    return y.detach(), x.grad


def test_the_table_has_every_name():
    assert sorted(ESTIMATORS) == sorted({name for name, _, _ in TABLE})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, parameter, positive", TABLE)
def test_values(name, parameter, positive, dtype):
    expected = torch.tensor(positive[:0:-1] + positive, dtype=dtype)
    y, grad = gradient(torch.tensor(X, dtype=dtype), name=name, parameter=parameter)
    torch.testing.assert_close(grad, expected, atol=6e-5, rtol=0)
    assert y.dtype == grad.dtype == dtype
    signs = [-1] * 6 + [1] * 7
    if name == "biper":
        signs = [-1, 1, -1, -1, 1, -1, 1, 1, -1, 1, 1, -1, 1]  # sign(sin 20x)
    assert y.tolist() == signs


def test_the_series_of_fda():
    x = torch.linspace(-1.5, 1.5, 401, dtype=torch.float64)
    x[3] = 10 * math.pi
    _, grad = gradient(x, name="fda", parameter=12)
    series = sum(torch.cos((2 * i + 1) * .1 * x) for i in range(13)) * .4 / math.pi
    torch.testing.assert_close(grad, series * (x.abs() <= 1))


def test_zero_is_positive():
    y, _ = gradient(torch.tensor([0.0, -0.0]))
    assert y.tolist() == [1, 1]


@pytest.mark.parametrize("function, values", [
    (reste_order, [1, 1.1522, 1.5858, 2.2346, 3]),
    (lambda p: ede_sharpness(p, first=1e-3), [.001, .01, .1, 1, 10]),
    (ede_sharpness, [.1, 10 ** -.5, 1, 10 ** .5, 10]),
    (fda_terms, [9, 11, 13, 15, 18]),
    (fda_noise, [.1, .085355, .05, .014645, 0]),
    (biper_coefficient, [0, 0, 0, 0, 0]),
])
def test_schedules(function, values):
    assert [function(step / 4) for step in range(5)] == pytest.approx(values, abs=5e-5)


def test_schedules_are_in_the_table():
    scheduled = {name: known.schedule for name, known in ESTIMATORS.items() if known.schedule}
    assert set(scheduled) == {"ede", "fda", "reste"}
    assert scheduled["fda"](1.0) == 18 and scheduled["reste"](1.0) == 3
    assert ede_sharpness(1, last=5) == pytest.approx(5)
    assert reste_order(1, last=10) == pytest.approx(10) and fda_terms(1, 3, 2) == 5


def test_biper_coefficient_is_exponential():
    ends = [biper_coefficient(p, .01, .037) for p in (0, .5, 1)]
    assert ends[0] == .01 and ends[2] == pytest.approx(.037)
    a = .027 / (math.e - 1)
    assert ends[1] == pytest.approx(a * math.exp(.5) + .01 - a)


@pytest.mark.parametrize("name", NAMES)
def test_the_unit_moves_the_factor_and_not_the_gradient(name):
    """At weights of a transformer the factor is what it is at unit size."""
    x = torch.randn(8, 64, dtype=torch.float64)
    parameter = ESTIMATORS[name].normalised
    _, large = gradient(x, name=name, parameter=parameter, unit=torch.ones(8, 1))
    _, small = gradient(x * .02, name=name, parameter=parameter, unit=torch.full((8, 1), .02))
    torch.testing.assert_close(small, large, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_it_acts_at_the_size_of_weights(name):
    """Normalised, every factor varies over a row of small weights and stays of order one."""
    weight = torch.randn(4, 512) * .02
    _, grad = gradient(weight, name=name, unit=row_unit(weight),
                       parameter=reste_order(1) if name == "reste" else
                       1.0 if name == "ede" else ESTIMATORS[name].normalised)
    assert grad.std() > .05 and .1 < grad.abs().mean() < 2
    assert (grad.abs() > .05).float().mean() > .3


def test_row_unit():
    weight = torch.tensor([[1.0, -3.0], [0, 0]], dtype=torch.bfloat16)
    assert row_unit(weight).tolist() == [[2.0], [1.0]]
    assert row_unit(weight).dtype == torch.float32


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_incoming_gradient_is_not_written_to(name):
    upstream = torch.randn(13)
    kept = upstream.clone()
    _, grad = gradient(torch.tensor(X), upstream, name=name)
    assert torch.equal(upstream, kept)
    _, factor = gradient(torch.tensor(X), name=name)
    torch.testing.assert_close(grad, kept * factor)


def test_a_shared_gradient_reaches_other_consumers_whole():
    x, other = (torch.tensor([-2.0, .5, 3.0], requires_grad=True) for _ in range(2))
    (sign(x, "clipped") + other).sum().backward()
    assert x.grad.tolist() == [0, 1, 0] and other.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = torch.tensor(X, dtype=dtype)
    y, grad = gradient(x, name="ede", parameter=1.0)
    assert y.dtype == grad.dtype == dtype
    _, exact = gradient(x.float(), name="ede", parameter=1.0)
    torch.testing.assert_close(grad.float(), exact, atol=4e-3, rtol=0)


def test_the_real_stage_of_biper():
    x = torch.tensor(X, dtype=torch.float64)
    y, grad = gradient(x, name="biper", real=True)
    torch.testing.assert_close(y, (20 * x).sin())
    torch.testing.assert_close(grad, 20 * (20 * x).cos())
    unit = torch.tensor([.02])
    y, grad = gradient(x * .02, name="biper", parameter=.8, unit=unit, real=True)
    torch.testing.assert_close(y, (.8 * x).sin(), atol=1e-6, rtol=0)
    torch.testing.assert_close(grad, .8 * (.8 * x).cos(), atol=1e-6, rtol=0)


def test_a_ternary_code_has_the_gradient_of_its_two_steps():
    x = torch.tensor([-1.5, -.5, 0, .4, .6, 3], requires_grad=True)
    cut = torch.tensor(.5)
    codes = torch.tensor([-1., 0, 0, 0, 1, 1])
    y = straight_through(x, codes, "bireal", cut=cut)
    y.sum().backward()
    assert torch.equal(y, codes)
    # 2 - 2|x -+ .5|, half of the sum
    torch.testing.assert_close(x.grad, torch.tensor([0, 1, 1, 1, .9, 0]))
    x.grad = None
    straight_through(x, codes, cut=cut).sum().backward()
    assert x.grad.tolist() == [1] * 6


def test_gradients_of_gradients_keep_the_factor():
    x = torch.tensor([.25, 2.0], requires_grad=True)
    upstream = torch.ones(2, requires_grad=True)
    grad, = torch.autograd.grad(sign(x, "bireal"), x, upstream, create_graph=True)
    back, = torch.autograd.grad(grad.sum(), upstream)
    assert back.tolist() == [1.5, 0]


@pytest.mark.parametrize("call, words", [
    (lambda x: sign(x, "step"), "unknown estimator 'step': the estimators are identity, clipped"),
    (lambda x: straight_through(x, x, "step"), "unknown estimator"),
    (lambda x: sign(x, "ede", real=True), "'ede' has no real form"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(3))


def test_biper_penalty():
    weight = torch.tensor([[0, math.pi / 40, math.pi / 20]], dtype=torch.float64)
    assert float(biper_penalty(weight)) == pytest.approx(1 / 3)
    assert float(biper_penalty(weight, saturate=True)) == pytest.approx(2 / 3)
    assert float(biper_penalty(weight * 3, unit=torch.tensor(3.0))) == pytest.approx(1 / 3)
    near = torch.tensor([[.02]], requires_grad=True)
    biper_penalty(near).backward()
    assert near.grad > 0  # a step against it goes to the zero crossing
    near.grad = None
    biper_penalty(near, saturate=True).backward()
    assert near.grad < 0


def test_fourier_noise_has_a_gradient_and_no_value():
    noise = FourierNoise(130, seed=3)
    assert noise.down.shape == (2, 130) and noise.up.shape == (130, 2)
    assert torch.equal(noise.down, FourierNoise(130, seed=3).down)
    assert not torch.equal(noise.down, FourierNoise(130, seed=4).down)
    assert FourierNoise(8).down.shape == (1, 8)
    x = torch.randn(5, 130, requires_grad=True)
    y = noise(x, fda_noise(0))
    assert not y.any()
    upstream = torch.randn(5, 130)
    y.backward(upstream)
    plain = x.detach().clone().requires_grad_()
    weights = [noise.down.detach().clone().requires_grad_(),
               noise.up.detach().clone().requires_grad_()]
    real = .1 * ((plain @ weights[0].T).relu() @ weights[1].T + .1 * plain.sin())
    real.backward(upstream)
    torch.testing.assert_close(x.grad, plain.grad)
    torch.testing.assert_close(noise.down.grad, weights[0].grad)
    torch.testing.assert_close(noise.up.grad, weights[1].grad)


def test_fourier_noise_at_the_size_of_weights():
    noise = FourierNoise(64)
    large = torch.randn(3, 64, requires_grad=True)
    small = (large.detach() * .02).requires_grad_()
    noise(large, .1).sum().backward()
    noise(small, .1, torch.tensor(.02)).sum().backward()
    torch.testing.assert_close(small.grad, large.grad, atol=1e-6, rtol=1e-5)
    quiet = noise(large, fda_noise(1))
    assert not torch.autograd.grad(quiet.sum(), large)[0].any()


def test_nothing_is_kept_for_the_identity():
    x = torch.randn(4, requires_grad=True)
    y = sign(x)
    assert y.grad_fn.saved_tensors == ()
    y.sum().backward()
    assert x.grad.tolist() == [1] * 4
