"""The targets of the CPU kernels, and what a run reached of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from .results import Block
from .timing import ratio
from .work import BINARY

COLUMNS = ("amx", "avx512", "avx2")
ONE, TWO, BATCHES = "gemv cold, 1 thread", "gemv cold, 2 threads", "batches cold, 1 thread"


class Times:
    """The times of a block by group, engine and batch; KeyError where one was not measured."""

    def __init__(self, block: Block) -> None:
        self.groups = {group["name"]: group for group in block["groups"]}

    def rounds(self, group: str, engine: str, batch: int) -> list[float]:
        for row in self.groups[group]["engines"]:
            if (row["engine"], row["batch"]) == (engine, batch):
                return row["us"]
        raise KeyError(engine)

    def has(self, group: str, engine: str) -> bool:
        return any(row["engine"] == engine for row in self.groups[group]["engines"])

    def median(self, group: str, engine: str, batch: int = 1) -> float:
        return statistics.median(self.rounds(group, engine, batch))

    def ratio(self, group: str, these: str, those: str, batch: int = 1,
              those_batch: int | None = None) -> float:
        """Return the time of one engine in units of another's."""
        return ratio(self.rounds(group, these, batch),
                     self.rounds(group, those, batch if those_batch is None else those_batch))

    def best(self, group: str, kind: str, against: str, batch: int) -> float:
        """Return the time of the fastest engine of a kind ("torch", "ggml") in units of another."""
        names = [row["engine"] for row in self.groups[group]["engines"]
                 if row["engine"].startswith(f"{kind} ") and row["batch"] == batch]
        if not names:
            raise KeyError(kind)
        return min(self.ratio(group, name, against, batch) for name in names)


@dataclass(frozen=True)
class Target:
    """One number to reach; `goals` for each of COLUMNS, None where there is none."""

    work: str
    unit: str
    goals: tuple[float | None, float | None, float | None]
    reached: Callable[[Times], float]
    at_most: bool = False

    def passes(self, goal: float, value: float) -> bool:
        return value <= goal if self.at_most else value >= goal


def _share(group: str) -> Callable[[Times], float]:
    return lambda t: 100 * t.ratio(group, "read binary", BINARY)


def _against(peer: str, ours: str = BINARY, group: str = ONE, batch: int = 1
             ) -> Callable[[Times], float]:
    return lambda t: t.ratio(group, peer, ours, batch)


def _rate(batch: int) -> Callable[[Times], float]:
    return lambda t: 2e-6 * 4096 * 4096 * batch / t.median(
        f"prefill {batch}, 1 thread", BINARY, batch)


def _best(kind: str, batch: int, group: str | None = None) -> Callable[[Times], float]:
    return lambda t: t.best(group or f"prefill {batch}, 1 thread", kind, BINARY, batch)


def _overhead(t: Times) -> float:
    """The op without its kernel: what a call of the kernel takes beyond an empty C call."""
    kernel = t.median("calls", "call bitlm kernel") - t.median("calls", "call C function")
    return t.median("calls", "call bitlm op") - kernel


