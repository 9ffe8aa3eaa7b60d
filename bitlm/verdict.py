"""The verdict at the end of `quantize`: is the packed model still the dense one, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax

TOKENS, TEXTS = 256, 4  # short texts: the logits of a large vocabulary take memory
CLOSE, DEGRADED = 0.1, 1.0  # nats of mean KL divergence
CLOSE_COSINE, DEGRADED_COSINE = 0.98, 0.9


class NoVerdict(ValueError):
    """Models whose outputs cannot be compared: the message says why."""


@dataclass(frozen=True)
class Verdict:
    """How far a packed model is from the dense one on a short bundled text.

    word: "close", "degraded" or "unusable without training". kl: mean KL(dense || packed) of the
    next-token (or class) distribution in nats, top1: share of equal first choices, for models with
    such logits; cosine: mean cosine of the last hidden states, for others. tokens, texts: how much
    was read. advice: what would do better, or "".
    """

    word: str
    kl: float | None
    top1: float | None
    cosine: float | None
    tokens: int
    texts: int = 1
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}

    def sentence(self) -> str:
        """Return the verdict as one line for people."""
        figures = (f"cosine {self.cosine:.3f}" if self.cosine is not None else
                   f"KL {self.kl:.3g} nats, top-1 agreement {self.top1:.0%}")
        return (f"{self.word} ({figures} against the dense model on {self.tokens} tokens "
                f"in {self.texts} texts)")


def measure(packed: nn.Module, dense: nn.Module, texts: list[Tensor]) -> Verdict:
    """Compare two models of the same class on texts of token ids [1, T].

    Raises NoVerdict where the dense model itself gives no finite numbers.
    """
    kinds, rows = set(), []
    for kind, theirs, ours in _pairs(packed, dense, texts):
        if not bool(torch.isfinite(theirs).all()):
            raise NoVerdict(f"the dense model itself gives NaN or infinite values in {dense.dtype}")
        kinds.add(kind)
        rows.append(_divergence(theirs, ours) if kind == "logits" else
                    cosine_similarity(theirs, ours, dim=-1).unsqueeze(0))
    figures = torch.cat(rows, dim=1).mean(1).tolist()
    size = {"tokens": sum(ids.numel() for ids in texts), "texts": len(texts)}
    if kinds == {"logits"}:
        kl, top1 = figures
        word = ("close" if kl <= CLOSE else "degraded" if kl <= DEGRADED else
                "unusable without training")
        return Verdict(word, kl, top1, None, **size)
    cosine = figures[0]
    word = ("close" if cosine >= CLOSE_COSINE else "degraded" if cosine >= DEGRADED_COSINE else
            "unusable without training")
    return Verdict(word, None, None, cosine, **size)


def bundled_ids(tokenizer: Any, model: nn.Module) -> list[Tensor] | None:
    """Return the bundled text as texts of ids [1, T]; None for a model that does not read it."""
    if tokenizer is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    text = resources.files("bitlm").joinpath("verdict.txt").read_text("utf-8")
    inner = model.config.get_text_config()
    limit = getattr(inner, "max_position_embeddings", None) or TOKENS
    # RoBERTa's positions start after the padding index, so the last two cannot be used.
    length = max(min(TOKENS // TEXTS, limit - 2), 1)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:length * TEXTS]
    if not ids or max(ids) >= inner.vocab_size:
        return None
    return [torch.tensor([ids[at:at + length]]) for at in range(0, len(ids), length)]


@torch.no_grad()
def _pairs(packed: nn.Module, dense: nn.Module, texts: list[Tensor]
           ) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (kind, dense rows, packed rows) of comparable outputs, one a text."""
    for ids in texts:
        inputs = {"input_ids": ids}
        if dense.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        logits = _logits(dense(**inputs), ids, dense.config.num_labels)
        if logits is not None:
            ours = packed(**inputs)["logits"]
            yield "logits", logits.float().flatten(0, -2), ours.float().flatten(0, -2)
            continue
        found = [_states(model(**inputs, output_hidden_states=True)) for model in (dense, packed)]
        yield "states", *(states.float().flatten(0, -2) for states in found)


def _logits(output: Any, ids: Tensor, labels: int) -> Tensor | None:
    """Return logits over two or more choices; one figure a token or text is no distribution."""
    logits = output.get("logits") if hasattr(output, "get") else None
    if logits is None or logits.shape[-1] < 2:
        return None
    return None if logits.shape == ids.shape and logits.shape[-1] != labels else logits


def _states(output: Any) -> Tensor:
    for name in ("decoder_hidden_states", "hidden_states"):
        if output.get(name):
            return output[name][-1]
    if output.get("last_hidden_state") is not None:
        return output["last_hidden_state"]
    raise NoVerdict(f"{type(output).__name__} has neither logits nor hidden states to compare")


def _divergence(theirs: Tensor, ours: Tensor) -> Tensor:
    """Return KL(theirs || ours) and equality of the first choices of each row, [2, rows]."""
    p, q = log_softmax(theirs, -1), log_softmax(ours, -1)
    kl = (p.exp() * (p - q)).sum(-1)
    return torch.stack([kl, (p.argmax(-1) == q.argmax(-1)).to(kl.dtype)])
