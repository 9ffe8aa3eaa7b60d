"""The losses of distillation, each as a sum and a count: `Total(sum, count)`.

A masked mean over micro-batches or processes of unequal length is the sum of their sums divided by
the sum of their counts, not the mean of their means. So no loss here divides: `count` says how many
positions, rows, entries or heads the sum is over, and the caller divides by the count of the whole
accumulated batch. Where nothing is accumulated, `Total.mean()` does.

Masks are True (or 1) where an entry counts; None counts all. What a mask leaves out may hold
anything, infinities too, and changes neither value nor gradient. Teachers get no gradient. Sums are
float32, float64 where the student is.

Formulas: Hinton et al. (arXiv 1503.02531), TBT (2306.01841), BiT (2205.13016), Plackett-Luce
distillation (2506.12542), MiniLMv2 (2012.15828), BiBERT (2203.06390), BinaryDM (2404.05662).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Pairs = Sequence[tuple[int, int]]  # (student layer, teacher layer)


class Total(NamedTuple):
    """A loss before its division: scalars, the sum with a gradient and the count without."""

    sum: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        """Return sum / count, 0 where nothing counted."""
        return self.sum / self.count.clamp(min=1)


# --- which positions count -----------------------------------------------------------------------

IGNORED = -100  # the label of positions that no loss looks at


def shift(labels: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return labels[:, 1:] and every other tensor [:, :-1]: causal models predict the next token.

    labels: int [B, L]. others: [B, L, ...], as the logits of student and teacher.
    """
    return labels[:, 1:], *(other[:, :-1] for other in others)


