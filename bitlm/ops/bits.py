"""Packing of sign bits and of base-3 digits, on any device, in plain torch.

Bit j of byte i is column 8i+j and 1 means +1; padding bits are 0. Five ternary digits share a
byte, the first column the highest digit, digit = code + 1; padding digits are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# Multiplying eight 0/1 bytes, read as one little-endian int64, by this constant gathers bit i of
# the result's top byte from byte i: the 64 partial products all land on different bits.
_GATHER = 0x0102040810204080
_POWERS_OF_3 = (81, 27, 9, 3, 1)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans [..., K] into uint8 [..., ceil(K/8)]."""
    columns = bits.shape[-1]
    bits = pad(bits.to(torch.uint8), (0, -columns % 8)).contiguous()
    words = bits.view(torch.int64)
    return (words.mul(_GATHER) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, columns: int) -> Tensor:
    """Unpack uint8 [..., ceil(columns/8)] into booleans [..., columns]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :columns].bool()


def pack_trits(codes: Tensor) -> Tensor:
    """Pack codes -1, 0, +1 of shape [..., K] into uint8 [..., ceil(K/5)]."""
    columns = codes.shape[-1]
    digits = pad((codes + 1).to(torch.uint8), (0, -columns % 5)).unflatten(-1, (-1, 5))
    packed = digits[..., 0].clone()
    for digit in range(1, 5):
        packed = packed * 3 + digits[..., digit]
    return packed


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """Unpack uint8 [..., ceil(columns/5)] into int8 codes -1, 0, +1 of shape [..., columns]."""
    powers = torch.tensor(_POWERS_OF_3, dtype=torch.uint8, device=packed.device)
    digits = torch.div(packed.unsqueeze(-1), powers, rounding_mode="floor") % 3
    return digits.flatten(-2)[..., :columns].to(torch.int8) - 1
