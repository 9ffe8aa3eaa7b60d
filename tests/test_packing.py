"""One planned weight: cut apart, encoded, joined again."""

from __future__ import annotations

import pytest
import torch

from bitlm.methods import EncodeError, encode
from bitlm.packing import pack_weight
from bitlm.plan import Entry
from bitlm.scheme import Scheme
from bitlm.targets import Target
from bitlm.weight import from_encoded

SCHEMES = [Scheme(method="ternary", group_size=8), Scheme(method="salient", salient=.15),
           Scheme(method="grid", planes=3, center="shift")]


def entry(scheme=None, rows=6, columns=20, dtype=torch.float32, **more):
    role = "experts" if more.get("experts") else "linear"
    return Entry(Target("layer.weight", rows, columns, role, dtype, **more), scheme or Scheme())


def alone(matrix, scheme, hessian=None):
    found = encode(matrix, scheme, hessian)
    return found, from_encoded(found.tensors, tuple(matrix.shape), found.group_size,
                               scheme.plane_ratio, matrix.dtype)


def hessian(columns=20, seed=0):
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.method)
def test_a_matrix(scheme):
    dense = torch.randn(6, 20)
    packed = pack_weight(entry(scheme), dense)
    found, weight = alone(dense, scheme)
    assert torch.equal(packed.weight.dequantize(), weight.dequantize())
    error = (weight.dequantize() - dense).norm() / dense.norm()
    assert packed.relative_error == found.relative_error == pytest.approx(float(error), rel=1e-5)
    assert packed.output_error is None


@pytest.mark.parametrize("experts", [0, 3])
def test_a_transposed_weight(experts):
    dense = torch.randn(experts, 20, 6) if experts else torch.randn(20, 6)
    turned = pack_weight(entry(experts=experts, transposed=True), dense)
    straight = pack_weight(entry(experts=experts), dense.transpose(-1, -2).contiguous())
    assert torch.equal(turned.weight.dequantize(), straight.weight.dequantize())
    assert turned.weight.shape == ((experts, 6, 20) if experts else (6, 20))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.method)
def test_experts_are_encoded_one_by_one(scheme, parts):
    dense = torch.randn(3, 6, 20)
    packed = pack_weight(entry(scheme, experts=3, parts=parts), dense)
    pieces = [alone(piece, scheme) for matrix in dense for piece in matrix.chunk(parts)]
    expected = torch.cat([weight.dequantize() for _, weight in pieces]).reshape(3, 6, 20)
    assert torch.equal(packed.weight.dequantize(), expected)
    assert (packed.weight.form.experts, packed.weight.form.parts) == (3, parts)
    errors = [found.relative_error for found, _ in pieces]
    assert packed.relative_error == pytest.approx(sum(errors) / len(errors))


def test_hessians_go_to_their_experts():
    scheme, dense = Scheme(compensate=True, group_size=8), torch.randn(2, 6, 20)
    hessians = [hessian(seed=0), hessian(seed=1)]
    packed = pack_weight(entry(scheme, experts=2, parts=2), dense, hessians)
    pieces = [alone(piece, scheme, own) for matrix, own in zip(dense, hessians, strict=True)
              for piece in matrix.chunk(2)]
    expected = torch.cat([weight.dequantize() for _, weight in pieces]).reshape(2, 6, 20)
    assert torch.equal(packed.weight.dequantize(), expected)
    errors = [found.output_error for found, _ in pieces]
    assert packed.output_error == pytest.approx(sum(errors) / 4)
    swapped = pack_weight(entry(scheme, experts=2, parts=2), dense, hessians[::-1])
    assert not torch.equal(swapped.weight.dequantize(), expected)


def test_output_error_of_the_experts_that_have_a_hessian():
    packed = pack_weight(entry(experts=2), torch.randn(2, 6, 20), [None, hessian()])
    assert packed.output_error > 0


def test_the_dtype_is_that_of_the_dense_weight():
    packed = pack_weight(entry(dtype=torch.bfloat16), torch.randn(6, 20, dtype=torch.bfloat16))
    assert packed.weight.dtype == torch.bfloat16
    assert packed.weight.plane0.scales.dtype == torch.float16


def test_the_dense_weight_is_left_alone():
    dense = torch.randn(6, 20)
    before = dense.clone()
    for scheme in (Scheme(), Scheme(compensate=True)):
        pack_weight(entry(scheme), dense, [hessian()])
        pack_weight(entry(scheme, rows=20, columns=6, transposed=True), dense, [hessian(6)])
        assert torch.equal(dense, before)


def test_scales_of_one_expert_that_do_not_fit_float16():
    dense = torch.randn(2, 6, 20)
    dense[1] *= 1e6
    packed = pack_weight(entry(experts=2), dense)
    assert packed.weight.plane0.scales.dtype == torch.float32
    assert packed.relative_error < 1


@pytest.mark.parametrize("experts, name", [(0, "layer.weight has 1 NaN"),
                                           (2, r"layer.weight\[1\] has 1 NaN")])
def test_errors_name_the_weight_and_the_expert(experts, name):
    dense = torch.randn(experts, 6, 20) if experts else torch.randn(6, 20)
    dense[-1].view(-1)[0] = float("nan")
    with pytest.raises(EncodeError, match=name):
        pack_weight(entry(experts=experts), dense)
    with pytest.raises(EncodeError, match="layer.weight.* needs the Hessian"):
        pack_weight(entry(Scheme(compensate=True), experts=experts), torch.zeros_like(dense))
