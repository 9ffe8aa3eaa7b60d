"""The worked examples of the papers' notes, with their numbers."""

import pytest
import torch

from bitlm.methods import binary
from bitlm.methods.compensation import factor
from bitlm.methods.encoding import encode_with_mask
from bitlm.scheme import Scheme
from tests.methods.encoded import (
    PB_H,
    PB_W,
    PB_X,
    SMALL,
    close,
    dense,
    output_error,
    through,
    waves,
)

ROW = Scheme(group_size="row", scale_dtype="float32")
PB = ROW.replace(method="salient", salient=0.25, salient_metric="hessian", compensate=True,
                 scales_from="original")


def given(rows, columns, entries):
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for entry in entries:
        mask[entry] = True
    return mask


# --- TBT, BWN, TWN, BitNet (tbt.md h) ------------------------------------------------------------

@pytest.mark.parametrize("changes, expected", [
    ({}, [[.4, -.4, .4, -.4], [-.6, .6, .6, .6]]),
    ({"method": "ternary"}, [[.533333, -.533333, 0, 0], [-.8, 0, 0, .8]]),
    ({"center": "drop"}, [[.4, -.4, .4, -.4], [-.6, .6, -.6, .6]]),
    ({"center": "threshold"}, [[.4, -.4, -.4, -.4], [-.6, .6, -.6, .6]]),
    ({"center": "threshold", "group_size": "tensor"}, [[.5, -.5, -.5, -.5], [-.5, .5, -.5, .5]]),
    ({"method": "ternary", "center": "drop"}, [[.533333, -.533333, 0, -.533333], [-.8, 0, 0, .8]]),
    ({"method": "ternary", "levels": "twn"}, [[.65, -.65, 0, 0], [-1.05, 0, 0, 1.05]]),
    ({"method": "ternary", "levels": "twn", "group_size": "tensor"},
     [[.85, -.85, 0, 0], [-.85, 0, 0, .85]]),
])
def test_tbt(changes, expected):
    weight = SMALL.clone()
    if changes.get("center") in ("drop", "threshold"):
        # Entries exactly at the mean would decide by rounding: nudge them to their documented side.
        weight[0, 2] -= 1e-6 if changes["center"] == "threshold" else -1e-6
        weight[1, 1] += 1e-6
    now, _ = through(weight, ROW.replace(**changes))
    close(now, expected, 3e-6)


def test_tbt_ternary_error_and_shift():
    now, _ = through(SMALL, ROW.replace(method="ternary"))
    assert float((now - SMALL).square().sum()) == pytest.approx(0.822222, abs=1e-5)
    shifted, encoded = through(SMALL, ROW.replace(method="ternary", center="shift"))
    close(encoded.tensors["shift"], [[.1], [.3]])
    close(shifted, [[.633333, -.433333, .1, -.433333], [-.5, .3, .3, 1.1]])


def test_bitnet_absmean():
    weight = SMALL.clone()
    weight[1, 2] = 0.05
    now, encoded = through(weight, ROW.replace(method="ternary", levels="absmean",
                                               group_size="tensor"))
    close(encoded.tensors["plane0.scales"], [[.50625], [.50625]])
    close(now / .50625, [[1, -1, 0, 0], [-1, 1, 0, 1]])


# --- residual planes -----------------------------------------------------------------------------

def test_binary_dm_two_bases():
    weight = SMALL.clone()
    weight[1, 2] = 0.05
    now, encoded = through(weight, ROW.replace(planes=2))
    close(encoded.tensors["plane0.scales"], [[.4], [.6125]])
    close(encoded.tensors["plane1.scales"], [[.25], [.44375]])
    close(now[1], [-.16875, .16875, .16875, 1.05625])
    assert float((now[1] - weight[1]).square().sum()) == pytest.approx(.414219, abs=1e-5)
    refitted, encoded = through(weight[1:], ROW.replace(planes=2, refit=1))
    close(encoded.tensors["plane0.scales"], [[.908333]])
    close(encoded.tensors["plane1.scales"], [[.591667]])
    assert float((refitted - weight[1:]).square().sum()) == pytest.approx(.151667, abs=1e-5)


def test_billm_masked_residual():
    scheme = ROW.replace(center="shift")
    now, _ = through(PB_W, scheme)
    close(now, [[.414062, -.101562, .414062, -.101562, -.101562, -.101562, -.101562, .414062],
                [-.432813, .170313, .170313, -.432813, .170313, -.432813, .170313, .170313],
                [-.175, .375, -.175, .375, .375, -.175, -.175, .375],
                [-.175, -.175, .275, .275, -.175, .275, .275, -.175]])
    assert float((now - PB_W).square().sum()) == pytest.approx(1.802617, abs=1e-5)
    second, _ = through(PB_W, scheme.replace(planes=2))
    close(second[0], [.304590, -.211035, .652441, .136816, -.211035, .136816, -.211035, .304590])
    assert float((second - PB_W).square().sum()) == pytest.approx(.682310, abs=1e-5)


