"""Linear layers on a GPU, packed and dense, with enough copies of their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitlm.ops import dequantize, packed_linear, reference
from bitlm.ops.form import Form
from harness.gpu import copies_beyond_cache

DTYPE = "bf16"
Calls = list[Callable[[], Tensor]]


@dataclass(frozen=True)
class Work:
    """A layer and its input: rows x columns, so many tokens, codes in groups of 128."""

    what: str
    rows: int
    columns: int
    tokens: int
    kinds: tuple[str, ...] = ("binary",)
    activation: str = "float"

    @property
    def name(self) -> str:
        codes = f"{len(self.kinds)} planes" if len(self.kinds) > 1 else self.kinds[0]
        tokens = f"{self.tokens} token{'s' * (self.tokens > 1)}"
        return f"{self.what}: {self.rows}x{self.columns}, {codes}, {self.activation}, {tokens}"


class Layer:
    """Random tensors of a work: x, and as many copies of the weight as the cache cannot hold."""

    def __init__(self, work: Work, group: int = 128) -> None:
        self.work = work
        rows, columns = work.rows, work.columns
        named: dict[str, Tensor] = {}
        for plane, kind in enumerate(work.kinds):
            width = ceil(columns / (5 if kind == "trits" else 8))
            most = 243 if kind == "trits" else 256
            codes = torch.randint(most, (rows, width), dtype=torch.uint8, device="cuda")
            if kind == "ternary":
                named[f"plane{plane}.signs"] = codes
                named[f"plane{plane}.mask"] = codes | torch.randint_like(codes, 256)
            else:
                named[f"plane{plane}.{'trits' if kind == 'trits' else 'signs'}"] = codes
            scales = torch.rand(rows, ceil(columns / group), device="cuda") + 0.5
            named[f"plane{plane}.scales"] = scales.half()
        self.form = Form(rows, columns, tuple(named), group)
        self.tensors = list(named.values())
        self.bytes = sum(t.numel() * t.element_size() for t in self.tensors)
        self.x = torch.randn(work.tokens, columns, device="cuda", dtype=torch.bfloat16)

    def error(self, y: Tensor, activation: str) -> float:
        """Return the relative error of a result, of up to 32 tokens, against float64.

        activation: how the engine rounds x.
        """
        x = self.x[:32].double()
        if activation == "float":
            weight = reference.dequantize(self.tensors, self.form.text, torch.float32)
            exact = x @ weight.double().T
        else:
            exact = reference.packed_linear(x, self.tensors, self.form.text, None, None,
                                            activation)
        return ((y[:32].double() - exact).norm() / exact.norm()).item()


def engines(layer: Layer) -> dict[str, Calls | str]:
    """Return the calls of each engine over its copies of the weight, or why there are none."""
    found: dict[str, Calls | str] = {"bitlm": packed(layer)}
    found[f"cuBLAS {DTYPE}"] = dense(layer)
    if layer.work.kinds == ("binary",) and layer.work.activation == "float":
        found["gemlite 1 bit"] = gemlite(layer)
    return found


def packed(layer: Layer) -> Calls:
    text, x, mode = layer.form.text, layer.x, layer.work.activation

    def call(tensors: list[Tensor]) -> Callable[[], Tensor]:
        return lambda: packed_linear(x, tensors, text, None, None, mode)

    return [call([tensor.clone() for tensor in layer.tensors])
            for _ in range(copies_beyond_cache(layer.bytes))]


def dense(layer: Layer) -> Calls:
    weight = dequantize(layer.tensors, layer.form.text, torch.bfloat16)
    size = weight.numel() * weight.element_size()

    def call(own: Tensor) -> Callable[[], Tensor]:
        return lambda: linear(layer.x, own)

    return [call(weight.clone()) for _ in range(copies_beyond_cache(size))]


def gemlite(layer: Layer) -> Calls | str:
    """Return gemlite's 1-bit layers with groups of 128; its dense weight is not ours."""
    try:
        from gemlite.core import DType, GemLiteLinear
    except ImportError as error:
        return f"not installed ({error})"
    rows, columns = layer.work.rows, layer.work.columns
    calls: Calls = []
    for _ in range(copies_beyond_cache(layer.bytes)):
        own = GemLiteLinear(1, group_size=128, in_features=columns, out_features=rows,
                            input_dtype=DType.BF16, output_dtype=DType.BF16)
        codes = torch.randint(2, (rows, columns), dtype=torch.uint8, device="cuda")
        scales = torch.rand(rows * columns // 128, 1, device="cuda", dtype=torch.bfloat16)
        own.pack(codes, scales, torch.full_like(scales, 0.5), None)
        calls.append(lambda own=own: own(layer.x))
    return calls
