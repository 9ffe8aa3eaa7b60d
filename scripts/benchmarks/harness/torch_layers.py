"""torch's own linear layers as peers: float32, bfloat16 and dynamic int8."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from math import ceil

import torch
from torch import Tensor, nn

from .timing import Calls

NAMES = ("torch fp32", "torch bf16", "torch int8")
_DTYPES = {"torch fp32": torch.float32, "torch bf16": torch.bfloat16}


def make(name: str, rows: int, columns: int, cold_bytes: int) -> list[nn.Module]:
    """Return copies of one layer, `cold_bytes` together."""
    if name in _DTYPES:
        layer = nn.Linear(columns, rows, bias=False, dtype=_DTYPES[name])
        return [copy.deepcopy(layer) for _ in range(max(1, ceil(cold_bytes / layer.weight.nbytes)))]
    layer = nn.Sequential(nn.Linear(columns, rows, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that torchao will take its place
        return [torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, torch.qint8)[0]
                for _ in range(max(1, ceil(cold_bytes / (rows * columns))))]


def engine(name: str, layers: list[nn.Module], x: Tensor) -> Calls:
    x = x.to(_DTYPES.get(name, torch.float32))
    return Calls(name, x.shape[0], [partial(layer, x) for layer in layers])
