"""The column loop: its invariants, what it is for, and Hessians that are hard to factor."""

import pytest
import torch

from bitlm.methods import EncodeError, compensation, encode
from bitlm.methods.compensation import blocks, compensate, factor
from bitlm.scheme import Scheme
from tests.methods.encoded import close, dense, random_hessian, random_weight, through

ALL = [Scheme(), Scheme(planes=2, refit=3), Scheme("ternary"), Scheme("ternary", refit=3),
       Scheme("grid", 3, center="shift"), Scheme("salient", salient=.1),
       Scheme("salient", salient=.1, salient_layout="columns"), Scheme(planes=3, center="shift")]


def loop(weight, upper, quantize):
    """GPTQ's loop without blocks, in double precision."""
    weight = weight.double().clone()
    for j in range(weight.shape[1]):
        now = quantize(j, weight[:, j])
        error = (weight[:, j] - now) / upper[j, j]
        weight[:, j + 1:] -= error[:, None] * upper[j, j + 1:]
        weight[:, j] = now
    return weight


@pytest.mark.parametrize("group, width", [(70, 128), (70, 8), (16, 8), (7, 16), (1, 4), (3, 1)])
def test_block_size_does_not_matter_with_fixed_fits(group, width):
    weight, upper = random_weight(12, 70), factor(random_hessian(70), .01, "w").double()
    scale = float(weight.abs().mean())

    def rounded(j, column):
        return torch.where(column >= 0, scale, -scale)

    expected = loop(weight, upper, rounded)
    now = weight.double().T.contiguous()
    compensate(now, upper, group, rounded, width)
    close(now.T, expected, 1e-9)


def test_encode_does_not_depend_on_the_block_size(monkeypatch):
    weight, hessian = random_weight(12, 200), random_hessian(200)
    for scheme in (Scheme("grid", 6, 50, "shift", scales_from="original"),
                   Scheme("salient", 1, 25, salient=.2, scales_from="original")):
        results = []
        for width in (128, 50, 8):
            monkeypatch.setattr(compensation.compensate, "__defaults__", (width,))
            results.append(through(weight, scheme.replace(compensate=True), hessian)[0])
        monkeypatch.undo()
        for other in results[1:]:
            assert ((other - results[0]).abs() > 1e-5).float().mean() < .01


@pytest.mark.parametrize("columns, group", [(300, 128), (300, 7), (300, 300), (5, 5), (300, 200)])
def test_blocks(columns, group):
    parts = list(blocks(columns, group))
    assert parts[0][0] == 0 and parts[-1][1] == columns
    for (_, stop), (start, _) in zip(parts, parts[1:], strict=False):
        assert stop == start
    starts = {start for start, _ in parts}
    assert all(0 < stop - start <= 128 for start, stop in parts)
    for first in range(0, columns, group):
        last = min(first + group, columns)
        inside = [1 for start, stop in parts if start <= first and last <= stop]
        assert first in starts or inside


@pytest.mark.parametrize("scheme", ALL)
@pytest.mark.parametrize("size", [32, "row", "tensor"])
@pytest.mark.parametrize("source", ["compensated", "original"])
def test_output_error_falls(scheme, size, source):
    weight, hessian = random_weight(48, 96), random_hessian(96)
    scheme = scheme.replace(group_size=size, scales_from=source)
    before = encode(weight, scheme, hessian)
    now, after = through(weight, scheme.replace(compensate=True), hessian)
    assert after.output_error < before.output_error
    error = now - weight
    exact = (((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum()).sqrt()
    assert after.output_error == pytest.approx(float(exact), rel=1e-3)
    assert after.relative_error == pytest.approx(float(error.norm() / weight.norm()), rel=1e-3)


def test_loss_identity():
    """The column errors sum to the output error under the damped Hessian."""
    weight, hessian = random_weight(10, 40), random_hessian(40)
    scheme = Scheme(compensate=True, damp=.05)
    now, _ = through(weight, scheme, hessian)
    upper = factor(hessian, .05, "w").double()
    error = (weight - now).double()
    columns = torch.linalg.solve_triangular(upper, error, upper=True, left=False)
    damped = hessian.double() + .05 * hessian.diagonal().mean() * torch.eye(40)
    assert float(columns.square().sum()) == pytest.approx(
        float(((error @ damped) * error).sum()), rel=1e-3)


def test_diagonal_hessian_changes_nothing_without_refit():
    weight = random_weight(10, 40)
    hessian = torch.diag(torch.rand(40) + .5)
    for scheme in (Scheme(planes=2), Scheme("grid", 4), Scheme("salient", salient=.1)):
        plain, _ = through(weight, scheme)
        compensated, _ = through(weight, scheme.replace(compensate=True), hessian)
        assert torch.equal(plain, compensated)


def test_refit_weighs_columns_by_their_inputs():
    """An input ten times as large: its column is worth a hundred others."""
    weight = random_weight(16, 64)
    hessian = torch.eye(64)
    hessian[7, 7] = 1e4
    scheme = Scheme(planes=2, refit=10, compensate=True)
    now, encoded = through(weight, scheme, hessian)
    plain, _ = through(weight, scheme.replace(compensate=False))
    assert (now - weight)[:, 7].abs().max() < .1 * (plain - weight)[:, 7].abs().max()
    data_free = encode(weight, scheme.replace(compensate=False), hessian)
    assert encoded.output_error < .5 * data_free.output_error


def test_dead_columns_keep_their_weights():
    weight, hessian = random_weight(10, 40), random_hessian(40)
    hessian[:, 11] = hessian[11] = 0
    weight[:, 11] = 0.2
    scheme = Scheme("salient", salient=.1, group_size="row").calibrated()
    now, encoded = through(weight, scheme, hessian)
    marks = encoded.tensors["salient.mask"][:, 11 // 8] >> (11 % 8) & 1
    assert not marks.any()  # four times the usual size, but no input ever reached it
    assert (now[:, 11] > 0).all()
    everything_dead, _ = through(weight, scheme, torch.zeros(40, 40))
    assert torch.isfinite(everything_dead).all()


def test_factor_of_singular_hessians():
    x = random_weight(5, 60)
    upper = factor(x.T @ x, 0.0, "w")
    assert torch.isfinite(upper).all() and (upper.diagonal() > 0).all()
    with pytest.raises(EncodeError, match="^model.w: its Hessian has no Cholesky factor"):
        factor(torch.full((4, 4), -1e9) + 2e9 * torch.eye(4), .01, "model.w")


def test_salience_by_hessian_without_compensation():
    weight, hessian = random_weight(10, 40), random_hessian(40)
    scheme = Scheme("salient", salient=.1, salient_metric="hessian", group_size="row")
    _, encoded = through(weight, scheme, hessian)
    score = (weight / factor(hessian, .01, "w").diagonal()).square().flatten()
    mask = torch.zeros(400, dtype=torch.bool)
    mask[score.topk(40).indices] = True
    bits = torch.tensor([[int(byte) >> bit & 1 for byte in row for bit in range(8)]
                         for row in encoded.tensors["salient.mask"]], dtype=torch.bool)
    assert torch.equal(bits, mask.view(10, 40))


def test_compensated_levels_are_stored_levels():
    """What the loop fed back is exactly what the file says."""
    weight, hessian = random_weight(6, 50), random_hessian(50)
    for scheme in ALL:
        scheme = scheme.replace(compensate=True, group_size=16)
        encoded = encode(weight, scheme, hessian)
        now = dense(encoded, 6, 50, scheme)
        exact = float((now - weight).norm() / weight.norm())
        assert encoded.relative_error == pytest.approx(exact, rel=1e-5)