def labelled(labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mask of positions that have a label and are not padding, shaped like labels."""
    has = labels != IGNORED
    return has if mask is None else has & mask.bool()


def pairs_of_tokens(rows: Tensor, columns: Tensor | None = None, causal: bool = False) -> Tensor:
    """Return the mask [B, 1, L, M] of attention entries between tokens that are not padding.

    rows: [B, L], of the queries. columns: [B, M], of the keys, None for the same. causal: without
    keys after the query.
    """
    rows = rows.bool()
    columns = rows if columns is None else columns.bool()
    both = rows[:, None, :, None] & columns[:, None, None, :]
    return both.tril(columns.shape[1] - rows.shape[1]) if causal else both


# --- logits --------------------------------------------------------------------------------------

def kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None,
       temperature: float = 1.0) -> Total:
    """KL(teacher || student) of the classes, times T^2; count: positions.

        T^2 sum_c p_c (log p_c - log q_c),  p = softmax(teacher / T), q = softmax(student / T)

    student, teacher: logits [..., C]. mask: [...].
    """
    _same("logits", student, teacher)
    student, teacher = _chosen(mask, student, teacher)
    q, p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return _total((p.exp() * (p - q)).sum() * temperature ** 2, len(q))


def soft_cross_entropy(student: Tensor, teacher: Tensor, mask: Tensor | None = None,
                       over: str = "positions") -> Total:
    """-sum_c p_c log q_c; count: positions (TBT) or positions times classes (BiT).

    student, teacher: logits [..., C]. mask: [...]. over: "positions" or "classes".
    """
    _one_of("over", over, ("positions", "classes"))
    _same("logits", student, teacher)
    student, teacher = _chosen(mask, student, teacher)
    count = student.numel() if over == "classes" else len(student)
    return _total(-(teacher.softmax(-1) * student.log_softmax(-1)).sum(), count)


def plackett_luce(student: Tensor, teacher: Tensor, labels: Tensor | None = None,
                  mask: Tensor | None = None, temperature: float = 1.0,
                  top: int | None = None) -> Total:
    """List-wise distillation, in place of the cross entropy; count: positions.

        sum_k p_o(k) ( logsumexp_{l >= k} s_o(l) - s_o(k) ),  p = softmax(teacher / T)

    o: the label first, then the other classes by falling teacher logit.

    student, teacher: logits [..., C]. labels: int [...], positions of label -100 do not count; None
    for the teacher's first choice. top: only the terms of the label and of the teacher's `top` best
    other classes, which saves the sort of a large vocabulary. What is left out are terms of nearly
    no weight; the classes behind them stay in the logsumexp, so that the student cannot hide
    probability there.
    Raises ValueError for labels outside 0..C-1.
    """
    _same("logits", student, teacher)
    if labels is None:
        labels = teacher.argmax(-1)
    mask = labelled(labels, mask)
    student, teacher = _chosen(mask, student, teacher)
    first = labels[mask].long().unsqueeze(-1)
    classes = student.shape[-1]
    if first.numel() and not 0 <= int(first.min()) <= int(first.max()) < classes:
        raise ValueError(f"labels go from {int(first.min())} to {int(first.max())}, the logits "
                         f"have classes 0 to {classes - 1}: map the labels of the data first")
    ranked = teacher.scatter(-1, first, torch.inf)
    kept = classes if top is None else min(top + 1, classes)
    if kept == classes:
        order = ranked.sort(dim=-1, descending=True, stable=True).indices
        rest = None
    else:
        order = ranked.topk(kept, -1).indices
        rest = student.scatter(-1, order, -torch.inf).logsumexp(-1, keepdim=True)
    weights = (teacher / temperature).softmax(-1).gather(-1, order)
    scores = student.gather(-1, order)
    backwards = scores.flip(-1) if rest is None else torch.cat([rest, scores.flip(-1)], -1)
    behind = backwards.logcumsumexp(-1).flip(-1)[..., :kept]
    return _total((weights * (behind - scores)).sum(), len(scores))


# --- layers --------------------------------------------------------------------------------------

def layer_map(student: int, teacher: int) -> list[tuple[int, int]]:
    """Return (student layer, teacher layer) for every student layer, spread evenly, ends on ends.

    student, teacher: how many each has. Hidden states count the embedding's output as one.
    Raises ValueError for models without layers.
    """
    if student < 1 or teacher < 1:
        raise ValueError(f"a map of {student} student and {teacher} teacher layers: both need one")
    if student == 1:
        return [(0, teacher - 1)]
    last = student - 1
    return [(layer, (2 * layer * (teacher - 1) + last) // (2 * last)) for layer in range(student)]


def hidden_mse(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None,
               pairs: Pairs | None = None,
               projection: Callable[[Tensor], Tensor] | None = None, over: str = "sum") -> Total:
    """Squared differences of hidden states, averaged over the width; count: positions.

    student, teacher: one [B, L, width] a layer. mask: [B, L]. pairs: which layers meet, None for
    `layer_map`. projection: from the student's width to the teacher's, where they differ. over:
    "sum" or "mean" of the layers' losses (TBT and BiT sum, BiPFT averages).
    """
    def layer(own: Tensor, other: Tensor) -> Total:
        own, other = _rows(mask, own), _rows(mask, other.detach())
        own = _floats(own if projection is None else projection(own))
        _same("hidden states that count", own, other,
              "use relations, whose widths may differ, or a projection")
        return _total((own - _floats(other, own)).square().mean(-1).sum(), len(own))

    return _layers(layer, student, teacher, pairs, over)


def attention_mse(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None,
                  pairs: Pairs | None = None, over: str = "sum") -> Total:
    """Squared differences of attention; count: entries, those of all heads.

    student, teacher: one [B, H, L, M] a layer, the scores before the softmax or the probabilities.
    mask: [B, 1, L, M], see `pairs_of_tokens`; masked scores are left out, however low they are.
    pairs, over: as for `hidden_mse`.
    """
    def layer(own: Tensor, other: Tensor) -> Total:
        _same("attention maps", own, other, "use relations, which need no equal heads")
        wide = None if mask is None else mask.expand(own.shape)
        own, other = _chosen(wide, own.unsqueeze(-1), other.unsqueeze(-1))
        return _total((own - other).square().sum(), own.numel())

    return _layers(layer, student, teacher, pairs, over)


def low_rank_mimicking(student: Sequence[Tensor], teacher: Sequence[Tensor],
                       directions: Sequence[Tensor], mask: Tensor | None = None) -> Total:
    """BinaryDM's loss: squared differences along the teacher's principal directions.

        || F P - F^q P ||^2 / directions, averaged over blocks; count: positions

    student, teacher: one block output [B, L, c] each. directions: one [c, r] each, of
    `principal_directions` of the teacher's. mask: [B, L].
    """
    if not len(student) == len(teacher) == len(directions):
        raise ValueError(f"{len(student)} student blocks, {len(teacher)} of the teacher and "
                         f"{len(directions)} sets of directions: give as many of each")
    blocks = []
    for own, other, along in zip(student, teacher, directions):
        _same("block outputs", own, other)
        own, other = _chosen(mask, own, other)
        difference = (own - other) @ along.to(own)
        blocks.append(_total(difference.square().mean(-1).sum(), len(own)))
    return _combined(blocks, "mean")


@torch.no_grad()
def principal_directions(batches: Iterable[Tensor], count: int) -> Tensor:
    """Return the leading principal directions of all rows of all batches, float32 [c, count].

    batches: [..., c] each, without padding (`output[mask]`); several, since one may be unlike the
    rest. BinaryDM keeps c / 4. They come from the covariance, without random numbers; each points
    to where its largest component is positive.
    Raises ValueError for no rows, or a count that is not 1..c.
    """
    rows, total, squares = 0, 0, 0
    for batch in batches:
        flat = batch.reshape(-1, batch.shape[-1]).double()
        rows += len(flat)
        total = total + flat.sum(0)
        squares = squares + flat.T @ flat
    if not rows:
        raise ValueError("principal directions of no rows: pass batches that hold some")
    if not 1 <= count <= len(squares):
        raise ValueError(f"{count} principal directions of {len(squares)} features: use 1 to "
                         f"{len(squares)}")
    average = total / rows
    leading = torch.linalg.eigh(squares / rows - average.outer(average)).eigenvectors
    leading = leading[:, -count:].flip(1)
    largest = leading.gather(0, leading.abs().argmax(0, keepdim=True))
    return torch.where(largest < 0, -leading, leading).float()


# --- relations between tokens --------------------------------------------------------------------

def relations(student: Tensor, teacher: Tensor, mask: Tensor | None = None,
              heads: int = 1) -> Total:
    """MiniLMv2's loss of the queries, of the keys or of the values; count: rows times heads.

        KL( softmax(A_t A_t^T / sqrt(d_t)) || softmax(A_s A_s^T / sqrt(d_s)) )

    student, teacher: [B, L, width], all attention heads side by side; widths and head counts may
    differ, they are split anew into `heads` relation heads of width d. mask: [B, L]; padding is
    neither a row nor part of the softmax.
    Raises ValueError where a width is not a multiple of `heads`, or the tokens differ.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(f"relations of {list(student.shape[:2])} tokens to the teacher's "
                         f"{list(teacher.shape[:2])}: both must read the same tokens")
    real = _real(mask, student)
    q, p = (_relation(states, real, heads).log_softmax(-1)
            for states in (_floats(student), _floats(teacher.detach(), student)))
    both = real[:, None, :, None] & real[:, None, None, :]
    terms = torch.where(both, p.exp() * (p - q), 0)
    return _total(terms.sum(), real.sum() * heads)


def _relation(states: Tensor, real: Tensor, heads: int) -> Tensor:
    """Return A A^T / sqrt(d) [B, heads, L, L], very low in the columns of padding."""
    if states.shape[-1] % heads:
        raise ValueError(f"a width of {states.shape[-1]} has no {heads} relation heads: use a "
                         "divisor of both widths")
    split = states.masked_fill(~real.unsqueeze(-1), 0).unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
    return scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)


