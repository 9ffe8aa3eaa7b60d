"""The terms of a distillation loss, as data: (name, weight) or (name, weight, options).

Each term is a function of `losses` applied to what student and teacher made of a batch; it gives
parts, each a mean over the entries of a mask. A part of a micro-batch counts by its share of the
mask's entries in the whole accumulated batch, over all processes, so that the mean is that of one
large batch however it was cut.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import PROJECTIONS, attention_modules
from . import losses
from .estimators import biper_coefficient, biper_penalty
from .layers import fake_quant_layers
from .losses import Total, labelled, pairs_of_tokens
from .weights import second_basis

Part = tuple[str, Total]  # the name of a mask and the loss of its entries


class LossError(ValueError):
    """A loss that does not exist, or does not fit the models: the message says what does."""


# --- a batch -------------------------------------------------------------------------------------

@dataclass
class Batch:
    """The inputs of student and teacher, and which of their entries count.

    inputs: input_ids [B, L], labels, mostly attention_mask; of images pixel_values. causal: a
    position predicts the next token. pair: an encoder-decoder.
    """

    inputs: Mapping[str, Tensor]
    causal: bool = False
    pair: bool = False

    @cached_property
    def labels(self) -> Tensor:
        """The labelled rows [B] or positions [B, T], of causal models [B, L - 1]."""
        labels = self.inputs["labels"]
        if labels.is_floating_point():
            return torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        return labelled(labels[:, 1:] if self.causal else labels)

    @cached_property
    def tokens(self) -> Tensor:
        """The tokens [B, L] that are no padding, in an encoder-decoder those of the encoder."""
        mask = self.inputs.get("attention_mask")
        if mask is None and "input_ids" not in self.inputs:
            raise LossError("these inputs have no tokens, but images or sound: use the losses of "
                            "the logits")
        return torch.ones_like(self.inputs["input_ids"]).bool() if mask is None else mask.bool()

    @cached_property
    def targets(self) -> Tensor:
        """The positions [B, T] of the decoder of an encoder-decoder."""
        return self.labels if self.labels.dim() == 2 else self.tokens

    @cached_property
    def sentences(self) -> Tensor:
        return self.tokens.any(1)

    @cached_property
    def token_pairs(self) -> Tensor:
        return pairs_of_tokens(self.tokens, causal=self.causal)

    @cached_property
    def target_pairs(self) -> Tensor:
        return pairs_of_tokens(self.targets, causal=True)

    @cached_property
    def cross_pairs(self) -> Tensor:
        return pairs_of_tokens(self.targets, self.tokens)

    def count(self, mask: str) -> Tensor:
        """Return how many entries of a mask count, int64."""
        return getattr(self, mask).sum()


def is_causal(model: nn.Module) -> bool:
    """Tell whether a model's logits predict the next token and its loss shifts the labels."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    found = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    if found is None and "self.loss_function(" in _source(type(model).forward):
        found = ForCausalLMLoss  # what transformers takes then, as for GPT2LMHeadModel
    return found is ForCausalLMLoss and not model.config.is_encoder_decoder


def _source(function: Callable) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # made in a session: there is no file
        return ""


# --- what a model made of it ---------------------------------------------------------------------

@dataclass
class Views:
    """What a term looks at: outputs of student and teacher, their attention's projections by
    operand, one [B, L, width] a layer, and the teacher's principal directions by output."""

    batch: Batch
    student: Any
    teacher: Any
    student_projections: dict[str, list[Tensor]] = field(default_factory=dict)
    teacher_projections: dict[str, list[Tensor]] = field(default_factory=dict)
    directions: dict[str, list[Tensor]] = field(default_factory=dict)


def outputs_of(term: str, pair: bool) -> list[tuple[str, str]]:
    """Return the names of outputs, hidden states or attentions, and of the masks that go with
    them."""
    if term == "hidden_states":
        return [("encoder_hidden_states", "tokens"), ("decoder_hidden_states", "targets")] \
            if pair else [("hidden_states", "tokens")]
    return [("encoder_attentions", "token_pairs"), ("decoder_attentions", "target_pairs"),
            ("cross_attentions", "cross_pairs")] if pair else [("attentions", "token_pairs")]


