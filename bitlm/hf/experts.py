"""Fused experts with packed weights, as one function for every architecture of transformers.

transformers' decorated experts modules (Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss, ...) describe
themselves: `has_gate`, `has_bias`, `is_transposed`, `_apply_gate`, `has_post_expert_norm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, _grouped_linear

from ..targets import EXPERT_LEAVES, is_fused_experts
from ..weight import PackedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "bitlm"


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor,
                    top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts, [T, H].

    hidden_states: [T, H]. top_k_index, top_k_weights: [T, k]. Token-expert pairs are sorted by
    expert, so that each weight runs once, over the slices that `offsets` bound: no size depends on
    the routing, and the whole stays one graph for torch.compile.
    """
    top_k = top_k_index.shape[-1]
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    offsets = torch.searchsorted(expert, torch.arange(_number(self), device=expert.device),
                                 right=True).to(torch.int32)
    x = hidden_states[order // top_k]
    leaf = "gate_up_proj" if self.has_gate else "up_proj"
    x = _project(self, leaf, x, expert, offsets)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = _project(self, "down_proj", x, expert, offsets)
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    x = x[torch.argsort(order)].unflatten(0, top_k_index.shape)
    return x.sum(dim=1).to(hidden_states.dtype)


def _project(experts: nn.Module, leaf: str, x: Tensor, expert: Tensor, offsets: Tensor) -> Tensor:
    """Run one projection, packed or dense, on rows x [S, K] sorted by `expert` [S]."""
    weight = getattr(experts, leaf)
    bias = getattr(experts, f"{leaf}_bias") if experts.has_bias else None
    if isinstance(weight, PackedWeight):
        return weight(x, bias, offsets)
    own = None if bias is None else bias[expert]
    return _grouped_linear(x, weight, offsets, bias=own, is_transposed=experts.is_transposed)


def _number(experts: nn.Module) -> int:
    return experts.down_proj.shape[0]


def use_packed_experts(model: PreTrainedModel) -> None:
    """Send the experts of a model through `experts_forward` where their weights are packed."""
    for module in model.modules():
        if is_fused_experts(module) and any(isinstance(getattr(module, leaf, None), PackedWeight)
                                            for leaf in EXPERT_LEAVES):
            module.config._experts_implementation = NAME


def register_experts() -> None:
    """Register the function with transformers."""
    ExpertsInterface.register(NAME, experts_forward)
