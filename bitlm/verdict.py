"""The verdict at the end of `quantize`: is the packed model still the dense one, in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax

WINDOW = 256  # tokens; a model with a shorter context gets shorter windows
CLOSE, DEGRADED = 0.1, 1.0  # nats of mean KL divergence
CLOSE_COSINE, DEGRADED_COSINE = 0.98, 0.9


@dataclass(frozen=True)
class Verdict:
    """How far a packed model is from the dense one on a short bundled text.

    word: "close", "degraded" or "unusable without training". kl: mean KL(dense || packed) of the
    next-token (or class) distribution in nats, top1: share of equal first choices, for models with
    logits; cosine: mean cosine of the last hidden states, for those without. advice: what would do
    better, or "".
    """

    word: str
    kl: float | None
    top1: float | None
    cosine: float | None
    tokens: int
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}

    def sentence(self) -> str:
        """Return the verdict as one line for people."""
        figures = (f"cosine {self.cosine:.3f}" if self.cosine is not None else
                   f"KL {self.kl:.3g} nats, top-1 agreement {self.top1:.0%}")
        return f"{self.word} ({figures} against the dense model on {self.tokens} tokens)"


def measure(packed: nn.Module, dense: nn.Module, ids: Tensor) -> Verdict:
    """Compare two models of the same class on token ids [1, T]."""
    kl = top1 = cosine = None
    with torch.no_grad():
        ours, theirs = (_outputs(model, ids) for model in (packed, dense))
    if "logits" in theirs and theirs["logits"] is not None:
        a, b = (log_softmax(out["logits"].float().flatten(0, -2), -1) for out in (theirs, ours))
        kl = (a.exp() * (a - b)).sum(-1).mean().item()
        top1 = (a.argmax(-1) == b.argmax(-1)).float().mean().item()
        word = ("close" if kl <= CLOSE else "degraded" if kl <= DEGRADED else
                "unusable without training")
    else:
        a, b = (out["last_hidden_state"].float().flatten(0, -2) for out in (theirs, ours))
        cosine = cosine_similarity(a, b, dim=-1).mean().item()
        word = ("close" if cosine >= CLOSE_COSINE else
                "degraded" if cosine >= DEGRADED_COSINE else "unusable without training")
    return Verdict(word, kl, top1, cosine, ids.numel())


def bundled_ids(tokenizer, model: nn.Module) -> Tensor | None:
    """Return ids [1, T] of the bundled text; None for a model that does not read tokens."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or tokenizer is None:
        return None
    text = resources.files("bitlm").joinpath("verdict.txt").read_text("utf-8")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    # RoBERTa's positions start after the padding index, so the last two cannot be used.
    ids = tokenizer(text, truncation=True, max_length=min(WINDOW, limit - 2))["input_ids"]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.tensor([ids]) if ids and max(ids) < vocabulary else None


def _outputs(model: nn.Module, ids: Tensor):
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model(**inputs)
