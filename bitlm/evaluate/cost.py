"""What a forward costs, counted on a real input: multiply-accumulates by the bits of their factors.

    OPs = FLOPs + BOPs / 64,  BOPs = sum of (multiply-accumulates) x (bits) x (bits)

A multiply-accumulate counts as one FLOP, as 64 of one bit fit into a machine word (BiBench, arXiv
2301.11233). Three levels count as 2 bits, float activations of packed layers as 16, and no product
counts as more than one FLOP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..attention import AttentionQuantizers
from ..modules import PackedLinear, packed_weights
from ..ops.form import chains, planes
from ..scheme import OPERANDS
from ..weight import PackedWeight

FLOAT = 32  # bits of what is not rounded
_MODES = {"float": 16, "int16": 16, "int8": 8, "int2": 2, "uint2": 2, "int1": 1, "uint1": 1}
_SALIENT = 8  # bits of a salient weight


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one forward by the bits of both factors, FLOAT where one is dense."""

    products: Mapping[tuple[int, int], int]

    @property
    def total(self) -> int:
        """All multiply-accumulates."""
        return sum(self.products.values())

    @property
    def flops(self) -> int:
        """Those of float factors."""
        return sum(n for bits, n in self.products.items() if _is_float(bits))

    @property
    def bops(self) -> int:
        """Operations on single bits of the others."""
        return sum(n * min(x * y, 64) for (x, y), n in self.products.items()
                   if not _is_float((x, y)))

    @property
    def ops(self) -> float:
        """FLOPs + BOPs / 64."""
        return self.flops + self.bops / 64

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {"products": {f"{x}x{y}": n for (x, y), n in sorted(self.products.items())},
                "flops": self.flops, "bops": self.bops, "ops": self.ops}


def count(model: nn.Module, inputs: Mapping[str, Tensor]) -> Cost:
    """Return what a forward of a dense or packed model on these inputs costs.

    inputs: keyword arguments of the forward; padding counts like everything that is computed.
    Counted are matrix products, those of attention among them, and convolutions; look-ups, norms
    and what goes element by element are not.
    """
    found: Counter[tuple[int, int]] = Counter()
    rounds = {module.weight: module.input.spec.bits for module in model.modules()
              if isinstance(module, PackedLinear) and module.input is not None}
    handles = [weight.register_forward_hook(
        lambda weight, args, output: found.update(_of_weight(weight, args, output, rounds)))
        for weight in packed_weights(model).values()]
    counter, training = FlopCounterMode(display=False), model.training
    try:
        model.eval()
        # It knows no fused attention of the CPU, and puts hooks on gradients: no inference mode.
        with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(**inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    # By module, each with what lies in it.
    root = type(model).__name__
    counts = {name.removeprefix(root).removeprefix("."): sum(each.values()) // 2
              for name, each in counter.get_flop_counts().items() if name != "Global"}
    rest = counts.get("", 0)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            rest -= counts.get(name, 0)  # the reference multiplies in float
        elif isinstance(module._modules.get("quantizers"), AttentionQuantizers):
            own = counts.get(name, 0) - sum(counts.get(f"{name}.{child}", 0)
                                            for child, _ in module.named_children())
            products = _of_attention(module, own)
            found.update(products)
            rest -= sum(products.values())
    found[FLOAT, FLOAT] += rest
    return Cost({bits: n for bits, n in found.items() if n})


def _of_weight(weight: PackedWeight, args: tuple[Any, ...], output: Any, rounds: dict[Any, int]
               ) -> Counter[tuple[int, int]]:
    """Return the products of one call, term by term: what its tensors have for each input."""
    found: Counter[tuple[int, int]] = Counter()
    if not args or not args[0].is_floating_point():  # its own tensors, or a look-up
        return found
    rows, form = output.numel() // weight.form.rows, weight.form
    inputs = rounds.get(weight) or _MODES[weight.activation]
    share = max(form.experts, 1)
    sizes = {name: tensor.numel() // share for name, tensor in weight.named_tensors()}
    for plane in planes(form.names):
        three = f"plane{plane}.mask" in sizes or f"plane{plane}.trits" in sizes
        columns = sizes.get(f"plane{plane}.columns", form.columns * form.parts) // form.parts
        found[2 if three else 1, inputs] += rows * form.rows * columns
    for chain in chains(form.names):
        rank = sizes[f"chain{chain}.rank_scales"] // form.parts
        found[1, inputs] += rows * rank * form.columns * form.parts
        found[1, _MODES["float"]] += rows * rank * form.rows
    found[_SALIENT, inputs] += rows * sizes.get("salient.values", 0)
    found[FLOAT, FLOAT] += rows * (sizes.get("low_rank.u", 0) + sizes.get("low_rank.v", 0))
    return found


def _of_attention(module: nn.Module, products: int) -> Counter[tuple[int, int]]:
    """Return the products of rounded attention: half are scores, half are sums of values."""
    bits = {name: getattr(module.quantizers, name) for name in OPERANDS}
    query, key, value, probabilities = (
        FLOAT if bits[name] is None else bits[name].spec.bits for name in OPERANDS)
    found: Counter[tuple[int, int]] = Counter()
    found[query, key] += products // 2
    found[probabilities, value] += products - products // 2
    return found


def _is_float(bits: tuple[int, int]) -> bool:
    return FLOAT in bits
