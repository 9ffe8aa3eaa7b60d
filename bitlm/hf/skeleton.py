"""The skeleton of a packed model on the meta device, sized by the headers of its files."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..attention import Estimators, install_attention
from ..checkpoint import (
    CheckpointError,
    Header,
    check_quantizers,
    raise_problems,
    read_headers,
    verify,
)
from ..modules import install
from ..plan import Entry, Request
from ..quantizers import ActivationQuantizer
from ..quantizers import build as build_quantizer
from ..targets import find
from ..weight import PackedWeight
from .mapping import Found, find_tensors
from .tying import rewrite_tied_keys, tied_group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(model: PreTrainedModel, request: Request, files: list[str] | None) -> Found:
    """Replace the planned weights of a dense skeleton by packed ones without data, in place.

    Quantizers of inputs and of attention come with them.

    With files their headers are checked first and give the sizes that depend on the data; without
    (a state dict in memory) the plan's sizes stand in. Raises CheckpointError for files that do not
    fit. Returns what the files hold.
    """
    found = find_tensors(model, read_headers(files)) if files else Found()
    entries = planned_entries(model, request, found)
    if files:
        _share_tied(model, entries, found)
        entries = _check(model, entries, found)
    for name, entry in entries.items():
        planned = {n: Header(dtype, shape, "") for n, (dtype, shape) in entry.tensors().items()}
        headers = found.packed.get(name, planned)
        tensors = {tensor: torch.empty(header.shape, dtype=header.dtype, device="meta")
                   for tensor, header in headers.items()}
        weight = PackedWeight(tensors, entry.form, entry.target.dtype)
        weight.activation = entry.scheme.activation
        install(model, name, weight, input_quantizer(entry, "meta"))
    install_attention(model, request.attention, found.saved_name, strict=False)
    if files:
        planned, headers = quantizer_tensors(model), found.quantizers
        if not saved_as_this(model):  # which may lack modules that have quantizers
            headers = {name: header for name, header in headers.items() if name in planned}
        raise_problems(check_quantizers(planned, headers))
    rewrite_tied_keys(model)
    return found


def input_quantizer(entry: Entry, device: torch.device | str) -> ActivationQuantizer | None:
    """Return the quantizer of the inputs of a planned layer, or None."""
    if entry.scheme.input is None:
        return None
    name = entry.name.removesuffix("weight") + "input"
    with torch.device(device):
        return build_quantizer(entry.scheme.input, entry.target.columns, name)


def quantizer_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of all quantizers and estimators of a model by their names."""
    return {f"{path}.{name}": tensor for path, module in model.named_modules()
            if isinstance(module, ActivationQuantizer | Estimators)
            for name, tensor in module.state_dict(keep_vars=True).items()}


def planned_entries(model: PreTrainedModel, request: Request, found: Found) -> dict[str, Entry]:
    """Return the planned weights, with patterns read against the names at the time of saving.

    Unlike plan.make_plan this lets a pattern match nothing: the model may be opened as a class
    that lacks the weight. Tied weights all have the scheme of their source.
    """
    entries = {}
    targets, _ = find(model, (), request.embeddings is not None)
    for target in targets:
        saved = found.saved_name(target.name)
        if any(re.search(pattern, saved) for pattern in request.skip):
            continue
        entries[target.name] = Entry(target, request.scheme_for(replace(target, name=saved)))
    # A weight whose source stays dense stays tied to it, and dense.
    entries = {name: entry for name, entry in entries.items()
               if not entry.target.tied or entry.target.tied in entries}
    for name, entry in entries.items():
        source = tied_group(model, name)[0]
        if source in entries:
            entries[name] = replace(entry, scheme=entries[source].scheme)
    return entries


def _share_tied(model: PreTrainedModel, entries: dict[str, Entry], found: Found) -> None:
    """Let tied weights, of which the files hold one copy, all have its headers."""
    for name in entries:
        if name not in found.packed:
            for other in tied_group(model, name):
                if other in found.packed:
                    found.packed[name] = found.packed[other]


def saved_as_this(model: PreTrainedModel) -> bool:
    return type(model).__name__ in (model.config.architectures or [])


def _check(model: PreTrainedModel, entries: dict[str, Entry], found: Found) -> dict[str, Entry]:
    """Return the entries to install after checking them against the files."""
    problems = list(found.problems)
    if saved_as_this(model):
        problems += [f"{name} is dense in the file but packed in the configuration"
                     for name in entries if name in found.dense and name not in found.packed]
        problems += [f"{key} belongs to no weight of this model" for key in found.strays]
        entries = {n: e for n, e in entries.items() if n in found.packed or n not in found.dense}
    else:
        # Another class than the saved one may have layers that the files lack (a pooler): they
        # stay dense, and transformers draws them anew and says so.
        entries = {name: entry for name, entry in entries.items() if name in found.packed}
        if not entries:
            raise CheckpointError(f"the files hold no packed weight of a {type(model).__name__}: "
                                  f"the checkpoint was saved as {model.config.architectures}")
    verify(entries, found.packed, problems)
    return entries
