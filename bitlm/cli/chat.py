"""`bitlm chat`: talk to a model."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .output import ActivationOption, DeviceOption

NEW_TOKENS = 256
HELP = "/reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops a reply."


def chat(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    max_new_tokens: Annotated[int | None, typer.Option(
        help=f"Tokens of a reply (default: up to {NEW_TOKENS}).", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    activation: ActivationOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Talk to a model, from the keyboard or a pipe."""
    import torch

    from .output import activations_of
    from .streaming import load_generator, room, stream

    loaded, tokenizer = load_generator(model, activation, device)
    torch.manual_seed(seed)
    talk = Templated(tokenizer) if tokenizer.chat_template else Plain(tokenizer)
    modes = activations_of(loaded)
    print(talk.opening, HELP, f"Activations: {modes}." * bool(modes), file=sys.stderr)
    while (line := _read()) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            talk.reset()
            print("(started over)", file=sys.stderr)
        elif line.startswith("/"):
            print(f"unknown command {line.split()[0]}: {HELP}", file=sys.stderr)
        elif line:
            ids = talk.ask(line)
            try:
                new = room(loaded, ids.shape[1], max_new_tokens, NEW_TOKENS)
            except ValueError as error:
                print(f"{error}; the conversation starts over", file=sys.stderr)
                talk.reset()
                continue
            reply = stream(loaded, tokenizer, ids, new, temperature, skip_prompt=True)
            talk.answer(reply.text)


class Templated:
    """A conversation in the tokenizer's chat template."""

    opening = "Chat."

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, str]] = []

    def ask(self, line: str) -> Any:
        """Return the ids [1, T] of the conversation with a new line of the user."""
        self.messages.append({"role": "user", "content": line})
        return self.tokenizer.apply_chat_template(
            self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    def answer(self, text: str) -> None:
        self.messages.append({"role": "assistant", "content": text})


class Plain:
    """One growing text, for a model without a chat template."""

    opening = "This model has no chat template: it continues what you type."

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self.text = ""

    def ask(self, line: str) -> Any:
        """Return the ids [1, T] of everything so far and the new line."""
        self.text += ("\n" if self.text else "") + line
        return self.tokenizer(self.text, return_tensors="pt")["input_ids"]

    def answer(self, text: str) -> None:
        self.text += text


def _read() -> str | None:
    """Return the next line, None at the end of the input."""
    terminal = sys.stdin.isatty()
    while True:
        try:
            return input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return None
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