def direction_matching(student: Tensor, teacher: Tensor, mask: Tensor | None = None,
                       norm: str = "mse") -> Total:
    """BiBERT's loss of the queries, keys or values; count: sentences times heads.

        P = A A^T / || A A^T ||_F,  the difference of P_s and P_t

    student, teacher: [B, H, L, d], d may differ. mask: [B, L]; padding is left out of P. norm:
    "mse", squares averaged over the L^2 entries of real tokens, or "l2", the Frobenius norm.
    Raises ValueError where heads or tokens differ.
    """
    _one_of("norm", norm, ("mse", "l2"))
    if student.shape[:3] != teacher.shape[:3]:
        raise ValueError(f"directions of {list(student.shape[:3])} sentences, heads and tokens to "
                         f"the teacher's {list(teacher.shape[:3])}: use relations, which need no "
                         "equal heads")
    real = _real(mask, student[:, 0])
    own, other = (_direction(states, real)
                  for states in (_floats(student), _floats(teacher.detach(), student)))
    difference = (own - other).flatten(2)
    lengths = real.sum(1).clamp(min=1).unsqueeze(1)
    by_head = (difference.square().sum(-1) / lengths ** 2 if norm == "mse" else
               torch.linalg.vector_norm(difference, dim=-1))
    return _total(by_head.sum(), real.any(1).sum() * student.shape[1])


