"""Every method against plain.py over shapes, groups, centers and scale types, and the edges."""

import math

import pytest
import torch

from bitlm.methods import EncodeError, Fit, encode, register, registry, statistics_needed
from bitlm.methods.levels import TERNARY, stored
from bitlm.scheme import Scheme, SchemeError
from tests.methods import plain
from tests.methods.encoded import close, dense, random_hessian, random_weight, through

SHAPES = [(1, 1), (3, 5), (16, 64), (7, 172), (64, 130)]
SIZES = [1, 3, 7, 32, 128, "row", "tensor"]
KINDS = [("binary", planes, center) for planes in (1, 2, 3)
         for center in ("none", "threshold", "drop", "shift")]
KINDS += [("ternary", planes, center) for planes in (1, 2) for center in ("none", "drop", "shift")]
KINDS += [("grid", planes, center) for planes in (2, 5, 8) for center in ("none", "shift")]


def awkward(rows, columns):
    """A random weight; where there is room: a zero row, a constant row, a row with an outlier."""
    weight = random_weight(rows, columns, seed=rows * columns)
    if rows >= 7:
        weight[1] = 0
        weight[2] = 0.125
        weight[3, columns // 2] = 40
    return weight


@pytest.mark.parametrize("method, planes, center", KINDS)
@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
def test_against_plain(method, planes, center, scale_dtype):
    for shape in SHAPES:
        # The largest shape is slow in plain Python: one plane shows its short last group.
        if shape[0] == 64 and planes != (2 if method == "grid" else 1):
            continue
        weight = awkward(*shape)
        for size in SIZES:
            scheme = Scheme(method, planes, size, center, scale_dtype=scale_dtype)
            now, encoded = through(weight, scheme)
            used = str(encoded.tensors["plane0.scales"].dtype).removeprefix("torch.")
            expected = torch.tensor(plain.encode(weight.double().tolist(),
                                                 scheme.replace(scale_dtype=used)))
            off = 2e-3 if used == "float16" else 1e-5
            # A last digit of a stored scale may differ, and with it a code on the edge.
            tolerance = off * weight.abs().amax(1, keepdim=True).clamp(min=1e-3)
            if size == "tensor":
                tolerance = tolerance.max()
            wrong = (now - expected).abs() > tolerance
            if method == "grid":
                wrong &= ((now - weight).abs() - (expected - weight).abs()).abs() > tolerance
            # Groups of three make exact ties, which single and double precision break differently.
            assert wrong.sum() <= wrong.numel() // 500, (shape, size)
            error = float((now - weight).norm() / weight.norm())
            assert encoded.relative_error == pytest.approx(error, rel=1e-4, abs=1e-6)
            assert encoded.group_size == scheme.columns_per_scale(shape[1])
            if shape[0] >= 7 and size != "tensor":
                assert not now[1].any()
                if method == "grid" and center == "shift":
                    assert torch.equal(now[2], weight[2])


@pytest.mark.parametrize("levels", ["twn", "absmean"])
@pytest.mark.parametrize("size", [7, 32, "row", "tensor"])
def test_ternary_levels_against_plain(levels, size):
    weight = awkward(16, 64)
    scheme = Scheme("ternary", 2, size, levels=levels, scale_dtype="float32")
    now, _ = through(weight, scheme)
    close(now, plain.encode(weight.double().tolist(), scheme), 3e-5)


@pytest.mark.parametrize("planes, center, size", [(1, "none", 32), (1, "shift", "row"),
                                                  (2, "none", 7), (3, "shift", "tensor")])
def test_salient_against_plain(planes, center, size):
    weight = random_weight(16, 64)
    scheme = Scheme("salient", planes, size, center, salient=.1, scale_dtype="float32")
    now, encoded = through(weight, scheme)
    width = scheme.columns_per_scale(64)
    mask = torch.zeros(16, 64, dtype=torch.bool)
    for start in range(0, 64, width):
        part = weight[:, start:start + width].abs()
        chosen = part.flatten().sort(descending=True, stable=True).indices
        local = torch.zeros(part.numel(), dtype=torch.bool)
        local[chosen[:round(.1 * part.numel())]] = True
        mask[:, start:start + width] = local.view(part.shape)
    assert encoded.tensors["salient.values"].shape == (1, int(mask.sum()))
    expected = torch.tensor(plain.encode(weight.double().tolist(), scheme, (~mask).int().tolist()))
    close(now[~mask], expected.float()[~mask], 3e-5)
    step = (weight.amax(1) - weight.amin(1)) / 255
    assert ((now - weight).abs()[mask] <= .501 * step[:, None].expand(16, 64)[mask]).all()
    signs = torch.tensor([[(int(byte) >> bit) & 1 for byte in row for bit in range(8)]
                          for row in encoded.tensors["plane0.signs"]], dtype=torch.bool)
    assert not (signs & mask).any()


@pytest.mark.parametrize("scope, count", [("group", 8), ("tensor", 6)])
def test_salient_columns(scope, count):
    weight = random_weight(16, 64)
    weight[:, 5] *= 10
    scheme = Scheme("salient", group_size=16, salient=.1, salient_layout="columns",
                    salient_scope=scope)
    now, encoded = through(weight, scheme)
    columns = encoded.tensors["salient.columns"][0].tolist()
    assert 5 in columns and columns == sorted(columns) and len(columns) == count
    if scope == "group":
        assert [sum(c // 16 == g for c in columns) for g in range(4)] == [2, 2, 2, 2]
    step = (weight.amax(1) - weight.amin(1)) / 255
    assert ((now - weight)[:, columns].abs() <= .57 * step[:, None]).all()


def test_salient_ties_and_extremes():
    weight = torch.ones(4, 8)
    now, encoded = through(weight, Scheme("salient", salient=.25))
    assert encoded.tensors["salient.mask"].tolist() == [[255], [0], [0], [0]]
    close(now, weight, 2e-3)
    every, encoded = through(random_weight(4, 8), Scheme("salient", salient=1.0))
    assert encoded.tensors["salient.values"].shape == (1, 32)
    close(every, random_weight(4, 8), 1e-3)
    _, encoded = through(random_weight(2, 2), Scheme("salient", salient=.01))
    assert encoded.tensors["salient.values"].shape == (1, 0)
    zero, _ = through(torch.zeros(3, 9), Scheme("salient", salient=.3, center="shift"))
    assert not zero.any()


# --- refit ---------------------------------------------------------------------------------------

REFITTED = [Scheme(planes=2), Scheme(planes=3, center="shift"), Scheme(center="shift"),
            Scheme(planes=2, center="drop"), Scheme("ternary"), Scheme("ternary", levels="twn"),
            Scheme("ternary", 2, center="shift"), Scheme("salient", 2, salient=.1),
            Scheme("grid", 3), Scheme("grid", 3, center="shift"), Scheme(planes=6)]


@pytest.mark.parametrize("scheme", REFITTED)
@pytest.mark.parametrize("size", [1, 5, 32, "row", "tensor"])
def test_refit_never_worse(scheme, size):
    weight = awkward(12, 70)
    scheme = scheme.replace(group_size=size)
    greedy, _ = through(weight, scheme)
    refitted, _ = through(weight, scheme.replace(refit=5))
    if scheme.center == "drop":  # there the target is the weight without its group's mean
        assert torch.isfinite(refitted).all()
        return
    before, after = ((now - weight).square() for now in (greedy, refitted))
    slack = 1e-6 * weight.square().sum()
    assert after.sum() <= before.sum() + slack
    if size in ("row", 32):
        assert (after.sum(1) <= before.sum(1) + 1e-5 * weight.square().sum(1)).all()
    if size != "tensor":
        assert not refitted[1].any()


@pytest.mark.parametrize("scheme", [Scheme(planes=3, refit=4), Scheme("ternary", 2, refit=4),
                                    Scheme(planes=4, refit=4, center="shift"),
                                    Scheme("ternary", refit=4)])
def test_refit_takes_nearest_levels(scheme):
    weight = random_weight(6, 50)
    now, _ = through(weight, scheme)
    for row, old in zip(now, weight, strict=True):
        levels = row.unique()
        nearest = levels[(old[:, None] - levels).abs().argmin(1)]
        close((row - old).abs(), (nearest - old).abs())


def test_refit_solves_the_normal_equations():
    weight = random_weight(1, 200)
    now, encoded = through(weight, Scheme(planes=2, refit=100, group_size="row", center="shift",
                                          scale_dtype="float32"))
    a, b = (float(encoded.tensors[f"plane{p}.scales"]) for p in (0, 1))
    assert a >= b > 0
    error = weight - now
    assert abs(float(error.mean())) < 1e-6
    assert abs(float((error * now).mean())) < 1e-7


def test_refit_beats_greedy_on_a_uniform_weight():
    weight = torch.linspace(-1, 1, 512)[None]
    greedy, refitted = (encode(weight, Scheme(planes=4, refit=r, group_size="row")).relative_error
                        for r in (0, 10))
    assert refitted < 1.01 / 16 and refitted <= greedy + 1e-6


# --- edges ---------------------------------------------------------------------------------------

def test_zero_weight_and_sign_of_zero():
    for method in ("binary", "ternary", "grid"):
        scheme = Scheme(method, 2)
        now, encoded = through(torch.zeros(3, 9), scheme)
        assert not now.any() and encoded.relative_error == 0
    _, encoded = through(torch.tensor([[0.0, -0.0, 1.0, -1.0]]), Scheme())
    assert encoded.tensors["plane0.signs"].tolist() == [[0b0111]]


@pytest.mark.parametrize("factor, dtype", [(1, torch.float16), (1e7, torch.float32),
                                           (1e-6, torch.float32), (1e20, torch.float32)])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(planes=2, center="shift", refit=3),
                                    Scheme("ternary"), Scheme("grid", 4), Scheme(compensate=True),
                                    Scheme("salient", salient=.1)])
def test_scales_out_of_half_range(factor, dtype, scheme):
    weight = random_weight(8, 40) * factor
    now, encoded = through(weight, scheme, torch.eye(40))
    assert {t.dtype for n, t in encoded.tensors.items() if n.endswith((".scales", "shift"))
            and not n.startswith("salient")} == {dtype}
    usual, _ = through(random_weight(8, 40), scheme, torch.eye(40))
    close(now / factor, usual, 2e-3)


def test_one_small_group_makes_the_weight_float32():
    weight = random_weight(4, 256)
    weight[2, 128:] *= 1e-7
    now, encoded = through(weight, Scheme())
    assert encoded.tensors["plane0.scales"].dtype == torch.float32
    assert now[2, 128:].abs().min() > 0


def test_small_shift_and_later_planes_stay_half():
    weight = torch.tensor([[.1, -.1, .1, -.1 + 1e-5]])
    _, encoded = through(weight, Scheme(center="shift"))
    assert encoded.tensors["shift"].dtype == torch.float16
    assert 0 < abs(float(encoded.tensors["shift"])) < 6e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights(bad):
    weight = random_weight(5, 9).to(torch.bfloat16)
    weight[1, 2] = weight[4, 8] = weight[0, 0] = bad
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(EncodeError) as caught:
        encode(weight, Scheme(), name=name)
    assert str(caught.value) == (f"{name} has 3 NaN or infinite values: repair the checkpoint or "
                                 "leave it out with --skip")
    assert isinstance(caught.value, ValueError)


def test_large_finite_weights():
    big = torch.full((2, 8), 3e38)
    big[0, ::2] *= -1
    with pytest.raises(EncodeError, match="w has values too large"):
        encode(big.double() * 1e10, Scheme(), name="w")


def test_hessian_messages():
    weight = random_weight(4, 6)
    for scheme in (Scheme(compensate=True), Scheme("salient", salient=.1,
                                                   salient_metric="hessian")):
        assert statistics_needed(scheme) == "hessian"
        with pytest.raises(EncodeError, match="^w needs the Hessian"):
            encode(weight, scheme, name="w")
        with pytest.raises(EncodeError, match=r"w: the Hessian is \[5, 5\]"):
            encode(weight, scheme, torch.eye(5), name="w")
        bad = torch.eye(6)
        bad[2, 3] = math.nan
        with pytest.raises(EncodeError, match="w: the Hessian of its inputs has NaN"):
            encode(weight, scheme, bad, name="w")
    assert statistics_needed(Scheme()) == "none"


@pytest.mark.parametrize("scheme, word", [
    (Scheme("nonsense"), "unknown method 'nonsense'"), (Scheme("grid"), "2 to 8"),
    (Scheme("grid", 4, center="drop"), "center"), (Scheme(salient=.1), "method salient"),
    (Scheme("salient"), "salient above 0"), (Scheme("ternary", center="threshold"), "threshold"),
    (Scheme(center="threshold", refit=1), "threshold"), (Scheme(trits=True), "trits"),
    (Scheme("salient", 2, salient=.1, salient_statistics="diluted"), "diluted"),
    (Scheme("ternary", 5, refit=1), "at most 4"),
])
def test_schemes_that_make_no_sense(scheme, word):
    with pytest.raises(SchemeError, match=word):
        encode(random_weight(2, 8), scheme)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16,
                                   torch.float8_e4m3fn])
