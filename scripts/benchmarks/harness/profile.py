"""Where the time of a decode step goes: each class of module without its children, and our op."""

from __future__ import annotations

import time
from collections import defaultdict

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .llama import Generate


class Exclusive:
    """Collects the time spent in each class of module, outside of its children."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[list[float]] = []  # start, and the time of children
        self._hooks: list[RemovableHandle] = []
        for module in model.modules():
            self._hooks.append(module.register_forward_pre_hook(self._enter))
            self._hooks.append(module.register_forward_hook(self._leave))

    def _enter(self, module: nn.Module, inputs: object) -> None:
        self._open.append([time.perf_counter(), 0.0])

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        start, children = self._open.pop()
        passed = time.perf_counter() - start
        name = type(module).__name__
        self.seconds[name] += passed - children
        self.calls[name] += 1
        if self._open:
            self._open[-1][1] += passed

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def profile(model: nn.Module, engine: Generate, tokens: int) -> str:
    """Return a table of microseconds a token of an eager engine that decodes `tokens` tokens.

    Modules are timed by hooks, in a run of their own; hooks cost about 1 us a call.
    """
    plain = engine.turn()
    found = Exclusive(model)
    try:
        start = time.perf_counter()
        engine.turn()
        whole = (time.perf_counter() - start) / tokens * 1e6
    finally:
        found.close()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as record:
        engine.turn()
    ours = sum(event.self_cpu_time_total for event in record.key_averages()
               if event.key.startswith("bitlm::")) / tokens
    rows = [(name, calls / tokens, found.seconds[name] / tokens * 1e6)
            for name, calls in found.calls.items()]
    rows.sort(key=lambda row: -row[2])
    rest = whole - sum(row[2] for row in rows)
    lines = [f"{engine.name}: {plain:.0f} us a token after the first; with hooks, prompt included:",
             "", "| | calls a token | us a token |", "|---|---|---|"]
    lines += [f"| {name}, without its children | {calls:.1f} | {us:.0f} |"
              for name, calls, us in rows]
    lines += [f"| generate() around the model | | {rest:.0f} |",
              f"| of all this in bitlm's ops (torch.profiler) | | {ours:.0f} |"]
    return "\n".join(lines)
