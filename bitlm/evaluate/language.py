"""Perplexity of a causal language model, and how far a packed model is from its dense one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax

from . import bootstrap
from .peak import peak_bytes

Progress = Callable[[int, int], None]

_LOGITS = 1 << 25  # logits of one forward pass, unless a single window has more
_CHUNK = 1 << 22  # logits that are float32 at a time


class EvaluationError(ValueError):
    """A model or text that cannot be measured: the message says why."""


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity over non-overlapping windows, the first token of each not predicted.

    nll: mean negative log-likelihood in nats of the `tokens` predicted tokens. context: tokens in
    a window. low, high: of the perplexity, by bootstrap over the windows; None where nothing was
    resampled. seconds: of all windows, None where another model ran between them. by_window: nll of
    each.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    context: int
    low: float | None = None
    high: float | None = None
    seconds: float | None = field(default=None, compare=False)
    peak_bytes: int | None = field(default=None, compare=False)
    by_window: tuple[float, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return all that is there but by_window."""
        return {name: value for name, value in asdict(self).items()
                if name != "by_window" and value is not None}


@dataclass(frozen=True)
class Comparison:
    """A packed model against its dense one, on the same predicted tokens.

    kl: mean KL(dense || packed) of the next-token distributions in nats. top1: share of positions
    with the same most likely token. logit_error: ||packed - dense|| / ||dense|| of the logits.
    """

    packed: PerplexityResult
    dense: PerplexityResult
    kl: float
    top1: float
    logit_error: float

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"packed": self.packed.to_dict(), "dense": self.dense.to_dict()}


@dataclass(frozen=True)
class EncoderComparison:
    """A packed encoder against its dense one.

    cosine: mean cosine of the last hidden states over the tokens that are no padding. kl, top1: of
    the logits (per text for a classifier, per token for a masked LM); None without logits.
    """

    cosine: float
    kl: float | None
    top1: float | None
    tokens: int


