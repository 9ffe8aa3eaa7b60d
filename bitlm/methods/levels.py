"""What the methods share: greedy residual planes, nearest levels, least-squares refit.

All of it works on rows of weights [R, c], each row one group that has its own scales. A mask says
how much each entry counts: the planes of salient entries do not, and with compensation a refit
weighs columns by their share of the Hessian's diagonal.

Greedy: every order fits one plane to what the orders before it left over (BiLLM's residual atom,
arXiv 2402.04291; BinaryDM's initialisation, arXiv 2404.05662):

    mu_p = mean(rest);  rest -= mu_p;  B_p, a_p = rule(rest);  rest -= a_p B_p

Refit: with codes fixed, the scales (and shift) that minimise |W - sum_p a_p B_p - shift|^2 solve
the normal equations; with scales fixed, every weight takes its nearest level; in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..scheme import Scheme
from .registry import Fit

# (rest [R, c], mask or None, scheme) -> scale [R, 1] and cut [R, 1], None for midway
Rule = Callable[[Tensor, Tensor | None, Scheme], tuple[Tensor, Tensor | None]]

# Comparing with each midpoint beats a search while there are few levels.
FEW_LEVELS = 9
# Parts of a row's range tried for evenly spaced levels.
RANGES = (1.0, 0.85, 0.7, 0.55)


class DoesNotFit(ArithmeticError):
    """A scale is outside the range of the dtype it should be stored in."""


def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as they will be after storage in `dtype`; raises DoesNotFit on overflow."""
    rounded = values.to(dtype).to(torch.float32)
    if not bool(torch.isfinite(rounded).all()):
        raise DoesNotFit(f"a scale does not fit {dtype}")
    return rounded


def mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean [R, 1] of each row, entries weighted by the mask, 0 where none counts."""
    if mask is None:
        return values.mean(-1, keepdim=True)
    total = mask.sum(-1, keepdim=True)
    return (values * mask).sum(-1, keepdim=True) / torch.where(total > 0, total, 1)


# --- alphabets -----------------------------------------------------------------------------------

def binary_code(rest: Tensor, cut: Tensor | None) -> Tensor:
    """Return int8 codes: +1 from the cut upwards (so 0 is +1), else -1."""
    above = rest >= (0 if cut is None else cut)
    return above.to(torch.int8).mul_(2).sub_(1)


def ternary_code(rest: Tensor, cut: Tensor) -> Tensor:
    """Return int8 codes: the sign of entries beyond +-cut, else 0."""
    return (rest > cut).to(torch.int8).sub_((rest < -cut).to(torch.int8))


@dataclass(frozen=True)
class Alphabet:
    """The codes of a plane, and how one order of the greedy residual assigns them."""

    digits: tuple[int, ...]
    code: Callable[..., Tensor]  # (rest, cut) -> int8 codes

    def middle(self, scale: Tensor) -> Tensor | None:
        """Return the cut midway between the levels of one plane, None for 0."""
        return scale / 2 if 0 in self.digits else None

    @cache  # noqa: B019  (two instances, both live as long as the module)
    def combinations(self, planes: int) -> Tensor:
        """Return every combination of codes, int8 [planes, len(digits)**planes]."""
        return torch.tensor(list(itertools.product(self.digits, repeat=planes)),
                            dtype=torch.int8).T.contiguous()


BINARY = Alphabet((-1, 1), binary_code)
TERNARY = Alphabet((-1, 0, 1), ternary_code)


# --- greedy residual -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Order:
    """One plane of a greedy fit: rest -= offset; code by cut; rest -= scale * code."""

    offset: Tensor | None
    cut: Tensor | None
    scale: Tensor


def assign_in_order(orders: list[Order], alphabet: Alphabet) -> Callable[[Tensor], Tensor]:
    """Return the assignment that repeats the greedy steps."""
    def assign(weights: Tensor) -> Tensor:
        codes = torch.empty(len(orders), *weights.shape, dtype=torch.int8, device=weights.device)
        rest = weights
        for plane, order in enumerate(orders):
            if order.offset is not None:
                rest = rest - order.offset
            codes[plane] = alphabet.code(rest, order.cut)
            if plane + 1 < len(orders):
                rest = rest - codes[plane] * order.scale
        return codes
    return assign


def greedy(weights: Tensor, mask: Tensor | None, scheme: Scheme, dtype: torch.dtype,
           alphabet: Alphabet, rule: Rule) -> Fit:
    """Fit one plane after the other to the residual, scales and shift rounded as they arise."""
    orders: list[Order] = []
    rest, shift = weights, None
    for plane in range(scheme.planes):
        offset = None
        if scheme.center == "shift":
            offset = mean(rest, mask)
            before, shift = shift, stored(offset if shift is None else shift + offset, dtype)
            offset = shift if before is None else shift - before
        elif scheme.center == "drop" and plane == 0:
            offset = mean(rest, mask)
        if offset is not None:
            rest = rest - offset
        scale, cut = rule(rest, mask, scheme)
        scale = stored(scale, dtype)
        cut = alphabet.middle(scale) if cut is None else cut
        orders.append(Order(offset, cut, scale))
        if plane + 1 < scheme.planes:
            rest = rest - alphabet.code(rest, cut) * scale
    scales = torch.cat([order.scale for order in orders], dim=1)
    return Fit(scales, shift, assign_in_order(orders, alphabet))


# --- nearest level -------------------------------------------------------------------------------

def sorted_levels(scales: Tensor, shift: Tensor | None, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the levels [R, L] in rising order and the combination of codes of each.

    table: the combinations [P, L], float32.
    """
    levels = scales @ table
    if shift is not None:
        levels += shift
    return levels.sort(dim=-1, stable=True)