def test_billm_zones():
    """Salient columns by two orders, the rest by one order each for small and large weights."""
    scheme = ROW.replace(center="shift")
    salient = torch.zeros_like(PB_W, dtype=torch.bool)
    salient[:, 2:4] = True
    large = (PB_W.abs() >= .2) & ~salient
    now = torch.zeros_like(PB_W)
    for mask, planes in ((salient, 2), (large, 1), (~large & ~salient, 1)):
        fit = binary.fit(PB_W, mask, scheme.replace(planes=planes), torch.float32)
        now = torch.where(mask, fit.values(fit.assign(PB_W)), now)
    close(now, [[.366667, -.1, .9, .05, -.166667, .1, -.1, .366667],
                [-.25, .075, .3, -1.2, .075, -.125, .2, -.125],
                [.05, .528, -.15, .1, .528, -.208, -.208, .528],
                [-.094444, -.094444, .25, .15, -.372222, .405556, .061111, -.372222]])
    assert float((now - PB_W).square().mean()) == pytest.approx(.010798, abs=1e-5)


def test_bebr_codes_are_a_grid():
    f = torch.tensor([[.5, -.3, .8, -.1]])
    f = f / f.norm()
    now, encoded = through(f, ROW.replace(method="grid", planes=4))
    top = float(encoded.tensors["plane0.scales"])
    close(now / top, [[1.125, -.625, 1.875, -.125]])
    assert float(torch.cosine_similarity(now, f)) == pytest.approx(.998371, abs=1e-5)


# --- PB-LLM (pb_llm.md h) ------------------------------------------------------------------------

def test_pb_llm_factor():
    upper = factor(PB_H, 0.01, "w")
    close(upper.diagonal(), [1.315448, .636281, .447757, .427627, .439726, .298383, .421250,
                             .350770], 2e-5)
    close(upper[0], [1.315448, 1.699693, -.099988, -.954031, .289280, -.660973, .124218,
                     -1.222912], 5e-5)
    assert torch.equal(upper, upper.triu())
    damped = PB_H.double() + 0.1275 * torch.eye(8)
    close(upper.double().T @ upper.double() @ damped, torch.eye(8), 1e-4)


PB_CODE = [
    [.101562, -.114063, .898824, .101562, -.114063, .101562, -.114063, .348235],
    [-.125, .1625, .1625, -1.152941, .1625, -.125, .1625, -.125],
    [.1875, .1875, -.0875, -.0875, .64, -.0875, -.225882, .1875],
    [-.092188, -.092188, .129688, .129688, -.092188, .599804, -.092188, -.350196]]


def released_mask(score, low_fraction):
    """The released rule: binarize everything up to the entry at int(count * low_fraction)."""
    threshold = score.flatten().sort().values[int(score.numel() * low_fraction)]
    return score > threshold


def test_pb_llm_released_code_hessian():
    score = PB_W.square() / factor(PB_H, .01, "w").diagonal().square()
    mask = released_mask(score, .75)
    entries = [(0, 2), (0, 7), (1, 3), (2, 4), (2, 6), (3, 5), (3, 7)]
    assert torch.equal(mask, given(4, 8, entries))
    scheme = PB.replace(center="shift", salient_statistics="diluted")
    encoded = encode_with_mask(PB_W, scheme, PB_H, "w", mask)
    close(encoded.tensors["shift"], [[-.00625], [.01875], [.05], [.01875]])
    close(encoded.tensors["plane0.scales"], [[.107813], [.14375], [.1375], [.110938]])
    close(encoded.tensors["salient.scales"], [.004706, .005882, .004706, .003725], 1e-6)
    assert encoded.tensors["salient.zeros"].tolist() == [64, 204, 85, 94]
    now = dense(encoded, 4, 8, scheme)
    close(now, PB_CODE)
    assert output_error(PB_X, now, PB_W) == pytest.approx(1.979424, rel=1e-4)
    expected = (1.979424 * 2 / float(((PB_W @ PB_H) * PB_W).sum())) ** .5
    assert encoded.output_error == pytest.approx(expected, rel=1e-4)

    nearest = scheme.replace(compensate=False)
    rounded = dense(encode_with_mask(PB_W, nearest, PB_H, "w", mask), 4, 8, nearest)
    expected = torch.tensor(PB_CODE)
    for place, value in {(0, 7): .4, (1, 3): -1.2, (2, 3): .1875, (2, 4): .8, (2, 6): -.4,
                         (3, 6): .129688}.items():
        expected[place] = value
    close(rounded, expected)
    assert output_error(PB_X, rounded, PB_W) == pytest.approx(1.468655, rel=1e-4)