def context_length(model: nn.Module) -> int | None:
    """Return the longest input that the config of a model allows, None where it does not say."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def check_reads(model: nn.Module, tokens: int, what: str) -> None:
    """Raise EvaluationError for inputs that are longer than what a model reads, named `what`."""
    longest = context_length(model)
    if longest is not None and tokens > longest:
        raise EvaluationError(f"{what} is {tokens} tokens: this {type(model).__name__} reads at "
                              f"most {longest}")


def vocabulary(model: nn.Module) -> int:
    """Return how many token embeddings a model has."""
    return model.get_input_embeddings().weight.shape[0]


def check_pads(model: nn.Module, tokenizer: Any) -> None:
    """Raise EvaluationError for a padding token that a model does not have."""
    if (tokenizer.pad_token_id or 0) >= vocabulary(model):
        raise EvaluationError(
            f"the tokenizer pads with token {tokenizer.pad_token_id} ({tokenizer.pad_token!r}), "
            f"the model has {vocabulary(model)} embeddings: resize them, or name one of its "
            "own tokens as pad_token")


@torch.inference_mode()
def perplexity(model: nn.Module, windows: Tensor, batch_size: int | None = None,
               progress: Progress | None = None, resamples: int = 0, seed: int = 0
               ) -> PerplexityResult:
    """Return the perplexity of a causal LM on windows of tokens, int64 [n, L].

    Log-softmax in float32, sums in float64. `progress` gets (windows done, windows). resamples,
    seed: of the confidence interval.
    """
    _check(model, windows)
    nll, done, start = np.zeros(len(windows)), 0, time.perf_counter()
    for batch, (logits,) in _forward([model], windows, batch_size, progress):
        for row, scores, tokens in _chunks(logits, batch):
            nll[done + row] += _nll(scores, tokens)
        done += len(batch)
    seconds = time.perf_counter() - start
    return replace(_result(nll, windows, resamples, seed), seconds=seconds,
                   peak_bytes=peak_bytes(model.device))


@torch.inference_mode()
def compare(model: nn.Module, dense: nn.Module, windows: Tensor, batch_size: int | None = None,
            progress: Progress | None = None, resamples: int = 0, seed: int = 0) -> Comparison:
    """Return perplexities, KL divergence, top-1 agreement and logit error of a packed causal LM.

    windows: int64 [n, L], as for `perplexity`; every figure is over the same n * (L - 1) positions.
    """
    _check(model, windows)
    _check(dense, windows)
    kl, difference, norm = torch.zeros(3, dtype=torch.float64)
    packed_nll, dense_nll = np.zeros((2, len(windows)))
    agree = done = 0
    for batch, (ours, theirs) in _forward([model, dense], windows, batch_size, progress):
        if ours.shape[-1] != theirs.shape[-1]:
            raise EvaluationError(f"the models have {ours.shape[-1]} and {theirs.shape[-1]} logits "
                                  "a token: they are not versions of the same model")
        for (row, p, tokens), (_, q, _) in zip(_chunks(theirs, batch), _chunks(ours, batch),
                                               strict=True):
            dense_nll[done + row] += _nll(p, tokens)
            packed_nll[done + row] += _nll(q, tokens.to(q.device))
            q = q.to(p.device)
            kl += _kl(p, q).sum(dtype=torch.float64).cpu()
            agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
            difference += (q - p).square().sum(dtype=torch.float64).cpu()
            norm += p.square().sum(dtype=torch.float64).cpu()
        done += len(batch)
    positions = windows.shape[0] * (windows.shape[1] - 1)
    error = (difference / norm).sqrt().item() if norm > 0 else math.inf
    packed, other = (_result(nll, windows, resamples, seed) for nll in (packed_nll, dense_nll))
    return Comparison(packed, other, kl.item() / positions, agree / positions, error)


@torch.inference_mode()
def compare_encoders(model: nn.Module, dense: nn.Module, batches: Iterable[dict[str, Tensor]]
                     ) -> EncoderComparison:
    """Return how far a packed encoder or classifier is from its dense one.

    batches: what a tokenizer returns with padding, `input_ids` and `attention_mask` [B, T], ...
    Of an encoder-decoder without logits the encoder is compared.
    """
    cosine = kl = torch.zeros((), dtype=torch.float64)
    tokens = agree = outputs = 0
    for batch in batches:
        mask = batch.get("attention_mask")
        kept = (torch.ones_like(batch["input_ids"]) if mask is None else mask).bool()
        (ours, our_logits), (theirs, their_logits) = (_encode(m, batch) for m in (model, dense))
        states = cosine_similarity(ours.float(), theirs.float(), dim=-1)
        inside = kept.to(states.device)
        cosine = cosine + states[inside].sum(dtype=torch.float64).cpu()
        tokens += int(inside.sum())
        if their_logits is None:
            continue
        if their_logits.dim() == 3:  # one prediction a token, as of a masked LM
            our_logits, their_logits = our_logits[inside], their_logits[inside]
        outputs += their_logits.shape[0]
        kl = kl + _kl(their_logits.float(), our_logits.float()).sum(dtype=torch.float64).cpu()
        agree += (their_logits.argmax(-1) == our_logits.argmax(-1)).sum().item()
    if not tokens:
        raise EvaluationError("there is no text to compare the encoders on")
    return EncoderComparison(cosine.item() / tokens, kl.item() / outputs if outputs else None,
                             agree / outputs if outputs else None, tokens)


@torch.inference_mode()
def throughput(model: nn.Module, ids: Tensor, new_tokens: int = 32, repeats: int = 3) -> float:
    """Return the tokens per second of greedy decoding: the median run, after a warm-up.

    ids: prompt, int64 [1, T]. Only the steps after the first new token are timed, so that reading
    the prompt does not count.
    """
    if new_tokens < 2:
        raise EvaluationError(f"{new_tokens} new tokens cannot be timed: use at least 2")
    rates = []
    for _ in range(repeats + 1):
        clock = TokenClock()
        model.generate(ids.to(model.device), attention_mask=torch.ones_like(ids), do_sample=False,
                       max_new_tokens=new_tokens, min_new_tokens=new_tokens, streamer=clock,
                       pad_token_id=0)
        rates.append(clock.rate())
    return statistics.median(rates[1:])


class TokenClock:
    """A streamer for `generate` that only notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time: the first call brings the prompt, each later one a token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token has its time."""

    def rate(self) -> float:
        """Return tokens per second after the first new token; 0 with fewer than two."""
        steps = self.times[1:]
        return (len(steps) - 1) / (steps[-1] - steps[0]) if len(steps) > 1 else 0.0


def _check(model: nn.Module, windows: Tensor) -> None:
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise EvaluationError(f"windows of shape {list(windows.shape)}: expected [n, 2 or more]")
    config = model.config
    if config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise EvaluationError(f"{type(model).__name__} is no causal language model: it has no "
                              "perplexity")
    longest = context_length(model)
    if longest is not None and windows.shape[1] > longest:
        raise EvaluationError(f"a context of {windows.shape[1]} tokens is too long: the model "
                              f"reads at most {longest}")


def _forward(models: list[nn.Module], windows: Tensor, batch_size: int | None,
             progress: Progress | None) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield batches of windows with each model's logits [B, L, V]; models run in eval mode."""
    if batch_size is None:
        batch_size = max(1, min(16, _LOGITS // (windows.shape[1] * vocabulary(models[0]))))
    training = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        for start in range(0, len(windows), batch_size):
            batch = windows[start:start + batch_size]
            yield batch, [model(input_ids=batch.to(model.device), use_cache=False).logits
                          for model in models]
            if progress:
                progress(min(start + batch_size, len(windows)), len(windows))
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


def _chunks(logits: Tensor, windows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield float32 logits [c, V] and the tokens [c] that they predict, in order, with the number
    of their window."""
    step = max(1, _CHUNK // logits.shape[-1])
    for row, (scores, tokens) in enumerate(zip(logits, windows.to(logits.device), strict=True)):
        for start in range(0, len(tokens) - 1, step):
            end = min(start + step, len(tokens) - 1)
            yield row, scores[start:end].float(), tokens[start + 1:end + 1]


def _nll(logits: Tensor, tokens: Tensor) -> float:
    """Return the summed negative log-likelihood of tokens [c] in nats."""
    return cross_entropy(logits, tokens, reduction="none").sum(dtype=torch.float64).item()


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) in nats of each row of float32 logits [c, V]."""
    p, q = log_softmax(p, -1), log_softmax(q, -1)
    return (p.exp() * (p - q)).sum(-1).clamp_(min=0)


def _result(nll: np.ndarray, windows: Tensor, resamples: int, seed: int) -> PerplexityResult:
    """Return the result of the summed nll of each window, float64 [n]."""
    each = windows.shape[1] - 1
    tokens = len(nll) * each

    def of_sums(sums: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # above 709, which a destroyed model reaches
            return np.exp(sums[..., 0] / tokens)

    value = float(of_sums(nll.sum(keepdims=True)))
    if len(nll) < 2 or not math.isfinite(value):
        resamples = 0
    score = bootstrap.of_sums(nll[:, None], of_sums, resamples, seed)
    return PerplexityResult(math.inf if math.isnan(value) else value, float(nll.sum()) / tokens,
                            tokens, *windows.shape, score.low, score.high,
                            by_window=tuple((nll / each).tolist()))


def _encode(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the last hidden states [B, T, D] of a model and its logits, None without."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    if model.config.is_encoder_decoder and type(model).__name__.endswith("Model"):
        model = model.get_encoder()
    outputs = model(**inputs, output_hidden_states=True)
    states = getattr(outputs, "last_hidden_state", None)
    if states is None:
        hidden = getattr(outputs, "hidden_states", None) or outputs.decoder_hidden_states
        states = hidden[-1]
    return states, getattr(outputs, "logits", None)