def midpoints(levels: Tensor) -> Tensor:
    return (levels[:, 1:] + levels[:, :-1]).div_(2)


def assign_nearest(scales: Tensor, shift: Tensor | None, alphabet: Alphabet,
                   ) -> Callable[[Tensor], Tensor]:
    """Return the assignment of the nearest level; a weight midway takes the upper one."""
    table = alphabet.combinations(scales.shape[1]).to(scales.device)
    levels, order = sorted_levels(scales, shift, table.float())
    middle = midpoints(levels)

    def assign(weights: Tensor) -> Tensor:
        if levels.shape[1] <= FEW_LEVELS:
            rank = torch.zeros(weights.shape, dtype=torch.uint8, device=weights.device)
            for column in middle.unbind(1):
                rank += weights >= column.unsqueeze(1)
            rank = rank.long()
        else:
            rank = torch.searchsorted(middle, weights.contiguous(), right=True)
        return table[:, order.gather(1, rank)]
    return assign


def nearest(scales: Tensor, shift: Tensor | None, alphabet: Alphabet) -> Fit:
    """Return the Fit with these levels in which every weight takes the nearest one."""
    if scales.shape[1] > 1:
        return Fit(scales, shift, assign_nearest(scales, shift, alphabet))
    order = Order(shift, alphabet.middle(scales), scales)
    return Fit(scales, shift, assign_in_order([order], alphabet))


# --- least squares -------------------------------------------------------------------------------

