"""Load a model to measure or run it, dense or packed, with one-line errors."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ..activations import set_activation
from ..scheme import Scheme
from ..source import SourceError, has_device, model_class, quiet, resolve


class LoadError(ValueError):
    """A model that cannot be loaded: the message says why and what to do."""


def load_model(model: str | Path, dtype: Any = "auto", activation: str | None = None,
               device: str = "cpu") -> tuple[nn.Module, Any | None]:
    """Return a model in eval mode and its tokenizer, None where its folder has none.

    model: a local folder, else a hub id. The class is the one that the config names. activation:
    the mode of all packed layers, None for the checkpoint's own. device: as torch names it. Raises
    SchemeError for an unknown mode, LoadError for a device that is not there and for everything
    that cannot be loaded, incomplete weights too.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    if activation is not None:
        Scheme(activation=activation)
    if not has_device(device):
        raise LoadError(f"no device {device!r} here: leave --device out to use the CPU")
    with _quiet_hub():
        try:
            folder = resolve(model)
        except SourceError as error:
            raise LoadError(str(error)) from None
        if not (folder / "config.json").is_file():
            raise LoadError(f"{folder} has no config.json: is it a model folder?")
        try:
            with quiet():
                config = AutoConfig.from_pretrained(folder, local_files_only=True)
                loaded, info = model_class(config).from_pretrained(
                    folder, config=config, dtype=dtype, local_files_only=True,
                    output_loading_info=True)
        except SafetensorError as error:
            raise LoadError(f"{model}: a weight file is damaged or cut short ({_line(error)}): "
                            "copy or download it again") from None
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise LoadError(f"{model} cannot be loaded: {_line(error)}") from error
    missing = sorted(info["missing_keys"])
    # A bare encoder may lack its pooler, which nothing here uses; any other gap is random weights.
    bare = loaded.base_model is loaded
    missing = [name for name in missing if not (bare and "pooler" in name)]
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise LoadError(f"{model} lacks {missing[0]}{more} of {type(loaded).__name__}: the "
                        "checkpoint is not complete")
    if activation is not None:
        try:
            set_activation(loaded, activation)
        except ValueError as error:
            raise LoadError(f"{model}: {_line(error)}") from None
    return loaded.to(device).eval(), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any | None:
    """Return the tokenizer of a model folder, None where it has none.

    Raises LoadError for one that cannot be read.
    """
    from transformers import AutoTokenizer

    if not any(next(folder.glob(name), None) for name in ("tokenizer*", "vocab*", "spiece.model")):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LoadError(f"the tokenizer of {folder} cannot be loaded: {_line(error)}") from None


def packed_config(folder: str | Path) -> dict[str, Any] | None:
    """Return the bitlm part of a local folder's config.json, None for anything else.

    Raises LoadError when config.json is no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text("utf-8"))
        quantization = found.get("quantization_config") or {}
        return quantization if quantization.get("quant_method") == "bitlm" else None
    except (ValueError, AttributeError) as error:
        raise LoadError(f"{path} is no model config: {_line(error)}") from None


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub client, which logs each attempt to reach the hub without a network."""
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(level)


def _line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