def test_input_dtypes(dtype):
    weight = random_weight(6, 40).to(dtype)
    for scheme in (Scheme(planes=2, refit=2), Scheme("salient", salient=.2, compensate=True)):
        first = encode(weight, scheme, torch.eye(40))
        second = encode(weight.float(), scheme, torch.eye(40))
        assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in second.tensors)


def test_input_is_left_alone_and_results_repeat():
    for scheme in (Scheme(planes=3, refit=3), Scheme("salient", 2, salient=.1).calibrated(),
                   Scheme("ternary", group_size="tensor", compensate=True)):
        weight, hessian = random_weight(40, 1).T.contiguous(), random_hessian(40)
        weight = torch.cat([weight, random_weight(7, 40)])
        before, hessian_before = weight.clone(), hessian.clone()
        first, second = (encode(weight, scheme, hessian) for _ in range(2))
        assert torch.equal(weight, before) and torch.equal(hessian, hessian_before)
        assert all(torch.equal(first.tensors[n], second.tensors[n]) for n in first.tensors)
        one_row = encode(weight[:1], scheme, hessian)  # [1, K] transposes to the same memory
        assert torch.equal(weight, before) and one_row.relative_error > 0


def test_chunks_do_not_show(monkeypatch):
    from bitlm.methods import encoding
    weight = random_weight(33, 70)
    for scheme in (Scheme(planes=2, refit=2), Scheme("salient", salient=.1, group_size=16),
                   Scheme("ternary", group_size="tensor", trits=True)):
        whole = encode(weight, scheme, random_hessian(70))
        monkeypatch.setitem(encoding.CHUNK, "cpu", 200)
        pieces = encode(weight, scheme, random_hessian(70))
        monkeypatch.undo()
        assert all(torch.equal(whole.tensors[n], pieces.tensors[n]) for n in whole.tensors)
        assert whole.output_error == pytest.approx(pieces.output_error, rel=1e-5)