class SortedRows:
    """Rows of weights sorted once, so that each round costs the levels and not the weights.

    The weights nearest to a level are a run of the sorted row: how much they count and their sum
    are differences of prefix sums. Entries that do not count are sorted to the end, as infinity.
    """

    def __init__(self, weights: Tensor, mask: Tensor | None) -> None:
        self.counts: Tensor | None = None
        if mask is None:
            self.values = weighted = weights.sort(dim=-1).values
            self.used = torch.full_like(weights[:, :1], weights.shape[1], dtype=torch.int64)
            self.squares = weights.double().square_().sum(1)
        else:
            self.values, order = weights.masked_fill(mask == 0, torch.inf).sort(dim=-1)
            self.used = (mask != 0).sum(-1, keepdim=True)
            amount = mask.to(torch.float32).gather(1, order)
            finite = self.values.masked_fill(amount == 0, 0)
            weighted = finite * amount
            self.counts = _prefix(amount)
            self.squares = (weighted.double() * finite).sum(1)
        self.sums = _prefix(weighted)

    def reach(self, shift: Tensor | None) -> Tensor:
        """Return the largest |weight - shift| [R, 1], 0 where no entry counts."""
        last = (self.used - 1).clamp_(min=0)
        ends = torch.cat([self.values[:, :1], self.values.gather(1, last)], dim=1)
        ends = ends.masked_fill(self.used == 0, 0)
        return (ends if shift is None else ends - shift).abs().amax(1, keepdim=True)

    def nearest(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much the weights nearest to each rising level [R, L] count, and their sums."""
        inner = torch.minimum(torch.searchsorted(self.values, midpoints(levels)), self.used)
        ends = torch.cat([torch.zeros_like(self.used), inner, self.used], dim=1)
        counts = ends.double() if self.counts is None else self.counts.gather(1, ends)
        return counts.diff(dim=1), self.sums.gather(1, ends).diff(dim=1)


def _prefix(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, ... c entries, float64 [R, c + 1]."""
    sums = values.new_zeros(len(values), values.shape[1] + 1, dtype=torch.float64)
    sums[:, 1:] = values.cumsum(-1, dtype=torch.float64)
    return sums


def least_squares(counts: Tensor, sums: Tensor, table: Tensor, now: Tensor) -> Tensor:
    """Return the x [R, n] that minimise sum_l counts_l (table_l . x)^2 - 2 sums_l (table_l . x).

    counts, sums: [R, L], of the weights that have each combination of codes; table: [n, L]; all
    float64. Where codes do not determine a coefficient it stays near its value in `now` [R, n].
    """
    n = len(table)
    gram = (counts @ (table.unsqueeze(0) * table.unsqueeze(1)).flatten(0, 1).T).unflatten(1, (n, n))
    ridge = counts.sum(1).mul_(1e-9).clamp_(min=1e-9)
    gram.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
    right = sums @ table.T + ridge.unsqueeze(1) * now
    return torch.linalg.solve_ex(gram, right).result


@dataclass
class Levels:
    """Scales [R, P] and shift [R, 1] or None, with the squared error [R] of nearest codes."""

    scales: Tensor
    shift: Tensor | None
    error: Tensor

    def or_better(self, other: Levels) -> Levels:
        """Return, row by row, the one with the smaller error, this one on a tie."""
        better = (other.error < self.error).unsqueeze(1)
        shift = None if self.shift is None else torch.where(better, other.shift, self.shift)
        return Levels(torch.where(better, other.scales, self.scales), shift,
                      torch.minimum(self.error, other.error))


def alternate(rows: SortedRows, scales: Tensor, shift: Tensor | None, rounds: int,
              dtype: torch.dtype, codes: Tensor) -> Levels:
    """Alternate nearest codes and least-squares scales; return each row's best levels.

    codes: the combinations [P, L] of the alphabet, float32.
    """
    planes = scales.shape[1]
    table = codes if shift is None else torch.cat([codes, torch.ones_like(codes[:1])])
    table = table.double()
    best = None
    for turn in range(rounds + 1):
        levels, order = sorted_levels(scales, shift, codes)
        counts, sums = rows.nearest(levels)
        error = rows.squares + (levels * (levels * counts - 2 * sums)).sum(1)
        found = Levels(scales, shift, error)
        best = found if best is None else best.or_better(found)
        if turn == rounds:
            break
        now = scales if shift is None else torch.cat([scales, shift], dim=1)
        solved = least_squares(torch.zeros_like(counts).scatter_(1, order, counts),
                               torch.zeros_like(sums).scatter_(1, order, sums), table, now.double())
        # Falling positive scales: the same levels, and the planes' order says their weight.
        solved[:, :planes] = solved[:, :planes].abs().sort(dim=1, descending=True).values
        solved = stored(solved.float(), dtype)
        if torch.equal(solved, now):
            break
        scales, shift = solved[:, :planes], None if shift is None else solved[:, planes:]
    return best


def evenly_spaced(rows: SortedRows, shift: Tensor | None, planes: int, dtype: torch.dtype,
                  codes: Tensor, digits: int) -> Levels:
    """Return the best of a few uniform ladders of levels per row, from the full range down."""
    reach = rows.reach(shift)
    ratios = torch.tensor([float(digits) ** -plane for plane in range(planes)]).to(reach)
    ladders = [alternate(rows, stored(reach * part * ratios / ratios.sum(), dtype), shift, 0, dtype,
                         codes) for part in RANGES]
    best = ladders[0]
    for ladder in ladders[1:]:
        best = best.or_better(ladder)
    return best


def refit(weights: Tensor, mask: Tensor | None, scales: Tensor, shift: Tensor | None, rounds: int,
          dtype: torch.dtype, alphabet: Alphabet) -> tuple[Tensor, Tensor | None]:
    """Return the (scales, shift) that alternation reaches from the given ones, or better.

    The greedy residual is a poor start for several planes in rows with outliers: a second start,
    from evenly spaced levels, halves the output error of some layers; each row keeps the better.
    """
    planes = scales.shape[1]
    codes = alphabet.combinations(planes).to(scales)
    rows = SortedRows(weights, mask)
    best = alternate(rows, scales, shift, rounds, dtype, codes)
    if planes > 1:
        even = evenly_spaced(rows, shift, planes, dtype, codes, len(alphabet.digits))
        best = best.or_better(alternate(rows, even.scales, shift, rounds, dtype, codes))
    return best.scales, best.shift


def fit_planes(weights: Tensor, mask: Tensor | None, scheme: Scheme, dtype: torch.dtype,
               alphabet: Alphabet, rule: Rule) -> Fit:
    """Fit `scheme.planes` planes: the greedy residual, refitted if the scheme says so."""
    start = greedy(weights, mask, scheme, dtype, alphabet, rule)
    already_best = alphabet is BINARY and scheme.planes == 1 and start.shift is None
    if not scheme.refit or already_best:
        return start
    if scheme.center != "drop":
        return nearest(*refit(weights, mask, start.scales, start.shift, scheme.refit, dtype,
                              alphabet), alphabet)
    offset = mean(weights, mask)
    found = nearest(*refit(weights - offset, mask, start.scales, None, scheme.refit, dtype,
                           alphabet), alphabet)
    return Fit(found.scales, None, lambda new: found.assign(new - offset))
