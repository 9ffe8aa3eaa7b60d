"""What `scripts/bench kernels` measures: groups of engines that take turns."""

from __future__ import annotations

from dataclasses import dataclass

from .torch_layers import NAMES as TORCH

COLD_MIB = 320
LOW_BIT = ("ggml q1_0", "ggml tq1_0", "ggml tq2_0")
GGML = (*LOW_BIT, "ggml q4_0", "ggml q8_0", "ggml bf16")
BINARY = "bitlm binary int8"

# Of every form: reading its bytes, and the product with int8 activations.
FORMS = ("binary", "binary g128", "ternary", "ternary g128", "trits", "3 planes g128",
         "2-bit grid g128", "4-bit grid g128", "8-bit grid g128", "salient 10 %", "rank-16")
MODES = tuple(f"bitlm {form} {mode}" for form in ("binary", "binary g128")
              for mode in ("int16", "float"))


@dataclass(frozen=True)
class Group:
    """Engines that are timed in one run, in turns: (name, batch), read and product side by side.

    Names begin with what runs: "bitlm FORM ACTIVATION", "read FORM", "torch TYPE", "ggml TYPE",
    "prepare FORM" for bringing stored tensors into kernel order, or "call WHAT" for the overhead of
    a call. cold: weights come from DRAM. busy: another process computes all the while.
    """

    name: str
    rows: int
    columns: int
    cold: bool
    threads: int
    engines: tuple[tuple[str, int], ...]
    busy: bool = False


def _at(batch: int, *names: str) -> tuple[tuple[str, int], ...]:
    return tuple((name, batch) for name in names)


def _forms(*forms: str) -> tuple[tuple[str, int], ...]:
    return tuple(pair for form in forms for pair in _at(1, f"read {form}", f"bitlm {form} int8"))


def _small(rows: int, columns: int) -> Group:
    engines = (*_forms("binary", "binary g128"),
               *_at(1, "bitlm binary float", "bitlm binary int1", *TORCH, *GGML))
    return Group(f"{rows}x{columns} warm", rows, columns, False, 1, engines)


def _prefill(batch: int, threads: int, rows: int = 4096) -> Group:
    names = [BINARY, "bitlm binary g128 int8", "bitlm ternary int8"]
    if batch == 128:
        names += ["bitlm binary int16", "bitlm binary float", "bitlm 4-bit grid g128 int8"]
    peers = (*TORCH, "ggml q1_0", "ggml tq2_0", "ggml q4_0", "ggml q8_0", "ggml bf16")
    name = f"prefill {batch}, {threads} thread{'s' * (threads > 1)}"
    return Group(name if rows == 4096 else f"{name}, {rows}x4096", rows, 4096, False, threads,
                 _at(batch, *names, *peers))


_EVERY_FORM = (*_forms(*FORMS), *_at(1, *MODES, "bitlm binary int1"))
_PEERS = _at(1, *TORCH, *GGML)
_FEW = (*_forms("binary", "binary g128", "ternary"),
        *_at(1, *TORCH, *LOW_BIT, "ggml q4_0"))

GROUPS = (
    Group("gemv cold, 1 thread", 4096, 4096, True, 1, _EVERY_FORM + _PEERS),
    Group("gemv cold, 2 threads", 4096, 4096, True, 2, _EVERY_FORM + _PEERS),
    Group("gemv warm, 1 thread", 4096, 4096, False, 1, _EVERY_FORM + _PEERS),
    Group("gemv warm, 2 threads", 4096, 4096, False, 2, _EVERY_FORM + _PEERS),
    Group("11008x4096 cold", 11008, 4096, True, 1, _FEW),
    Group("4096x11008 cold", 4096, 11008, True, 1, _FEW),
    _small(768, 768),
    _small(3072, 768),
    Group("batches cold, 1 thread", 4096, 4096, True, 1, (
        *((BINARY, batch) for batch in (1, 2, 4, 8, 16)), *_at(1, "bitlm rank-16 int8"),
        *_at(16, "bitlm binary g128 int8", "bitlm ternary int8", "bitlm binary float"),
        *_at(4, *TORCH, *LOW_BIT, "ggml q4_0"), *_at(16, *TORCH, *LOW_BIT, "ggml q4_0"))),
    Group("batches cold, 2 threads", 4096, 4096, True, 2, (
        *((BINARY, batch) for batch in (1, 4, 16)), *_at(16, *TORCH, "ggml tq2_0", "ggml q4_0"))),
    _prefill(128, 1),
    _prefill(512, 1),
    _prefill(128, 2),
    _prefill(512, 2),
    _prefill(512, 1, rows=11008),
    Group("gemv cold, 2 threads, a core busy", 4096, 4096, True, 2,
          _at(1, BINARY, *TORCH, "ggml q1_0", "ggml tq2_0"), busy=True),
    Group("prepare, 1 thread", 4096, 4096, False, 1, _at(
        1, *(f"prepare {form}" for form in FORMS))),
    Group("calls", 16, 32, False, 1, _at(
        1, "call bitlm op", "call bitlm kernel", "call C function", "call torch neg")),
)