def _direction(states: Tensor, real: Tensor) -> Tensor:
    states = states.masked_fill(~real[:, None, :, None], 0)
    products = states @ states.transpose(-1, -2)
    size = torch.linalg.matrix_norm(products, keepdim=True)
    return products / torch.where(size > 0, size, 1)


# --- what they share -----------------------------------------------------------------------------

def _floats(values: Tensor, like: Tensor | None = None) -> Tensor:
    """Return values in float32, in float64 where they (or `like`) have it."""
    double = (values if like is None else like).dtype == torch.float64
    return values.to(torch.float64 if double else torch.float32)


def _rows(mask: Tensor | None, values: Tensor) -> Tensor:
    """Return the rows [n, c] of values [..., c] that count."""
    if mask is None:
        return values.reshape(-1, values.shape[-1])
    if mask.shape != values.shape[:-1]:
        raise ValueError(f"a mask of shape {list(mask.shape)} for {list(values.shape)}: it must be "
                         f"{list(values.shape[:-1])}")
    return values[mask.bool()]


def _chosen(mask: Tensor | None, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of student and teacher that count, as floats."""
    student = _floats(_rows(mask, student))
    return student, _floats(_rows(mask, teacher.detach()), student)


def _real(mask: Tensor | None, states: Tensor) -> Tensor:
    """Return the mask of real tokens, bool [B, L], for states [B, L, ...]."""
    if mask is None:
        return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    return mask.bool()


def _total(value: Tensor, count: int | Tensor) -> Total:
    return Total(value, torch.as_tensor(count, device=value.device))


def _layers(loss: Callable[[Tensor, Tensor], Total], student: Sequence[Tensor],
            teacher: Sequence[Tensor], pairs: Pairs | None, over: str) -> Total:
    """Sum or average the losses of the pairs of layers."""
    if pairs is None:
        pairs = layer_map(len(student), len(teacher))
    for own, other in pairs:
        if own not in range(len(student)) or other not in range(len(teacher)):
            raise ValueError(f"layers {own} and {other} are mapped, student and teacher have "
                             f"{len(student)} and {len(teacher)} (from 0)")
    return _combined([loss(student[own], teacher[other]) for own, other in pairs], over)


def _combined(parts: list[Total], over: str) -> Total:
    _one_of("over", over, ("sum", "mean"))
    if not parts:
        raise ValueError("no layers to compare: map at least one")
    value = sum(part.sum for part in parts)
    return Total(value / len(parts) if over == "mean" else value, parts[0].count)


def _same(what: str, student: Tensor, teacher: Tensor,
          remedy: str = "they must be of one shape") -> None:
    if student.shape != teacher.shape:
        raise ValueError(f"{what} of student and teacher are {list(student.shape)} and "
                         f"{list(teacher.shape)}: {remedy}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: use one of {', '.join(allowed)}")
