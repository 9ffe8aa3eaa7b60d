"""`quantize`: a dense checkpoint in, a packed one out; `pack`: the same for a model in memory.

Weights are mapped from the source files and encoded one at a time; finished units (a block, or what
lies outside the blocks) go to a work folder at once, so memory stays small and a killed run resumes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import __version__, source, verdict
from .calibration.blocks import find_blocks
from .calibration.replay import Replay
from .calibration.statistics import Collector
from .job import Job, JobError
from .memory import return_freed_memory
from .methods.registry import statistics_needed
from .modules import install, is_conv1d
from .packing import pack_weight
from .plan import Entry, Plan, Request, make_plan
from .report import Layer, Report, mib
from .scheme import DEFAULT_PRESET, Scheme, embedding_scheme, preset as preset_named
from .weight import PackedWeight

CALIBRATION_TOKENS = 32768
CALIBRATION_LENGTH = 512
BATCH_TOKENS = 2048
KEPT_BYTES = 1 << 30  # block outputs beyond this live in a mapped temporary file


class QuantizeError(ValueError):
    """A request that cannot be carried out: the message names the next step."""


@dataclass(frozen=True)
class Progress:
    """How far a quantization is: weights done of all, and the weight just finished."""

    done: int
    total: int
    name: str
    relative_error: float


@dataclass(frozen=True)
class Calibration:
    """Token windows [n, length] and where they come from."""

    windows: Tensor
    source: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
        return {"source": self.source, "tokens": self.windows.numel(),
                "length": self.windows.shape[1], "seed": self.seed, "sha256": digest}


def make_request(preset: str | None = None, scheme: Scheme | None = None, *, calibrated: bool = False,
                 overrides: dict[str, dict[str, Any]] | None = None, skip: tuple[str, ...] = (),
                 embeddings: int | Scheme | None = None) -> Request:
    """Return what is asked of a whole model; raises SchemeError.

    A preset, or a scheme, becomes compensated when there is calibration text.
    """
    if preset is not None and scheme is not None:
        raise QuantizeError("give a preset or a scheme, not both")
    base = scheme if scheme is not None else preset_named(preset or DEFAULT_PRESET)
    if isinstance(embeddings, int):
        embeddings = embedding_scheme(embeddings)
    return Request(base.calibrated() if calibrated else base, dict(overrides or {}), tuple(skip),
                   embeddings)


def plan_for(folder: Path, request: Request) -> Plan:
    """Return the plan of a model folder from its config and shard headers alone."""
    config = source.read_config(folder)
    return make_plan(source.skeleton(config, source.stored_dtype(source.read_headers(folder))), request)


def peak_memory(plan: Plan, calibration_tokens: int = 0) -> int:
    """Return about how many bytes of its own a run needs at most, the libraries included.

    Weights are mapped, not loaded: data-free encoding holds float32 copies of a part of one weight.
    Calibration holds the Hessians of one block, the dense copy of one block, the factor of the
    largest Hessian and the outputs of one block.
    """
    libraries = 300 << 20
    if not calibration_tokens:
        return libraries + (64 << 20)
    blocks: dict[str, list[Entry]] = {}
    for entry in plan.entries:
        head = re.match(r".*?\.\d+\.", entry.name)
        blocks.setdefault(head[0] if head else "", []).append(entry)
    widest = max(entry.target.columns for entry in plan.entries)
    largest = max(entry.target.rows * entry.target.columns for entry in plan.entries)
    block = max(sum(4 * e.target.numel for e in entries) for name, entries in blocks.items() if name
                or len(blocks) == 1)
    hessians = max(sum(4 * k * k * max(experts, 1) for k, experts in
                       {(e.target.columns, e.target.experts) for e in entries} for _ in range(2))
                   for entries in blocks.values())
    outputs = min(4 * calibration_tokens * widest, KEPT_BYTES)
    return libraries + block + hessians + 12 * widest * widest + 16 * largest + outputs


def quantize(model: str | os.PathLike, preset: str | None = None, *, out: str | os.PathLike,
             scheme: Scheme | None = None, overwrite: bool = False,
             calibrate: str | os.PathLike | None = None, calibration_tokens: int | None = None,
             overrides: dict[str, dict[str, Any]] | None = None, skip: tuple[str, ...] = (),
             embeddings: int | Scheme | None = None, revision: str | None = None, seed: int = 0,
             strict: bool = False, resume: bool = False, device: str = "cpu",
             measure_verdict: bool = True, progress: Callable[[Progress], None] | None = None,
             command: str = "") -> Report:
    """Quantize a checkpoint into the folder `out` and return the report.

    model: folder or hub id. preset or scheme: what each linear layer becomes. calibrate: text file,
    jsonl or hub id whose tokens steer the rounding (column-wise compensation). overrides, skip,
    embeddings: see plan.Request; embeddings may be a number of bits. device: where weights are
    encoded. strict: fail where a weight that should be packed stays dense or goes uncompensated.
    resume: go on with an interrupted run of the same request.

    Raises SourceError, SchemeError, TextError, JobError, QuantizeError, CheckpointError and OSError
    (no space left); `out` appears only when it is whole, and the source is never written to.
    """
    clock = _Clock()
    folder, out = source.resolve(model, revision), Path(out)
    _check_out(out, folder, overwrite)
    config = source.read_config(folder)
    files = source.weight_files(folder)
    headers = source.read_headers(folder)
    request = make_request(preset, scheme, calibrated=calibrate is not None, overrides=overrides,
                           skip=skip, embeddings=embeddings)
    plan = make_plan(source.skeleton(config, source.stored_dtype(headers)), request)
    _check_statistics(plan, calibrate)
    warnings = [f"{s.name} stays dense: {s.reason}" for s in plan.skipped if s.loud]
    if strict and warnings:
        raise QuantizeError(f"--strict: {warnings[0]}")
    tokenizer = source_tokenizer(folder)
    calibration = None
    if calibrate is not None:
        calibration = read_calibration(calibrate, tokenizer, config, calibration_tokens, seed)
    job = Job(out, _identity(folder, files, request, calibration), resume, overwrite)
    clock.lap("prepare")

    return_freed_memory()
    dense = source.load(folder, config)
    run = _Run(dense, plan, job, torch.device(device), progress, strict)
    run.calibrated(calibration) if calibration else run.data_free()
    warnings += run.warnings
    clock.lap("encode")
    with _whole(out, overwrite) as part:
        run.install_all()
        _attach(dense, request, model, calibration)
        with _space(), source.quiet():
            dense.save_pretrained(part)
        _copy_companions(folder, part)
        clock.lap("write")
        report = _report(run, str(model), out, request, calibration, warnings, command)
        if measure_verdict:
            ids = verdict.bundled_ids(tokenizer, dense)
            if ids is not None:
                measured = verdict.measure(dense, source.load(folder, config), ids)
                report.verdict = _advised(measured, folder, request, calibration)
            clock.lap("verdict")
        report.seconds = clock.laps
        _write_text(part / "bitlm_report.json", _json(report.to_dict()))
        _write_text(part / "README.md", report.card())
        _publish_modes(part)
    job.discard()
    return report


def pack(model: nn.Module, scheme: Scheme | str | None = None, *, skip: tuple[str, ...] = (),
         overrides: dict[str, dict[str, Any]] | None = None,
         embeddings: int | Scheme | None = None) -> nn.Module:
    """Pack a transformers model in memory, in place, without calibration; returns the model.

    The model can then run, generate and be saved with save_pretrained. Raises SchemeError, and
    QuantizeError for a scheme that needs calibration.
    """
    named = isinstance(scheme, str) or scheme is None
    request = make_request(scheme if named else None, None if named else scheme, skip=skip,
                           overrides=overrides, embeddings=embeddings)
    plan = make_plan(model, request)
    _check_statistics(plan, None)
    for entry in plan.entries:
        if not entry.target.tied:  # the others get the same tensors when the model is attached
            dense, transposed = _dense(model, entry)
            install(model, entry.name, pack_weight(entry, dense, None, transposed).weight)
    _attach(model, request, getattr(model.config, "_name_or_path", ""), None)
    return model


def read_calibration(text: str | os.PathLike, tokenizer, config, tokens: int | None,
                     seed: int) -> Calibration:
    """Return windows of calibration tokens.

    tokens: how many, rounded down to whole windows; None takes up to 32,768 of what there is.
    Raises TextError for text that is missing or too short, QuantizeError without a tokenizer.
    """
    from .calibration.text import TextError, check_ids, read_texts, token_windows
    if tokenizer is None:
        raise QuantizeError("the model folder has no tokenizer, which --calibrate needs: add its "
                            "tokenizer files or quantize without calibration text")
    inner = config.get_text_config()
    length = min(CALIBRATION_LENGTH, getattr(inner, "max_position_embeddings", None) or
                 CALIBRATION_LENGTH)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        length -= 2  # positions start behind the padding index
    count = (tokens or CALIBRATION_TOKENS) // length
    if count < 1:
        raise QuantizeError(f"--calibration-tokens {tokens} is less than one window of {length}")
    texts = read_texts(text)
    if tokens is None:
        try:
            windows = token_windows(tokenizer, texts, length, count, seed)
        except TextError:
            windows = token_windows(tokenizer, texts, length)
    else:
        windows = token_windows(tokenizer, texts, length, count, seed)
    check_ids(windows, inner.vocab_size)
    return Calibration(windows, str(text), seed)


def source_tokenizer(folder: Path):
    """Return the tokenizer of a model folder, None if it has none."""
    if not any(next(folder.glob(p), None) for p in ("tokenizer*", "vocab*", "spiece.model")):
        return None
    from transformers import AutoTokenizer
    with source.quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise source.SourceError(f"the tokenizer in {folder} cannot be read: "
                                     f"{str(error).strip().splitlines()[0]}") from None


@dataclass
class _Run:
    """One pass over all units of a model: encode, or take from the work folder."""

    model: nn.Module
    plan: Plan
    job: Job
    device: torch.device
    progress: Callable[[Progress], None] | None
    strict: bool
    warnings: list[str] = field(default_factory=list)
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
        batches = _batches(self.model, calibration.windows)
        blocks = {name: self.model.get_submodule(name) for name in self.units if name}
        with Replay(self.model, blocks, batches, KEPT_BYTES) as replay:
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
            with _space():
                self.job.write(number, tensors, notes)
        else:
            notes = self.job.read(number)[1]
            for name in notes:
                self._tell(name, notes[name])
        for name, note in notes.items():
            if note.get("note"):
                self._warn(f"{name}: {note['note']}")
        return_freed_memory()

    def _encode(self, entry: Entry, collector: Collector | None) -> tuple[PackedWeight, dict[str, Any]]:
        dense, transposed = _dense(self.model, entry)
        hessians, note = None, ""
        if statistics_needed(entry.scheme) != "none":
            if collector is not None and collector.tokens(entry.name):
                hessians = [h.to(self.device) for h in collector[entry.name]]
            else:
                note = "the calibration text never reached it: rounded without compensation"
                plain = entry.scheme.replace(compensate=False, salient_metric="magnitude")
                entry = Entry(entry.target, plain)
        packed = pack_weight(entry, dense.to(self.device), hessians, transposed)
        return packed.weight, {"relative_error": packed.relative_error,
                               "output_error": packed.output_error, "note": note}

    def _warn(self, text: str) -> None:
        if self.strict:
            raise QuantizeError(f"--strict: {text}")
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
            _, transposed = _dense(self.model, self.entries[name])
            if transposed:
                weight = weight.transpose(-1, -2).contiguous()
            _set(self.model, name, weight)

    def _empty(self, unit: str) -> None:
        for name in self.units[unit]:
            _set(self.model, name, torch.empty_like(self.model.get_parameter(name), device="meta"))
        return_freed_memory()


def _weight(entry: Entry, tensors: dict[str, Tensor], dtype: torch.dtype) -> PackedWeight:
    form = entry.form
    return PackedWeight({n: tensors[f"{entry.name}.{n}"] for n in form.names}, form, dtype)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _dense(model: nn.Module, entry: Entry) -> tuple[Tensor, bool]:
    """Return a dense weight and whether it is stored [in, out]."""
    path, _, leaf = entry.name.rpartition(".")
    module = model.get_submodule(path)
    transposed = is_conv1d(module) or bool(entry.target.experts and module.is_transposed)
    return getattr(module, leaf).detach(), transposed


def _attach(model: nn.Module, request: Request, name: str | os.PathLike,
            calibration: Calibration | None) -> None:
    from .hf import attach
    from .hf.config import BitlmConfig
    attach(model, BitlmConfig(
        request.scheme, overrides=request.overrides, skip=list(request.skip),
        embeddings=request.embeddings, producer=f"bitlm {__version__}", source=Path(name).name,
        calibration=calibration.to_dict() | {"source": Path(calibration.source).name}
        if calibration else None))


def _batches(model: nn.Module, windows: Tensor) -> list[dict[str, Any]]:
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise QuantizeError(f"{type(model).__name__} does not read text: quantize it without "
                            "--calibrate")
    rows = max(BATCH_TOKENS // windows.shape[1], 1)
    batches = []
    for ids in windows.split(rows):
        batch: dict[str, Any] = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = ids
        if hasattr(model.config.get_text_config(), "use_cache"):
            batch["use_cache"] = False
        batches.append(batch)
    return batches


def _check_statistics(plan: Plan, calibrate: object) -> None:
    needy = next((e for e in plan.entries if statistics_needed(e.scheme) != "none"), None)
    if needy is not None and calibrate is None:
        raise QuantizeError(f"the scheme of {needy.name} needs calibration text: give --calibrate "
                            "FILE (in Python: quantize(..., calibrate=FILE))")


def _check_out(out: Path, folder: Path, overwrite: bool) -> None:
    if out.resolve() == folder.resolve() or folder.resolve().is_relative_to(out.resolve()):
        raise JobError(f"{out} holds the source model: choose another output folder")
    if out.exists() and not out.is_dir():
        raise JobError(f"{out} is a file: choose another output folder")
    if out.exists() and not overwrite:
        raise JobError(f"{out} exists: choose another output folder or pass --overwrite")
    out.parent.mkdir(parents=True, exist_ok=True)


def _identity(folder: Path, files: list[Path], request: Request,
              calibration: Calibration | None) -> dict[str, Any]:
    return {"version": __version__, "source": source.fingerprint(folder, files),
            "scheme": request.scheme.to_dict(), "overrides": request.overrides,
            "skip": list(request.skip),
            "embeddings": request.embeddings.to_dict() if request.embeddings else None,
            "calibration": calibration.to_dict() if calibration else None}


def _report(run: _Run, model: str, out: Path, request: Request, calibration: Calibration | None,
            warnings: list[str], command: str) -> Report:
    from .modules import packed_weights
    plan, weights = run.plan, packed_weights(run.model)
    layers, seen = [], 0
    for name, entry in run.entries.items():
        size = weights[name].nbytes()
        seen += size
        note = run.notes[name]
        layers.append(Layer(name, list(weights[name].shape), entry.scheme.method,
                            8 * size / entry.target.numel, size, note["relative_error"],
                            note["output_error"], note["note"]))
    skipped = [{"name": s.name, "numel": s.numel, "reason": s.reason} for s in plan.skipped]
    asked = {"scheme": request.scheme.to_dict(), "overrides": request.overrides,
             "skip": list(request.skip),
             "embeddings": request.embeddings.to_dict() if request.embeddings else None}
    return Report(model, str(out), asked, layers, skipped, seen, plan.packed_numel, plan.dense_bytes,
                  plan.dense_numel, plan.source_bytes,
                  calibration.to_dict() if calibration else None, warnings=warnings,
                  command=command or f"bitlm quantize {Path(model).name}",
                  producer=f"bitlm {__version__}")


def _advised(measured: verdict.Verdict, folder: Path, request: Request,
             calibration: Calibration | None) -> verdict.Verdict:
    """Add what would do better, with its size, to a verdict that is not "close"."""
    from dataclasses import replace
    if measured.word == "close":
        return measured
    better = preset_named("chat")
    if request.scheme.planes < better.planes or calibration is None:
        size = plan_for(folder, Request(better, skip=request.skip,
                                        embeddings=request.embeddings)).total_bytes
        advice = f"`--preset chat --calibrate FILE` ({mib(size)})"
    else:
        advice = "more planes (`--planes 4`), or retraining by distillation"
    return replace(measured, advice=advice)


def _copy_companions(folder: Path, out: Path) -> None:
    for pattern in source.COMPANIONS:
        for path in folder.glob(pattern):
            target = out / path.relative_to(folder)
            if path.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


@contextmanager
def _whole(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` at the end, or nothing at all."""
    part = out.parent / f".{out.name}.bitlm-part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if out.exists():
            old = out.parent / f".{out.name}.bitlm-old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out, old)
            os.replace(part, out)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _space() -> Iterator[None]:
    """Turn safetensors' own word for a full disk into the usual OSError."""
    try:
        yield
    except SafetensorError as error:
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "no space left on the disk of the output folder: free some "
                          "and continue with --resume") from None
        raise


def _publish_modes(folder: Path) -> None:
    """Give the files the permissions that the umask asks for: safetensors makes them private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, "utf-8")


def _json(data: Any) -> str:
    import json
    return json.dumps(data, indent=2) + "\n"


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
