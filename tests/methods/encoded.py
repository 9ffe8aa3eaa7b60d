"""Shared by the tests of the methods: dequantizing what `encode` returned, the notes' matrices."""

import math

import torch

from bitlm.methods import encode
from bitlm.ops import reference
from bitlm.ops.form import Form, check


def dense(encoded, rows, columns, scheme, dtype=torch.float32):
    """Return the dense weight of an Encoded, after the format's own checks."""
    tensors = encoded.tensors
    form = Form(rows, columns, tuple(tensors), encoded.group_size, scheme.plane_ratio)
    problems = check(form, {n: tuple(t.shape) for n, t in tensors.items()},
                     {n: t.dtype for n, t in tensors.items()})
    assert problems == []
    return reference.dequantize(list(tensors.values()), form.text, dtype)


def through(weight, scheme, hessian=None):
    """Return (what the weight became, the Encoded)."""
    encoded = encode(weight, scheme, hessian)
    return dense(encoded, *weight.shape, scheme), encoded


def close(actual, expected, tolerance=2e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype),
                               atol=tolerance, rtol=tolerance)


def output_error(x, now, weight):
    return float((x @ (now - weight).T).square().sum())


SMALL = torch.tensor([[0.9, -0.4, 0.1, -0.2], [-0.6, 0.3, 0.0, 1.5]])
# pb_llm.md (h)
PB_W = torch.tensor([[.20, -.10, .90, .05, -.30, .15, -.05, .40],
                     [-.25, .10, .30, -1.2, .05, -.15, .20, -.10],
                     [.05, .35, -.15, .10, .80, -.20, -.40, .25],
                     [-.10, -.05, .25, .15, -.20, .60, .10, -.35]])
PB_X = torch.tensor([[1., 0, 2, 0, 1, 0, -1, 1], [0, 1, 1, -1, 0, 2, 0, 1],
                     [2, -1, 0, 1, 0, 0, 1, 0], [0, 0, 3, 0, -1, 1, 0, -1],
                     [1, 1, -1, 2, 0, 0, 0, 1], [-1, 0, 1, 0, 2, -1, 1, 0]])
PB_H = 2 * PB_X.T @ PB_X


def waves():
    """The 8 x 64 weight and 96 inputs of pb_llm.md (h) 4."""
    i, j = torch.arange(8.0, dtype=torch.float64)[:, None], torch.arange(64.0, dtype=torch.float64)
    t = torch.arange(96.0, dtype=torch.float64)[:, None]
    w = 0.1 * torch.sin(1.3 * i + 0.7 * j) * (1 + 3 * (j % 13 == 0))
    x = torch.cos(0.37 * t * j + 0.2 * j) * (1 + 0.05 * j)
    return w.float(), x.float()


def random_weight(rows, columns, seed=0, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * scale


def random_hessian(columns, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / math.sqrt(columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ (torch.eye(columns) + mix)
    return x.T @ x