@contextmanager
def listening(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what the query, key and value layers give in a forward, by operand, in order.

    Of an encoder-decoder those of the encoder. Raises LossError where attention has no such layers.
    """
    part = model.get_encoder() if model.config.is_encoder_decoder else model
    found: dict[str, list[Tensor]] = {operand: [] for operand in PROJECTIONS}
    handles = []
    modules, _ = attention_modules(part)
    for module in modules.values():
        for operand, names in PROJECTIONS.items():
            layer = next((getattr(module, name) for name in names if hasattr(module, name)), None)
            if layer is None:
                raise LossError(f"{type(module).__name__} has no layer of its own for the "
                                f"{operand}: relations need one; use hidden_mse")
            handles.append(layer.register_forward_hook(
                lambda _, __, output, own=found[operand]: own.append(output)))
    if not modules:
        raise LossError(f"{type(model).__name__} has no attention that relations can listen to: "
                        "use hidden_mse")
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


# --- terms ---------------------------------------------------------------------------------------
# (views, options) -> parts. Options are keyword-only, so that their names can be checked.

def task(views: Views) -> list[Part]:
    """The loss that the student itself computes from the labels."""
    count = views.batch.count("labels")
    if not int(count):  # the model's own mean would be 0 / 0
        return [("labels", Total(views.student.logits.sum() * 0, count))]
    if getattr(views.student, "loss", None) is None:
        raise LossError("the student computes no loss of its own: leave out the term task")
    return [("labels", Total(views.student.loss * count, count))]


def _logits(views: Views) -> tuple[Tensor, Tensor]:
    pair = views.student.logits, views.teacher.logits
    return tuple(each[:, :-1] for each in pair) if views.batch.causal else pair


def _of_classes(loss: Callable) -> Callable:
    def kept(views: Views, **options: Any) -> list[Part]:
        own, other = _logits(views)
        if own.shape[-1] == 1:
            raise LossError("one output has no distribution to match: use logits_mse for a task "
                            "that predicts a number")
        return [("labels", loss(own, other, mask=views.batch.labels, **options))]

    kept.__signature__ = _options_of(loss, "mask")
    return kept


def _options_of(loss: Callable, *known: str) -> inspect.Signature:
    """Return the signature of a loss without what the views give."""
    signature = inspect.signature(loss)
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
           for name, parameter in signature.parameters.items()
           if name not in ("student", "teacher", *known)]
    return signature.replace(parameters=own)


def logits_mse(views: Views) -> list[Part]:
    """Squared differences of the logits, averaged over the classes: for predicted numbers."""
    own, other = (logits[views.batch.labels].float() for logits in _logits(views))
    if own.shape != other.shape:
        raise LossError(f"logits of student and teacher are {list(own.shape)} and "
                        f"{list(other.shape)}: they must be of one shape")
    return [("labels", Total((own - other).square().mean(-1).sum(),
                             torch.tensor(len(own), device=own.device)))]


def plackett_luce(views: Views, *, temperature: float = 1.0, top: int | None = None
                  ) -> list[Part]:
    own, other = _logits(views)
    labels = views.batch.inputs["labels"]
    labels = labels[:, 1:] if views.batch.causal else labels
    return [("labels", losses.plackett_luce(own, other, labels, views.batch.labels, temperature,
                                            top))]


def _by_layer(loss: Callable, kind: str) -> Callable:
    def kept(views: Views, *, side: str = "", layers: str = "all",
             pairs: Sequence[Sequence[int]] | None = None, over: str = "sum") -> list[Part]:
        if side not in ("", "encoder", "decoder") or layers not in ("all", "last"):
            raise LossError(f"side is {side!r} and layers {layers!r}: use encoder, decoder or "
                            "nothing, and all or last")
        parts = []
        for name, mask in outputs_of(kind, views.batch.pair):
            if side and not name.startswith(side):
                continue
            own, other = (_found(outputs, name) for outputs in (views.student, views.teacher))
            if layers == "last":
                own, other = own[-1:], other[-1:]
            chosen = None if pairs is None else [tuple(pair) for pair in pairs]
            parts.append((mask, loss(own, other, getattr(views.batch, mask), chosen, over=over)))
        if not parts:
            raise LossError(f"the models have no {side}: leave out side")
        return parts

    return kept


def _found(outputs: Any, name: str) -> tuple[Tensor, ...]:
    found = getattr(outputs, name, None)
    if not found or found[0] is None:
        raise LossError(f"{type(outputs).__name__} has no {name}: this architecture does not "
                        "return them; leave out the loss that needs them")
    return found


def low_rank_mimicking(views: Views) -> list[Part]:
    return [(mask, losses.low_rank_mimicking(
        _found(views.student, name)[1:], _found(views.teacher, name)[1:], views.directions[name],
        getattr(views.batch, mask))) for name, mask in outputs_of("hidden_states",
                                                                  views.batch.pair)]


def _projections(views: Views, of: Sequence[str], layers: str) -> Iterator[tuple[Tensor, Tensor]]:
    unknown = [operand for operand in of if operand not in PROJECTIONS]
    if unknown or layers not in ("all", "last"):
        raise LossError(f"relations of {', '.join(of)}, layers {layers!r}: use query, key and "
                        "value, and all or last")
    for operand in of:
        own, other = views.student_projections[operand], views.teacher_projections[operand]
        chosen = [(len(own) - 1, len(other) - 1)] if layers == "last" else losses.layer_map(
            len(own), len(other))
        for mine, theirs in chosen:
            yield own[mine], other[theirs]


def relations(views: Views, *, of: Sequence[str] = tuple(PROJECTIONS), layers: str = "last",
              heads: int = 1) -> list[Part]:
    return [("tokens", losses.relations(own, other, views.batch.tokens, heads))
            for own, other in _projections(views, of, layers)]


def direction_matching(views: Views, *, of: Sequence[str] = tuple(PROJECTIONS),
                       layers: str = "all", heads: int = 1, norm: str = "mse") -> list[Part]:
    return [("sentences", losses.direction_matching(
        *(states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in each),
        views.batch.tokens, norm)) for each in _projections(views, of, layers)]


# --- regularisers of the student's weights -------------------------------------------------------
# (student, progress, options) -> a scalar: no mask, so it counts once a step.

def biper(student: nn.Module, progress: float, *, first: float = 0.0, last: float = 0.037,
          saturate: bool = False) -> Tensor:
    """BiPer's penalty averaged over layers, times a coefficient that grows with the training."""
    found = []
    for layer in fake_quant_layers(student).values():
        own = layer.weight_quantizer
        if own.estimator == "biper":
            found.append(biper_penalty(*own.of_sign(layer.matrix), saturate))
    if not found:
        raise LossError("no weight is trained with the estimator biper: leave out the term biper")
    return torch.stack(found).mean() * biper_coefficient(progress, first, last)


def basis(student: nn.Module, progress: float) -> Tensor:
    """BinaryDM's regulariser: the mean second scale of weights with two learned bases."""
    return second_basis(student)


# --- the tables ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Kind:
    """One term: its function, what it needs of the models, and the masks of its parts."""

    parts: Callable[..., list[Part]]
    needs: str = "logits"
    masks: tuple[str, ...] = ("labels",)


_ALL_TOKENS = ("tokens", "targets")
KINDS: dict[str, Kind] = {
    "task": Kind(task),
    "kl": Kind(_of_classes(losses.kl)),
    "soft_cross_entropy": Kind(_of_classes(losses.soft_cross_entropy)),
    "logits_mse": Kind(logits_mse),
    "plackett_luce": Kind(plackett_luce),
    "hidden_mse": Kind(_by_layer(losses.hidden_mse, "hidden_states"), "hidden_states",
                       _ALL_TOKENS),
    "attention_mse": Kind(_by_layer(losses.attention_mse, "attentions"), "attentions",
                          ("token_pairs", "target_pairs", "cross_pairs")),
    "low_rank_mimicking": Kind(low_rank_mimicking, "hidden_states", _ALL_TOKENS),
    "relations": Kind(relations, "projections", ("tokens",)),
    "direction_matching": Kind(direction_matching, "projections", ("sentences",)),
}
REGULARISERS: dict[str, Callable[..., Tensor]] = {"biper": biper, "second_basis": basis}


@dataclass(frozen=True)
class Term:
    """One term of a loss. label: its name in logs, with a number where it comes twice."""

    name: str
    weight: float
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""


def read(given: Sequence[Sequence[Any]]) -> tuple[Term, ...]:
    """Return the terms of a loss given as (name, weight) or (name, weight, options).

    Raises LossError for unknown names and options, and for what is no number.
    """
    terms: list[Term] = []
    for entry in given:
        if isinstance(entry, str) or not 2 <= len(entry) <= 3:
            raise LossError(f"{entry!r} is no loss: give [name, weight] or [name, weight, options]")
        name, weight, *options = entry
        if name not in KINDS and name not in REGULARISERS:
            near = difflib.get_close_matches(str(name), [*KINDS, *REGULARISERS], 1)
            raise LossError(f"unknown loss {name!r}" + f", did you mean {near[0]}?" * bool(near)
                            + f": the losses are {', '.join([*KINDS, *REGULARISERS])}")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise LossError(f"the weight of {name} is {weight!r}: use a number")
        own = dict(options[0]) if options else {}
        function = KINDS[name].parts if name in KINDS else REGULARISERS[name]
        known = [parameter.name for parameter in inspect.signature(function).parameters.values()
                 if parameter.kind is parameter.KEYWORD_ONLY]
        for option in own:
            if option not in known:
                raise LossError(f"{name} has no option {option!r}: it has "
                                f"{', '.join(known) or 'none'}")
        before = sum(term.name == name for term in terms)
        terms.append(Term(name, float(weight), own, name + f"_{before + 1}" * bool(before)))
    if not terms:
        raise LossError("there is no loss: give at least one, as [[\"task\", 1.0]]")
    return tuple(terms)


def needs(terms: Sequence[Term]) -> set[str]:
    """Return what the terms need of the models: logits, hidden_states, attentions, projections."""
    return {KINDS[term.name].needs for term in terms if term.name in KINDS}


def need_teacher(terms: Sequence[Term]) -> bool:
    """Tell whether any of the terms compares the student with a teacher."""
    return any(term.name in KINDS and term.name != "task" for term in terms)


def masks(terms: Sequence[Term], pair: bool) -> list[str]:
    """Return the masks that the terms' parts count by, in a fixed order."""
    found = {mask for term in terms if term.name in KINDS for mask in KINDS[term.name].masks}
    return sorted(found if pair else found - {"targets", "target_pairs", "cross_pairs"})


def values(terms: Sequence[Term], views: Views, totals: Mapping[str, float | Tensor] | None = None
           ) -> dict[str, Tensor]:
    """Return each term's value by label, not yet weighted, without the regularisers.

    totals: how many entries of each mask the accumulated batch has; the values of its micro-batches
    then add up. None: of this batch alone. Each is a mean over entries, so a mask is enough to know
    a micro-batch's share, whatever else (heads, classes) a loss counts by.
    """
    found = {}
    for term in terms:
        if term.name not in KINDS:
            continue
        value = 0.0
        for mask, total in KINDS[term.name].parts(views, **term.options):
            share = 1.0
            if totals is not None:
                share = views.batch.count(mask) / max(totals[mask], 1)
            value = value + total.mean() * share
        found[term.label] = value
    return found


def regularisers(terms: Sequence[Term], student: nn.Module, progress: float) -> dict[str, Tensor]:
    """Return the value of each regulariser by label, not yet weighted."""
    return {term.label: REGULARISERS[term.name](student, progress, **term.options)
            for term in terms if term.name in REGULARISERS}