def test_a_hessian_does_not_change_data_free_encoding():
    weight = random_weight(9, 33)
    for scheme in (Scheme(planes=2, refit=3), Scheme("salient", salient=.2)):
        with_it, without = encode(weight, scheme, random_hessian(33)), encode(weight, scheme)
        assert all(torch.equal(with_it.tensors[n], without.tensors[n]) for n in without.tensors)
        assert with_it.output_error > 0 and without.output_error is None


def test_trits_are_the_same_codes():
    weight, hessian = random_weight(5, 43), random_hessian(43)
    for scheme in (Scheme("ternary", 2, 16), Scheme("ternary", compensate=True, refit=2)):
        plain_form, _ = through(weight, scheme, hessian)
        small, encoded = through(weight, scheme.replace(trits=True), hessian)
        assert torch.equal(plain_form, small)
        assert "plane0.trits" in encoded.tensors and "plane0.signs" not in encoded.tensors


def test_a_method_is_one_function_and_one_registration():
    """A toy: ternary planes at the group's largest magnitude, zero below a quarter of it."""
    def fit(weights, mask, scheme, dtype):
        scales = stored(weights.abs().amax(1, keepdim=True), dtype)
        return Fit(scales, None, lambda new: TERNARY.code(new, scales / 4).unsqueeze(0))

    scheme = Scheme("toy", group_size=4, trits=True)
    with pytest.raises(SchemeError, match="unknown method 'toy'"):
        encode(torch.eye(4), scheme)
    register("toy", codes="ternary")(fit)
    try:
        weight = torch.tensor([[1., .2, -.3, 0, .5]])
        now, _ = through(weight, scheme)
        assert now.tolist() == [[1, 0, -1, 0, .5]]
        compensated, _ = through(random_weight(6, 12), scheme.replace(compensate=True),
                                 random_hessian(12))
        assert torch.isfinite(compensated).all()
    finally:
        del registry.METHODS["toy"]


def test_dense_in_double_is_the_same():
    weight = random_weight(5, 20)
    scheme = Scheme("grid", 8, center="shift")
    encoded = encode(weight, scheme)
    close(dense(encoded, 5, 20, scheme, torch.float64).float(), dense(encoded, 5, 20, scheme), 1e-6)
