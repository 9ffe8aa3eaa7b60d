"""Sign bits and base-3 digits: every byte, odd widths, batch axes."""

from __future__ import annotations

import itertools

import pytest
import torch

from bitlm.ops.bits import pack_bits, pack_trits, unpack_bits, unpack_trits
from tests.ops import plain

ALL_BITS = [[byte >> j & 1 for j in range(8)] for byte in range(256)]
ALL_TRITS = list(itertools.product((-1, 0, 1), repeat=5))  # in the order of their bytes


def test_every_byte_of_bits():
    packed = torch.arange(256, dtype=torch.uint8).unsqueeze(1)
    bits = torch.tensor(ALL_BITS, dtype=torch.bool)
    assert torch.equal(pack_bits(bits), packed)
    assert torch.equal(unpack_bits(packed, 8), bits)


def test_every_byte_beside_every_other():
    """No bit leaks into a neighbour: all pairs of bytes in one row of 16 columns."""
    packed = torch.cartesian_prod(*[torch.arange(256, dtype=torch.uint8)] * 2)
    assert torch.equal(pack_bits(unpack_bits(packed, 16)), packed)


def test_every_byte_of_trits():
    packed = torch.arange(243, dtype=torch.uint8).unsqueeze(1)
    codes = torch.tensor(ALL_TRITS, dtype=torch.int8)
    assert torch.equal(pack_trits(codes), packed)
    assert torch.equal(unpack_trits(packed, 5), codes)


@pytest.mark.parametrize("columns", range(1, 21))
def test_widths(columns):
    bits = torch.rand(3, columns) < 0.5
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-columns // 8))
    assert [[bool(plain.bit(row, c)) for c in range(columns)]
            for row in packed.tolist()] == bits.tolist()
    assert torch.equal(unpack_bits(packed, columns), bits)
    assert not unpack_bits(packed, packed.shape[1] * 8)[:, columns:].any()  # padding is 0

    codes = torch.randint(-1, 2, (3, columns), dtype=torch.int8)
    packed = pack_trits(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (3, -(-columns // 5))
    assert [[plain.trit(row, c) for c in range(columns)]
            for row in packed.tolist()] == codes.tolist()
    unpacked = unpack_trits(packed, columns)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, codes)
    # Padding digits are 0, which reads as code -1.
    assert (unpack_trits(packed, packed.shape[1] * 5)[:, columns:] == -1).all()


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,), (2, 0, 3)])
def test_batch_axes(lead):
    bits = torch.rand(*lead, 11) < 0.5
    assert pack_bits(bits).shape == (*lead, 2)
    assert torch.equal(unpack_bits(pack_bits(bits), 11), bits)
    codes = torch.randint(-1, 2, (*lead, 11), dtype=torch.int8)
    assert pack_trits(codes).shape == (*lead, 3)
    assert torch.equal(unpack_trits(pack_trits(codes), 11), codes)


def test_strided_inputs():
    bits = (torch.rand(19, 4) < 0.5).T
    assert torch.equal(unpack_bits(pack_bits(bits), 19), bits)
    codes = torch.randint(-1, 2, (38, 4), dtype=torch.int8)[::2].T
    assert torch.equal(unpack_trits(pack_trits(codes), 19), codes)
    packed = torch.stack([pack_bits(bits)] * 2, dim=-1)[..., 0]
    assert torch.equal(unpack_bits(packed, 19), bits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32])
def test_codes_of_any_number_type(dtype):
    codes = torch.tensor([[-1, 0, 1, 1, -1, 0]], dtype=dtype)
    assert pack_trits(codes).tolist() == [[0 * 81 + 27 + 2 * 9 + 2 * 3 + 0, 81]]