def test_pb_llm_released_code_magnitude():
    mask = released_mask(PB_W.abs(), .75)
    scheme = PB.replace(center="shift", salient_statistics="diluted", salient_metric="magnitude")
    assert int(mask.sum()) == 6
    now = dense(encode_with_mask(PB_W, scheme, PB_H, "w", mask), 4, 8, scheme)
    close(now[3], [-.175, -.175, .125, .125, -.175, .599804, .125, -.175])
    assert output_error(PB_X, now, PB_W) == pytest.approx(2.057593, rel=1e-4)
    nearest = scheme.replace(compensate=False)
    rounded = dense(encode_with_mask(PB_W, nearest, PB_H, "w", mask), 4, 8, nearest)
    assert output_error(PB_X, rounded, PB_W) == pytest.approx(1.543876, rel=1e-4)


@pytest.mark.parametrize("size", ["row", 8])
def test_pb_llm_recommended(size):
    scheme = PB.replace(group_size=size)
    now, encoded = through(PB_W, scheme, PB_H)
    close(encoded.tensors["plane0.scales"], [[.141667], [.164286], [.17], [.141667]])
    close(now, [
        [.141667, -.141667, .898824, .141667, -.141667, .141667, -.141667, .329412],
        [-.164286, .164286, .164286, -1.123529, .164286, .164286, .164286, -.164286],
        [.17, .17, -.17, .17, .8, -.17, -.4, .249412],
        [-.141667, -.141667, .141667, .141667, -.141667, .599804, .141667, -.327843]])
    assert output_error(PB_X, now, PB_W) == pytest.approx(1.229354, rel=1e-4)

    shifted, encoded = through(PB_W, scheme.replace(center="shift"), PB_H)
    close(encoded.tensors["shift"], [[-.008333], [.021429], [.03], [.025]])
    close(encoded.tensors["plane0.scales"], [[.141667], [.161224], [.164], [.141667]])
    assert output_error(PB_X, shifted, PB_W) == pytest.approx(1.179948, rel=1e-4)


@pytest.mark.parametrize("metric, errors, outputs", [
    ("magnitude", (.414864, .645732), (214.874, 127.946)),
    ("hessian", (1.556315, 2.330444), (406.283, 147.142)),
])
def test_pb_llm_waves(metric, errors, outputs):
    weight, x = waves()
    hessian = 2 * x.T @ x
    for index, compensate in enumerate((False, True)):
        scheme = PB.replace(salient=.1, salient_metric=metric, center="shift",
                            compensate=compensate)
        now, encoded = through(weight, scheme, hessian)
        assert encoded.tensors["salient.values"].numel() == 51
        error = float((now - weight).square().sum())
        assert error == pytest.approx(errors[index], rel=.02)
        assert output_error(x, now, weight) == pytest.approx(outputs[index], rel=.02)


@pytest.mark.parametrize("metric, errors, outputs", [
    ("magnitude", (.432248, .627860), (192.515, 115.424)),
    ("hessian", (1.577696, 2.174950), (358.720, 128.158)),
])
def test_pb_llm_waves_released(metric, errors, outputs):
    weight, x = waves()
    hessian = 2 * x.T @ x
    score = weight.abs()
    if metric == "hessian":
        score = (weight / factor(hessian, .01, "w").diagonal()).square()
    mask = released_mask(score, .9)
    for index, compensate in enumerate((False, True)):
        scheme = PB.replace(salient=.1, salient_metric=metric, center="shift",
                            salient_statistics="diluted", compensate=compensate)
        now = dense(encode_with_mask(weight, scheme, hessian, "w", mask), 8, 64, scheme)
        assert float((now - weight).square().sum()) == pytest.approx(errors[index], rel=.02)
        assert output_error(x, now, weight) == pytest.approx(outputs[index], rel=.02)


def test_pb_llm_bits():
    """88 payload bits with a packed-out plane are 96 with the dense one; zeros take a byte here."""
    scheme = PB.replace(center="shift", scale_dtype="float16")
    _, encoded = through(PB_W, scheme, PB_H)
    bits = {name: 8 * t.numel() * t.element_size() for name, t in encoded.tensors.items()}
    assert bits["plane0.signs"] + bits["salient.values"] == 32 + 64
    assert bits["salient.mask"] == 32
    assert bits["plane0.scales"] + bits["shift"] == 128
    assert bits["salient.scales"] + bits["salient.zeros"] == 4 * (16 + 8)
