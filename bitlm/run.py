"""One pass over the units of a model: each is encoded, or taken from the work folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calibration.blocks import find_blocks
from .calibration.replay import Replay
from .calibration.statistics import Collector
from .calibration.windows import Calibration, batches
from .job import Job
from .memory import return_freed_memory
from .methods.registry import statistics_needed
from .modules import install
from .output import room
from .packing import pack_weight
from .plan import Entry, Plan
from .weight import PackedWeight


class StrictError(ValueError):
    """What would be a warning without --strict."""


@dataclass(frozen=True)
class Progress:
    """How far a quantization is: weights done of all, and the weight just finished."""

    done: int
    total: int
    name: str
    relative_error: float


@dataclass
class Run:
    """One pass over all units of a model: encode, or take from the work folder."""

    model: nn.Module
    plan: Plan
    job: Job
    device: torch.device
    progress: Callable[[Progress], None] | None
    strict: bool
    warnings: list[str]
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entries = {e.name: e for e in self.plan.entries if not e.target.tied}
        self.units = find_blocks(self.model, self.entries)
        self.number = {name: index for index, name in enumerate(self.units)}

    def data_free(self) -> None:
        """Encode every unit from its weights alone."""
        for unit in self.units:
            self._finish(unit, None)
            self._empty(unit)

    def calibrated(self, calibration: Calibration) -> None:
        """Encode block by block, each on the inputs that the packed blocks before it give."""
        inputs = batches(self.model, calibration.windows)
        blocks = {name: self.model.get_submodule(name) for name in self.units if name}
        with Replay(self.model, blocks, inputs) as replay:
            order = replay.visits()
            last = {name: index for index, name in enumerate(order)}
            for index, unit in enumerate(order):
                if unit in order[:index]:
                    replay.advance(index)
                else:
                    self._finish(unit, self._collect(unit, lambda c, i=index:
                                                     replay.observe(i, c.next_batch)))
                    self._fill(unit)
                    replay.advance(index)
                if last[unit] == index:
                    self._empty(unit)
            if "" in self.units:
                self._finish("", self._collect("", lambda c: replay.observe_rest(
                    len(order), c.next_batch)))
        for unit in self.units:
            if unit and unit not in order:
                self._finish(unit, None)
                self._empty(unit)

    def install_all(self) -> None:
        """Put the packed weights, mapped from the work folder, in the place of the dense ones."""
        for unit, names in self.units.items():
            tensors, _ = self.job.read(self.number[unit])
            for name in names:
                install(self.model, name, _weight(self.entries[name], tensors, self._dtype(name)))

    def _collect(self, unit: str, observe: Callable[[Collector], None]) -> Collector | None:
        targets = [self.entries[name].target for name in self.units[unit]
                   if statistics_needed(self.entries[name].scheme) != "none"]
        if self.job.done(self.number[unit]) or not targets:
            return None
        collector = Collector(self.model, targets)
        with collector.listening():
            observe(collector)
        return collector

    def _finish(self, unit: str, collector: Collector | None) -> None:
        """Encode a unit and store it, unless an earlier run did."""
        number = self.number[unit]
        if not self.job.done(number):
            tensors, notes = {}, {}
            for name in self.units[unit]:
                packed, notes[name] = self._encode(self.entries[name], collector)
                tensors |= {f"{name}.{n}": t.cpu() for n, t in packed.named_tensors()}
                self._tell(name, notes[name])
            with room():
                self.job.write(number, tensors, notes)
        else:
            notes = self.job.read(number)[1]
            for name in notes:
                self._tell(name, notes[name])
        for name, note in notes.items():
            if note.get("note"):
                self._warn(f"{name}: {note['note']}")
        return_freed_memory()

    def _encode(self, entry: Entry, collector: Collector | None
                ) -> tuple[PackedWeight, dict[str, Any]]:
        dense = self.model.get_parameter(entry.name).detach()
        hessians, note = None, ""
        if statistics_needed(entry.scheme) != "none":
            if collector is not None and collector.tokens(entry.name):
                hessians = [h.to(self.device) for h in collector[entry.name]]
            else:
                note = "the calibration text never reached it: rounded without compensation"
                plain = entry.scheme.replace(compensate=False, salient_metric="magnitude")
                entry = Entry(entry.target, plain)
        packed = pack_weight(entry, dense.to(self.device), hessians)
        return packed.weight, {"relative_error": packed.relative_error,
                               "output_error": packed.output_error, "note": note}

    def _warn(self, text: str) -> None:
        if self.strict:
            raise StrictError(f"--strict: {text}")
        self.warnings.append(text)

    def _tell(self, name: str, note: dict[str, Any]) -> None:
        self.notes[name] = note
        if self.progress is not None:
            done = sum(self.entries[n].target.numel for n in self.notes)
            self.progress(Progress(done, self.plan.packed_numel, name, note["relative_error"]))

    def _dtype(self, name: str) -> torch.dtype:
        return self.model.get_parameter(name).dtype

    def _fill(self, unit: str) -> None:
        """Give a unit the weights that its packed form stands for, for the blocks behind it."""
        tensors, _ = self.job.read(self.number[unit])
        for name in self.units[unit]:
            weight = _weight(self.entries[name], tensors, self._dtype(name)).dequantize()
            if self.entries[name].target.transposed:
                weight = weight.transpose(-1, -2).contiguous()
            _set(self.model, name, weight)

    def _empty(self, unit: str) -> None:
        for name in self.units[unit]:
            _set(self.model, name, torch.empty_like(self.model.get_parameter(name), device="meta"))
        return_freed_memory()


def _weight(entry: Entry, tensors: dict[str, Tensor], dtype: torch.dtype) -> PackedWeight:
    form = entry.form
    weight = PackedWeight({n: tensors[f"{entry.name}.{n}"] for n in form.names}, form, dtype)
    weight.activation = entry.scheme.activation
    return weight


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
