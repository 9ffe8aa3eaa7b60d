"""bitlm: 1-bit and ternary Hugging Face models that load with plain `from_pretrained`.

Importing it imports neither torch nor transformers; it registers with transformers at once when
that is loaded, else as soon as it is.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import bitlm_autoload

__version__ = "0.1.0"

_HOMES = {
    "Scheme": "scheme",
    "Training": "scheme",
    "PRESETS": "scheme",
    "BitlmConfig": "hf",
    "quantize": "quantize",
    "pack": "quantize",
    "activations": "activations",
    "set_activation": "activations",
}


_PACKAGES = ("train",)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"bitlm.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'bitlm' has no attribute {name!r}")
    value = getattr(import_module(f"bitlm.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_PACKAGES})


class _Package(ModuleType):
    """Keeps `bitlm.quantize` a function: importing the module of that name would replace it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in ("quantize", "activations") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
bitlm_autoload.install()

__all__ = ["PRESETS", "BitlmConfig", "Scheme", "Training", "__version__", "activations", "pack",
           "quantize", "set_activation", "train"]
