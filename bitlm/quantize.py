"""`quantize`: a dense checkpoint in, a packed one out; `pack`: the same for a model in memory.

Weights are mapped from the source files and encoded one at a time; finished units (a block, or
what lies outside the blocks) go to a work folder at once, so memory stays small and a killed run
resumes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import __version__, source, verdict
from .calibration.windows import Calibration, read_calibration
from .job import Job, locked
from .memory import return_freed_memory
from .methods.registry import statistics_needed
from .modules import install, packed_weights
from .output import REPORT, check, copy_companions, publish_modes, room, whole
from .packing import pack_weight
from .plan import Plan, Request, make_plan
from .report import Layer, Report, activation_of, mib
from .run import Progress, Run, StrictError
from .scheme import DEFAULT_PRESET, Scheme, embedding_scheme
from .scheme import preset as preset_named


class QuantizeError(ValueError):
    """A request that cannot be carried out: the message names the next step."""


def make_request(preset: str | None = None, scheme: Scheme | None = None, *,
                 calibrated: bool = False, overrides: dict[str, dict[str, Any]] | None = None,
                 skip: tuple[str, ...] = (), embeddings: int | Scheme | None = None) -> Request:
    """Return what is asked of a whole model; raises SchemeError.

    A preset, or a scheme, becomes compensated when there is calibration text.
    """
    if preset is not None and scheme is not None:
        raise QuantizeError("give a preset or a scheme, not both")
    base = scheme if scheme is not None else preset_named(preset or DEFAULT_PRESET)
    if embeddings is not None and not isinstance(embeddings, Scheme):
        embeddings = embedding_scheme(embeddings)
    return Request(base.calibrated() if calibrated else base, dict(overrides or {}), tuple(skip),
                   embeddings)


def plan_for(folder: Path, request: Request) -> Plan:
    """Return the plan of a model folder from its config and shard headers alone."""
    config = source.read_config(folder)
    dtype = source.stored_dtype(source.read_headers(folder))
    return make_plan(source.skeleton(config, dtype), request)


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
    if not source.has_device(device):
        raise QuantizeError(f"no device {device!r} here: leave --device out to encode on the CPU")
    folder, target = source.resolve(model, revision), Path(os.path.realpath(out))
    config, files = source.read_config(folder), source.weight_files(folder)
    texts = [Path(calibrate)] if calibrate is not None and Path(calibrate).exists() else []
    check(target, [folder, *files, *texts], overwrite)
    headers = source.read_headers(folder)
    request = make_request(preset, scheme, calibrated=calibrate is not None, overrides=overrides,
                           skip=skip, embeddings=embeddings)
    plan = make_plan(source.skeleton(config, source.stored_dtype(headers)), request)
    _check_packable(plan, calibrate)
    warnings = [f"{s.name} stays dense: {s.reason}" for s in plan.skipped if s.loud]
    if strict and warnings:
        raise StrictError(f"--strict: {warnings[0]}")
    tokenizer = source.tokenizer(folder)
    calibration = None
    if calibrate is not None:
        calibration = read_calibration(calibrate, tokenizer, config, calibration_tokens, seed)
    with locked(target):
        job = Job(target, _identity(folder, files, request, calibration), resume, overwrite)
        clock.lap("prepare")
        return_freed_memory()
        dense = source.load(folder, config)
        run = Run(dense, plan, job, torch.device(device), progress, strict, warnings)
        run.calibrated(calibration) if calibration else run.data_free()
        clock.lap("encode")
        with whole(target) as part:
            run.install_all()
            _attach(dense, request, model, calibration)
            with room(), source.quiet():
                dense.save_pretrained(part)
            copy_companions(folder, part)
            clock.lap("write")
            report = _report(run, model, out, part, headers, request, calibration, command)
            if measure_verdict:
                report.verdict = _verdict(dense, folder, config, tokenizer, request, calibration,
                                          warnings)
                clock.lap("verdict")
            report.seconds = clock.laps
            data = json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"
            (part / REPORT).write_text(data, "utf-8")
            (part / "README.md").write_text(report.card(), "utf-8")
            publish_modes(part)
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
    _check_packable(plan, None)
    for entry in plan.entries:
        if not entry.target.tied:  # the others get the same tensors when the model is attached
            dense = model.get_parameter(entry.name).detach()
            install(model, entry.name, pack_weight(entry, dense).weight)
    _attach(model, request, getattr(model.config, "_name_or_path", ""), None)
    return model


def _attach(model: nn.Module, request: Request, name: str | os.PathLike,
            calibration: Calibration | None) -> None:
    from .hf import attach
    from .hf.config import BitlmConfig
    attach(model, BitlmConfig(
        request.scheme, overrides=request.overrides, skip=list(request.skip),
        embeddings=request.embeddings, producer=f"bitlm {__version__}", source=Path(name).name,
        calibration=calibration.to_dict() | {"source": Path(calibration.source).name}
        if calibration else None))


def _check_packable(plan: Plan, calibrate: object) -> None:
    """Raise QuantizeError for schemes that need a calibration text, or a training."""
    trained = next((e for e in plan.entries if e.scheme.input is not None), None)
    if trained is not None:
        raise QuantizeError(f"the scheme of {trained.name} has a quantizer of its inputs, whose "
                            "step is learned: `bitlm distill` trains such models (in Python: "
                            "bitlm.train.prepare); without training use activation=\"int8\"")
    needy = next((e for e in plan.entries if statistics_needed(e.scheme) != "none"), None)
    if needy is not None and calibrate is None:
        raise QuantizeError(f"the scheme of {needy.name} needs calibration text: give --calibrate "
                            "FILE (in Python: quantize(..., calibrate=FILE))")


def _identity(folder: Path, files: list[Path], request: Request,
              calibration: Calibration | None) -> dict[str, Any]:
    asked = request_dict(request)
    for name, scheme in (("scheme", request.scheme), ("embeddings", request.embeddings)):
        asked[name] = scheme and asdict(scheme)  # defaults too: a difference is named with both
    return {"version": __version__, "source": source.fingerprint(folder, files),
            **asked, "calibration": calibration.to_dict() if calibration else None}


def _report(run: Run, model: str | os.PathLike, out: str | os.PathLike, part: Path,
            headers: dict, request: Request, calibration: Calibration | None, command: str
            ) -> Report:
    plan, weights = run.plan, packed_weights(run.model)
    layers, packed_bytes = [], 0
    for name, entry in run.entries.items():
        size = weights[name].nbytes()
        packed_bytes += size
        note = run.notes[name]
        layers.append(Layer(name, list(weights[name].shape), entry.scheme.method,
                            8 * size / entry.target.numel, size, note["relative_error"],
                            note["output_error"], note["note"], activation_of(entry)))
    skipped = [{"name": s.name, "numel": s.numel, "reason": s.reason} for s in plan.skipped]
    written = source.nbytes(source.read_headers(part))
    local = Path(model).is_dir()
    return Report(
        model=Path(os.path.realpath(model)).name if local else str(model), hub=not local,
        out=str(out), request=request_dict(request), layers=layers, skipped=skipped,
        packed_bytes=packed_bytes, packed_numel=plan.packed_numel,
        dense_bytes=written - packed_bytes, dense_numel=plan.dense_numel,
        source_bytes=source.nbytes(headers),
        calibration=calibration.to_dict() | {"source": Path(calibration.source).name}
        if calibration else None,
        warnings=run.warnings, command=command or f"bitlm quantize {Path(model).name}",
        producer=f"bitlm {__version__}")


def request_dict(request: Request) -> dict[str, Any]:
    """Return a request as JSON types."""
    return {"scheme": request.scheme.to_dict(), "overrides": request.overrides,
            "skip": list(request.skip),
            "embeddings": request.embeddings.to_dict() if request.embeddings else None}


def _verdict(packed: nn.Module, folder: Path, config: Any, tokenizer: Any, request: Request,
             calibration: Calibration | None, warnings: list[str]) -> verdict.Verdict | None:
    """Measure the verdict; what goes wrong there is a warning, since the model is made."""
    return_freed_memory()
    try:
        texts = verdict.bundled_ids(tokenizer, packed)
        if texts is None:
            return None
        measured = verdict.measure(packed, source.load(folder, config), texts)
    except (verdict.NoVerdict, KeyError, AttributeError, NotImplementedError, RuntimeError,
            ValueError, TypeError, IndexError) as error:
        warnings.append(f"no verdict: {str(error).strip() or type(error).__name__}".splitlines()[0])
        return None
    return _advised(measured, folder, request, calibration)


def _advised(measured: verdict.Verdict, folder: Path, request: Request,
             calibration: Calibration | None) -> verdict.Verdict:
    """Add what would do better, with its size, to a verdict that is not "close"."""
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


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = round(now - self._last, 3)
        self._last = now
