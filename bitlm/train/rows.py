"""Rows of training data: batches of similar length, and noise that is drawn anew in each epoch.

Everything random follows from a seed, the epoch and a row's number, so that a resumed training and
every process see what an uninterrupted one alone would.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .losses import IGNORED

POOL = 50  # batches whose rows are sorted together
TOGETHER = 1000  # texts that are tokenized at once


class ByLength(Sampler[int]):
    """Numbers of rows such that batches of `batch` have similar lengths, shuffled every epoch.

    Rows are shuffled, pools of POOL batches are sorted by length, and the batches of all pools are
    shuffled, so that lengths do not follow the course of the training.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = generator(self.seed, self.epoch)
        order = torch.randperm(len(self.lengths), generator=random).tolist()
        pools = [sorted(order[start:start + POOL * self.batch], key=lambda row: self.lengths[row])
                 for start in range(0, len(order), POOL * self.batch)]
        rows = [row for pool in pools for row in pool]
        batches = [rows[start:start + self.batch] for start in range(0, len(rows), self.batch)]
        # A short batch stays last: in the middle it would shift the batches behind it.
        full = len(rows) // self.batch
        for number in [*torch.randperm(full, generator=random).tolist(),
                       *range(full, len(batches))]:
            yield from batches[number]


class Encoded(Dataset):
    """Rows of token lists by name, {"input_ids": [...], "labels": [...]}, kept as 32-bit numbers.

    Lists of Python's numbers take ten times as much memory, in each of several processes. fields:
    the lists of all rows. A row has an `attention_mask` of ones, too.
    """

    def __init__(self, **fields: Iterable[Sequence[int]]) -> None:
        self.tokens = {name: array("i") for name in fields}
        self.ends = {name: array("q", [0]) for name in fields}
        for name, lists in fields.items():
            for ids in lists:
                self.tokens[name].extend(ids)
                self.ends[name].append(len(self.tokens[name]))

    def __len__(self) -> int:
        return len(self.ends["input_ids"]) - 1

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        row = {name: tokens[self.ends[name][number]:self.ends[name][number + 1]].tolist()
               for name, tokens in self.tokens.items()}
        return row | {"attention_mask": [1] * len(row["input_ids"])}


class Windows(Dataset):
    """Windows of tokens, int64 [n, L], as rows that are their own labels."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        ids = self.windows[number].tolist()
        return {"input_ids": ids, "labels": ids}


class Noised(Dataset):
    """Rows that are changed at random, differently in each `epoch`, which the trainer sets.

    noise: (row, generator) -> example.
    """

    def __init__(self, rows: Sequence[Any], noise: Callable[[Any, torch.Generator], dict],
                 seed: int) -> None:
        self.rows, self.noise, self.seed, self.epoch = rows, noise, seed, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.noise(self.rows[number], generator(self.seed, self.epoch, number))


def lengths(rows: Sequence[Any]) -> list[int]:
    """Return a length of each row: its input tokens, before the noise whatever noise is made of."""
    if isinstance(rows, Noised):
        return [len(row) for row in rows.rows]
    if isinstance(rows, Encoded):
        ends = rows.ends["input_ids"]
        return [end - start for start, end in pairwise(ends)]
    return [len(rows[number]["input_ids"]) for number in range(len(rows))]


def pairs(tokenizer: Any, sources: Sequence[str], targets: Sequence[str], longest: int,
          longest_target: int, prefix: str = "") -> Encoded:
    """Return rows of an encoder-decoder, cut at `longest` and `longest_target` tokens.

    Raises ValueError for numbers of sources and targets that differ.
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} sources have {len(targets)} targets")

    def encoded(texts: Sequence[str], name: str, most: int, before: str = ""
                ) -> Iterator[list[int]]:
        for start in range(0, len(texts), TOGETHER):
            some = [before + text for text in texts[start:start + TOGETHER]]
            yield from tokenizer(**{name: some}, truncation=True, max_length=most)["input_ids"]

    return Encoded(input_ids=encoded(sources, "text", longest, prefix),
                   labels=encoded(targets, "text_target", longest_target))


def largest_token(rows: Sequence[Any], names: Sequence[str]) -> int:
    """Return the largest token of rows under these names, 0 where noise is still to be drawn."""
    if isinstance(rows, Noised):
        return 0
    if isinstance(rows, Windows):
        return int(rows.windows.max())
    if isinstance(rows, Encoded):
        return max(max(rows.tokens[name], default=0) for name in names)
    return max((int(max(row[name], default=0)) for row in rows for name in names if name in row),
               default=0)


def generator(*seeds: int) -> torch.Generator:
    """Return a generator that several numbers seed."""
    seed = 0
    for each in seeds:
        seed = (seed * 1_000_003 + each + 1) % (1 << 62)
    return torch.Generator().manual_seed(seed)


def mask_tokens(ids: Sequence[int], random: torch.Generator, *, mask: int, vocabulary: int,
                special: Sequence[int], share: float = 0.15) -> dict[str, list[int]]:
    """Return a row for masked language modelling: 15 % of the tokens are to be predicted.

    Of these 80 % become `mask`, 10 % another token, 10 % stay (BERT, arXiv 1810.04805). At least
    one token is chosen where one is not `special`.
    """
    tokens = torch.as_tensor(ids)
    plain = ~torch.isin(tokens, torch.tensor(list(special)))
    chosen = plain & (torch.rand(len(tokens), generator=random) < share)
    if not bool(chosen.any()) and bool(plain.any()):
        places = plain.nonzero().squeeze(1)
        chosen[places[int(torch.randint(len(places), (1,), generator=random))]] = True
    fate = torch.rand(len(tokens), generator=random)
    others = torch.randint(vocabulary, (len(tokens),), generator=random)
    shown = torch.where(chosen & (fate < 0.8), mask, tokens)
    shown = torch.where(chosen & (fate >= 0.9), others, shown)
    return {"input_ids": shown.tolist(), "labels": torch.where(chosen, tokens, IGNORED).tolist()}


def infill(ids: Sequence[int], random: torch.Generator, *, mask: int, share: float = 0.3,
           mean: float = 3.0) -> list[int]:
    """Return tokens whose spans are replaced by one `mask` each: BART's text infilling.

    share: of the tokens that are covered. Span lengths are Poisson with `mean`; one of length 0
    inserts a mask. Source: BART (arXiv 1910.13461). ids: without start and end tokens.
    """
    budget = math.ceil(len(ids) * share)
    lengths: list[int] = []
    while budget > 0 and len(lengths) < len(ids):
        length = int(torch.poisson(torch.tensor(mean), generator=random))
        lengths.append(min(length, budget))
        budget -= max(lengths[-1], 1)  # an insertion counts too, or there were no end to them
    # The spans and the single tokens between them, in random order.
    left = len(ids) - sum(lengths)
    pieces = torch.randperm(left + len(lengths), generator=random)
    shown, place = [], 0
    for piece in pieces.tolist():
        if piece < left:
            shown.append(ids[place])
            place += 1
        else:
            place += lengths[piece - left]
            if shown[-1:] != [mask]:  # two spans that touch are one
                shown.append(mask)
    return shown


def permute(sentences: Sequence[Sequence[int]], random: torch.Generator) -> list[int]:
    """Return the tokens of sentences in random order: BART's sentence permutation."""
    order = torch.randperm(len(sentences), generator=random).tolist()
    return [token for number in order for token in sentences[number]]
