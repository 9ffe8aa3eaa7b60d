"""Training with fake-quant weights: prepare a model, distil or fine-tune it, finish it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "prepare": "convert",
    "finish": "convert",
    "coverage": "convert",
    "set_parameter": "convert",
    "drop_second_basis": "convert",
    "DistillTrainer": "distill",
    "Seq2SeqDistillTrainer": "distill",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bitlm.train' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
