"""From the names in the files to the names in the model.

A checkpoint may keep the experts of a fused weight one by one (Mixtral:
`block_sparse_moe.experts.3.w1.weight.plane0.signs`), and a model may be opened as another class
than the one it was saved as. transformers' own conversion mapping answers both, applied to the
dense names: the packed ones follow them with their suffix.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from ..checkpoint import Header, of_quantizer, split_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Found:
    """What the files hold, by the model's names.

    packed: weight -> tensor -> header, experts and parts joined. quantizers: headers of the tensors
    of quantizers and estimators. dense: headers of other tensors.
    guards: names of the zero-length guard tensors. strays: packed tensors in the files that no
    weight of this model takes. problems: what does not add up. prefix: (here, saved), what the
    names of this model and of the saved one begin with.
    """

    packed: dict[str, dict[str, Header]] = field(default_factory=dict)
    quantizers: dict[str, Header] = field(default_factory=dict)
    dense: dict[str, Header] = field(default_factory=dict)
    guards: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    prefix: tuple[str, str] = ("", "")

    def saved_name(self, name: str) -> str:
        """Return the name that a weight had in the model that was saved."""
        here, saved = self.prefix
        return saved + name.removeprefix(here)


def find_tensors(model: PreTrainedModel, headers: dict[str, Header]) -> Found:
    """Sort the headers of the files by the weights of a dense skeleton."""
    namer = _Namer(model)
    found = Found()
    pieces: dict[str, dict[str, list[Header]]] = defaultdict(lambda: defaultdict(list))
    joined = set()
    for key in sorted(headers, key=dot_natural_key):
        header = headers[key]
        if of_quantizer(key):
            continue
        disk, tensor = split_name(key)
        names, converted = namer.names(disk)
        if not tensor:
            guard = header.shape == (0,) and header.dtype == torch.uint8
            found.guards += names if guard else []
            found.dense |= {} if guard else dict.fromkeys(names, header)
            continue
        for name in names:
            if name not in namer.weights:
                found.strays.append(key)
                continue
            share = header
            if len(names) > 1:  # a fused layer in the file that the model holds apart
                rows = header.shape[0] // len(names) if header.shape else 0
                share = Header(header.dtype, (rows, *header.shape[1:]), header.file)
            pieces[name][tensor].append(share)
            if converted and len(names) == 1:
                joined.add(name)
    for name, tensors in pieces.items():
        found.packed[name] = {}
        for tensor, headers_of in tensors.items():
            shape = _join(headers_of, namer.weights[name] if name in joined else ())
            if shape is None:
                found.problems.append(f"{name}.{tensor} is in {len(headers_of)} pieces that differ "
                                      "in shape or dtype, or of which some are missing")
            else:
                found.packed[name][tensor] = Header(headers_of[0].dtype, shape, headers_of[0].file)
    found.prefix = namer.prefix
    here, saved = found.prefix
    found.quantizers = {here + namer.plain(key).removeprefix(saved): header
                        for key, header in headers.items() if of_quantizer(key)}
    return found


class _Namer:
    """The names of a model for the names in the files."""

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self.renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self.converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self.targets = {source: converter.target_patterns for converter in self.converters
                        for source in converter.source_patterns}
        self.state = model.state_dict()
        self.weights = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        self.base = model.base_model_prefix
        self.prefix = ("", "")
        self._known: dict[str, tuple[list[str], bool]] = {}

    def plain(self, disk: str) -> str:
        """Return the name that transformers makes of one in the files, before any prefix."""
        return rename_source_key(disk, self.renamings, self.converters)[0]

    def names(self, disk: str) -> tuple[list[str], bool]:
        """Return the model's names for a dense name in the files; tell if a converter takes it."""
        if disk not in self._known:
            rules = self.renamings, self.converters
            plain, pattern = rename_source_key(disk, *rules)
            name, _ = rename_source_key(disk, *rules, self.base, self.state)
            if name != plain and name in self.weights:
                dot = f"{self.base}."
                self.prefix = ("", dot) if plain == dot + name else (dot, "")
            targets = self.targets.get(pattern, [])
            names = [name.replace(targets[0], target) for target in targets] or [name]
            self._known[disk] = names, pattern is not None
        return self._known[disk]


def _join(pieces: list[Header], dense: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape that pieces make, one behind the other; None when they do not fit.

    dense: the shape of the dense weight that they are joined to, [E, ...] or [N, K]; () where the
    file holds the weight as it is.
    """
    first = pieces[0]
    if any((piece.shape, piece.dtype) != (first.shape, first.dtype) for piece in pieces):
        return None
    if not dense:
        return first.shape if len(pieces) == 1 else None
    experts = dense[0] if len(dense) == 3 else 1
    if len(pieces) % experts or not first.shape:
        return None
    rows = len(pieces) // experts * first.shape[0]
    lead = (experts,) if len(dense) == 3 else ()
    return (*lead, rows, *first.shape[1:])