TARGETS = (
    Target("share of a read-only pass, 1 thread", "%", (90, 80, 80), _share(ONE)),
    Target("share of a read-only pass, 2 threads", "%", (90, 80, 65), _share(TWO)),
    Target("against torch bf16", "x", (15, 28, 15), _against("torch bf16")),
    Target("against torch dynamic int8", "x", (7, 7, 6.5), _against("torch int8")),
    Target("against llama.cpp q1_0", "x", (6, 5.5, 6), _against("ggml q1_0")),
    Target("against llama.cpp tq1_0", "x", (6, 5.5, 6), _against("ggml tq1_0")),
    Target("against llama.cpp tq2_0", "x", (5, 3, 2.6), _against("ggml tq2_0")),
    Target("against llama.cpp q4_0", "x", (4, 5, 5.5), _against("ggml q4_0")),
    Target("float mode against torch bf16", "x", (12, 15, 6),
           _against("torch bf16", "bitlm binary float")),
    Target("int16 mode against torch bf16", "x", (15, 18, 8),
           _against("torch bf16", "bitlm binary int16")),
    Target("group-128 scales against per-row", "x", (1.15, 1.3, 1.4),
           _against("bitlm binary g128 int8"), at_most=True),
    Target("ternary against tq1_0", "x", (3.5, 3.5, 3),
           _against("ggml tq1_0", "bitlm ternary int8")),
    Target("ternary against tq2_0", "x", (2.8, 1.9, 1.3),
           _against("ggml tq2_0", "bitlm ternary int8")),
    Target("batch 16 against batch 1", "x", (2, 10, 13),
           lambda t: t.ratio(BATCHES, BINARY, BINARY, 16, 1), at_most=True),
    Target("batch 16 against the best torch type", "x", (9, 1.8, 2.4),
           _best("torch", 16, BATCHES)),
    Target("prefill 128, one core", "TOP/s", (3.2, 0.65, 0.5), _rate(128)),
    Target("prefill 512, one core", "TOP/s", (3.2, 0.65, 0.5), _rate(512)),
    Target("prefill 128 against torch bf16", "x", (4, None, None),
           _against("torch bf16", group="prefill 128, 1 thread", batch=128)),
    Target("prefill 512 against torch bf16", "x", (3, None, None),
           _against("torch bf16", group="prefill 512, 1 thread", batch=512)),
    Target("prefill 128 against the best torch type", "x", (None, 1.7, 2.6), _best("torch", 128)),
    Target("prefill 512 against the best torch type", "x", (None, 1.7, 2.6), _best("torch", 512)),
    Target("prefill 128 against llama.cpp q1_0", "x", (10, None, None),
           _against("ggml q1_0", group="prefill 128, 1 thread", batch=128)),
    Target("prefill 512 against llama.cpp q1_0", "x", (10, None, None),
           _against("ggml q1_0", group="prefill 512, 1 thread", batch=512)),
    Target("prefill 128 against the best llama.cpp type", "x", (None, 3.4, 3.3),
           _best("ggml", 128)),
    Target("prefill 512 against the best llama.cpp type", "x", (None, 3.4, 3.3),
           _best("ggml", 512)),
    Target("salient 10 % against reading its own bytes", "x", (1.25, 1.5, 1.6),
           lambda t: t.ratio(ONE, "bitlm salient 10 % int8", "read salient 10 %"), at_most=True),
    Target("rank-16 scales against batch 16 of the plain kernel", "x", (1.15, 1.15, 1.15),
           lambda t: t.ratio(BATCHES, "bitlm rank-16 int8", BINARY, 1, 16), at_most=True),
    Target("768x768 through torch.ops, warm", "us", (6, 6, 6),
           lambda t: t.median("768x768 warm", BINARY), at_most=True),
    Target("preparing a weight, of its size in bf16", "GB/s", (1, 1, 1),
           lambda t: 2e-3 * 4096 * 4096 / t.median("prepare, 1 thread", "prepare binary g128")),
    Target("overhead of a call", "us", (1.5, 1.5, 1.5), _overhead, at_most=True),
)

DECODE, OURS = "decode, 1 thread", ("bitlm int8, eager", "bitlm int8, static cache, compiled")


def _tokens(t: Times) -> float:
    """Tokens a second of the faster way to generate."""
    return 1e6 / min(t.median(DECODE, name) for name in OURS if t.has(DECODE, name))


DECODE_TARGETS = (
    Target("decode with int8 activations, 1 thread", "tokens/s", (45, 55, 45), _tokens),
    Target("the same against llama.cpp Q1_0", "x", (3, 3, 2.5),
           lambda t: max(t.ratio(DECODE, "llama.cpp Q1_0", name) for name in OURS
                         if t.has(DECODE, name))),
)
