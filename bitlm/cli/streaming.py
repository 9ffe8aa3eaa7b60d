"""Generation with tokens written as they come; shared by `generate` and `chat`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TextStreamer

from ..calibration.text import check_ids
from ..evaluate.language import TokenClock, context_length, vocabulary
from ..evaluate.load import LoadError, load_model


class Writer(TextStreamer):
    """Writes text to stdout as it becomes final, keeps it, and times the tokens."""

    def __init__(self, tokenizer: Any, skip_prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.clock = TokenClock()
        self.text = ""
        self.interrupted = False

    def put(self, value: Tensor) -> None:
        """Take the prompt's ids first, then one token at a time."""
        self.clock.put(value)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece of text."""
        self.text += text
        sys.stdout.write(text + "\n" * stream_end)
        sys.stdout.flush()


def load_generator(model: str, activation: str | None = None, device: str = "cpu"
                   ) -> tuple[nn.Module, Any]:
    """Return a model that can generate and its tokenizer; raises LoadError for any other."""
    loaded, tokenizer = load_model(model, activation=activation, device=device)
    if not loaded.can_generate():
        raise LoadError(f"{model} is a {type(loaded).__name__}: it does not generate text. Measure "
                        "it with `bitlm evaluate`, or use it from Python")
    if tokenizer is None:
        raise LoadError(f"{model} has no tokenizer: copy the files tokenizer* of the dense model "
                        "into its folder")
    return loaded, tokenizer


def room(model: nn.Module, prompt_tokens: int, asked: int | None, default: int) -> int:
    """Return how many new tokens to generate: as asked, else what the context leaves of `default`.

    Raises ValueError when the prompt, or the prompt with the tokens asked for, is too long.
    """
    longest = context_length(model)
    if longest is None or model.config.is_encoder_decoder:
        return asked or default
    left = longest - prompt_tokens
    if left < (asked or 1):
        more = f" and {asked} new ones" if asked else ""
        raise ValueError(f"{prompt_tokens} tokens of prompt{more} do not fit: the model reads at "
                         f"most {longest}")
    return asked or min(default, left)


def stream(model: nn.Module, tokenizer: Any, ids: Tensor, new_tokens: int, temperature: float,
           skip_prompt: bool) -> Writer:
    """Write the continuation of ids [1, T] to stdout, until Ctrl-C at the latest.

    temperature 0 is greedy. Returns the writer, with text and times.
    """
    check_ids(ids, vocabulary(model), tokenizer)
    writer = Writer(tokenizer, skip_prompt)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {
        "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = ids.to(model.device)
    with torch.inference_mode():
        try:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                           streamer=writer, pad_token_id=pad, **sampling)
        except KeyboardInterrupt:
            writer.end()
            writer.interrupted = True
    return writer
