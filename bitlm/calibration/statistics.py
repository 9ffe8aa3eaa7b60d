"""Hessians of linear layers: XᵀX over the calibration tokens, one for each distinct input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..targets import Target

# Tokens an expert must have seen for its own Hessian to be trusted; below, the layer's mean is
# added until there are that many.
ENOUGH_TOKENS = 256


class Hessian:
    """Running mean of x xᵀ (float32 [K, K]) and the number of tokens in it."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.matrix = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        if not len(x):
            return
        x = x.to(self.matrix.dtype)
        self.tokens += len(x)
        weight = len(x) / self.tokens
        self.matrix.mul_(1 - weight).addmm_(x.T, x, alpha=weight / len(x))


class Collector:
    """Gathers the Hessians of some targets while the model runs.

    Layers that receive the very same input tensor (query, key and value; gate and up) share one
    Hessian: which these are is seen in the first batch.
    """

    def __init__(self, model: nn.Module, targets: list[Target]) -> None:
        self.model = model
        self.linears = {t.name: t for t in targets if not t.experts}
        self.experts = {t.name: t for t in targets if t.experts}
        self._leaders: dict[str, str] = {}
        self._first: list[tuple[Tensor, str]] = []
        self._hessians: dict[str, Hessian] = {}
        self._by_expert: dict[str, list[Hessian]] = {}

    def __getitem__(self, name: str) -> list[Tensor]:
        """Return the Hessians of one target: one, or one for each expert."""
        if name in self.experts:
            return _trusted(self._by_expert[name])
        return [self._hessians[self._leaders[name]].matrix]

    def tokens(self, name: str) -> int:
        """Return how many tokens a target saw; 0 when the calibration never reached it."""
        if name in self.experts:
            return sum(h.tokens for h in self._by_expert.get(name, []))
        return self._hessians[self._leaders[name]].tokens if name in self._leaders else 0

    def next_batch(self) -> None:
        """Forget the inputs of the batch before: only tensors of one batch can be the same."""
        self._first.clear()

    @contextmanager
    def listening(self) -> Iterator[Collector]:
        """Attach to the model while the context lasts."""
        handles = []
        for name in self.linears:
            module = self.model.get_submodule(name.rpartition(".")[0])
            handles.append(module.register_forward_pre_hook(self._hook(name)))
        modules = {name.rpartition(".")[0] for name in self.experts}
        try:
            with _experts_observed(self.model, {self.model.get_submodule(m): m for m in modules},
                                   self._see_experts):
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self._first.clear()

    def _hook(self, name: str):
        def see(module: nn.Module, args: tuple) -> None:
            x = args[0]
            if name not in self._leaders:
                leader = next((other for tensor, other in self._first if tensor is x), name)
                self._leaders[name] = leader
                # Holding x keeps its identity from being reused within the batch.
                self._first.append((x, leader))
            if self._leaders[name] == name:
                self._hessians.setdefault(name, Hessian(x.shape[-1], x.device)).add(x)
        return see

    def _see_experts(self, path: str, leaf: str, expert: int, x: Tensor) -> None:
        name = f"{path}.{leaf}"
        if name in self.experts:
            target = self.experts[name]
            if name not in self._by_expert:
                self._by_expert[name] = [Hessian(target.columns, x.device)
                                         for _ in range(target.experts)]
            self._by_expert[name][expert].add(x)


def _trusted(hessians: list[Hessian]) -> list[Tensor]:
    """Fill up experts that saw few tokens with the mean over all experts of the layer."""
    total = sum(h.tokens for h in hessians)
    mean = sum(h.matrix * (h.tokens / total) for h in hessians)
    matrices = []
    for hessian in hessians:
        missing = max(ENOUGH_TOKENS - hessian.tokens, 0)
        share = hessian.tokens / (hessian.tokens + missing) if hessian.tokens else 0.0
        matrices.append(hessian.matrix * share + mean * (1 - share) if missing else hessian.matrix)
    return matrices


@contextmanager
def _experts_observed(model: nn.Module, modules: dict[nn.Module, str], see) -> Iterator[None]:
    """Run fused experts one by one, telling `see(path, leaf, expert, x)` each one's inputs."""
    if not modules:
        yield
        return

    def forward_of(experts: nn.Module, path: str):
        def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return _observed_forward(experts, path, see, hidden_states, top_k_index, top_k_weights)
        return forward

    for experts, path in modules.items():
        experts.forward = forward_of(experts, path)
    try:
        yield
    finally:
        for experts in modules:
            del experts.forward


def _observed_forward(experts: nn.Module, path: str, see, hidden_states: Tensor,
                      top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Do what transformers' experts interface does, one expert after the other."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    result = torch.zeros_like(hidden_states)
    for expert in range(getattr(experts, first).shape[0]):
        token, slot = torch.where(top_k_index == expert)
        x = hidden_states[token]
        see(path, first, expert, x)
        x = _expert_linear(experts, first, expert, x)
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        see(path, "down_proj", expert, x)
        x = _expert_linear(experts, "down_proj", expert, x)
        if getattr(experts, "has_post_expert_norm", False):
            x = experts.post_expert_norm(x)
        x = x * top_k_weights[token, slot, None]
        result.index_add_(0, token, x.to(result.dtype))
    return result


def _expert_linear(experts: nn.Module, leaf: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(experts, leaf)[expert]
    bias = getattr(experts, f"{leaf}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(x, weight.T if experts.is_transposed else weight, bias)
