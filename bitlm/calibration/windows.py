"""Calibration text as windows of tokens, and these as batches of a model."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .text import TextError, check_ids, read_texts, token_windows

TOKENS = 32768
LENGTH = 512
BATCH_TOKENS = 2048
# Models whose positions start behind the padding index, so that the last two cannot be used.
SHIFTED_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")


class CalibrationError(ValueError):
    """A model that cannot be calibrated on text: the message names the next step."""


@dataclass(frozen=True)
class Calibration:
    """Token windows [n, length] and where they come from."""

    windows: Tensor
    source: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
        return {"source": self.source, "tokens": self.windows.numel(),
                "length": self.windows.shape[1], "seed": self.seed, "sha256": digest}


def read_calibration(text: str | os.PathLike, tokenizer, config, tokens: int | None,
                     seed: int) -> Calibration:
    """Return windows of calibration tokens for a model.

    tokens: how many, rounded down to whole windows; None takes up to 32,768 of what there is.
    Raises TextError for text that is missing or too short, CalibrationError without a tokenizer.
    """
    if tokenizer is None:
        raise CalibrationError("the model folder has no tokenizer, which --calibrate needs: add "
                               "its tokenizer files or quantize without calibration text")
    inner = config.get_text_config()
    length = min(LENGTH, getattr(inner, "max_position_embeddings", None) or
                 LENGTH)
    if config.model_type in SHIFTED_POSITIONS:
        length -= 2
    count = (tokens or TOKENS) // length
    if count < 1:
        raise CalibrationError(f"--calibration-tokens {tokens} is less than one window of {length}")
    texts = read_texts(text)
    if tokens is None:
        try:
            windows = token_windows(tokenizer, texts, length, count, seed)
        except TextError:
            windows = token_windows(tokenizer, texts, length)
    else:
        windows = token_windows(tokenizer, texts, length, count, seed)
    check_ids(windows, inner.vocab_size)
    return Calibration(windows, str(text), seed)


def batches(model: nn.Module, windows: Tensor) -> list[dict[str, Any]]:
    """Return windows [n, length] as keyword arguments of a model's forward.

    Raises CalibrationError for a model that does not read text.
    """
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise CalibrationError(f"{type(model).__name__} does not read text: quantize it without "
                            "--calibrate")
    rows = max(BATCH_TOKENS // windows.shape[1], 1)
    found = []
    for ids in windows.split(rows):
        batch: dict[str, Any] = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids
        if hasattr(model.config.get_text_config(), "use_cache"):
            batch["use_cache"] = False
        found.append(batch)
    return found
