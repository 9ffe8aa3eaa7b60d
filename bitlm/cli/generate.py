"""`bitlm generate`: continue a prompt."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .errors import UsageError
from .output import ActivationOption, DeviceOption

NEW_TOKENS = 128


def generate(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue.")],
    max_new_tokens: Annotated[int | None, typer.Option(
        help=f"Tokens to write (default: up to {NEW_TOKENS}).", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    activation: ActivationOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Continue a prompt; the speed goes to stderr."""
    if not prompt:
        raise UsageError("the prompt is empty: give some text with -p")
    import torch

    from .output import activations_of
    from .streaming import load_generator, room, stream

    loaded, tokenizer = load_generator(model, activation, device)
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    new = room(loaded, ids.shape[1], max_new_tokens, NEW_TOKENS)
    writer = stream(loaded, tokenizer, ids, new, temperature, skip_prompt=False)
    if writer.interrupted:
        raise KeyboardInterrupt
    modes = activations_of(loaded)
    print(f"{len(writer.clock.times) - 1} tokens, {writer.clock.rate():.1f} tokens/s"
          + f", activations {modes}" * bool(modes), file=sys.stderr)
