"""`bitlm quantize MODEL`."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..scheme import DEFAULT_PRESET, PRESETS, Scheme, SchemeError, embedding_scheme, grid
from ..scheme import preset as preset_named
from .errors import UsageError
from .output import MODES, check_target

PRESET_HELP = f"One of {', '.join(PRESETS)} (default {DEFAULT_PRESET})."
TOML_KEYS = ("scheme", "preset", "overrides", "skip", "embeddings")


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the dense model.")],
    preset: Annotated[str | None, typer.Option(help=PRESET_HELP)] = None,
    method: Annotated[str | None, typer.Option(help="binary, ternary, salient or grid.")] = None,
    bits: Annotated[int | None, typer.Option(help="Uniform grid of 2 to 8 bits.")] = None,
    group_size: Annotated[str | None, typer.Option(
        help='Columns that share a scale, or "row", or "tensor".')] = None,
    planes: Annotated[int | None, typer.Option(help="Planes of codes, 1 to 8.")] = None,
    salient: Annotated[float | None, typer.Option(
        help="Fraction of weights kept at 8 bits.")] = None,
    activation: Annotated[str | None, typer.Option(
        help=f"How packed layers, the head too, round their inputs: {MODES} (default float). "
             "Can be changed at load.")] = None,
    embeddings: Annotated[int | None, typer.Option(
        help="Pack token embeddings and output head too, at this many bits.")] = None,
    out: Annotated[Path | None, typer.Option(
        help="Output folder (default: the model's name and the preset's, here).")] = None,
    overwrite: Annotated[bool, typer.Option(
        "--overwrite", help="Replace an output folder that bitlm wrote.")] = False,
    calibrate: Annotated[str | None, typer.Option(
        help="Text file, jsonl or hub id: compensate rounding errors on it.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(
        min=1, help="Tokens of calibration text (default: up to 32768).")] = None,
    skip: Annotated[list[str] | None, typer.Option(
        help="Regular expression of weights that stay dense; repeatable.")] = None,
    override: Annotated[list[str] | None, typer.Option(
        help="RE=KEY:VALUE,...: other scheme fields for some weights; repeatable.")] = None,
    config: Annotated[Path | None, typer.Option(
        help="TOML file: preset, [scheme], [overrides.\"RE\"], skip, embeddings.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub id.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of calibration windows.")] = 0,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", help="Show the plan; write nothing.")] = False,
    strict: Annotated[bool, typer.Option(
        "--strict", help="Fail where a weight that should be packed cannot be.")] = False,
    resume: Annotated[bool, typer.Option(
        "--resume", help="Go on with an interrupted run.")] = False,
    device: Annotated[str, typer.Option(help="Where weights are encoded: cpu, cuda.")] = "cpu",
    json_file: Annotated[Path | None, typer.Option(
        "--json", help="Write the report (or the plan) here too.")] = None,
) -> None:
    """Turn a dense checkpoint into a packed one."""
    if calibration_tokens is not None and calibrate is None:
        raise UsageError("--calibration-tokens needs --calibrate TEXT")
    if json_file is not None:
        check_target(json_file)
    asked = _request(preset, method, bits, group_size, planes, salient, embeddings, skip, override,
                     config, activation)
    if dry_run:
        _show_plan(model, asked, calibrate is not None, calibration_tokens, revision, json_file)
        return
    name = asked.pop("name")
    folder = Path(model)
    target = out or Path(f"{folder.resolve().name if folder.is_dir() else folder.name}-{name}")
    _run(model, asked, target, json_file, dict(
        overwrite=overwrite, calibrate=calibrate, calibration_tokens=calibration_tokens,
        revision=revision, seed=seed, strict=strict, resume=resume, device=device))


def _run(model: str, asked: dict[str, Any], out: Path, json_file: Path | None,
         options: dict[str, Any]) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ..quantize import quantize as run
    from .output import console, table, write_json
    screen, errors = console(), console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(),
               TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn(),
               TextColumn("relative error {task.fields[error]}"))
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bars:
        bar = bars.add_task("reading", total=None, error="-")

        def show(now) -> None:
            bars.update(bar, description=_short(now.name), total=now.total, completed=now.done,
                        error=f"{now.relative_error:.3f}")

        report = run(model, out=out, progress=show, command=_command(), **asked, **options)
    screen.print(f"{model} -> {out}")
    screen.print(table(("", ""), report.summary(), left=True))
    for warning in report.warnings:
        errors.print(f"[bold red]warning:[/] {warning}")
    if json_file:
        write_json(json_file, report.to_dict())


def _request(preset: str | None, method: str | None, bits: int | None, group_size: str | None,
             planes: int | None, salient: float | None, embeddings: int | None,
             skip: list[str] | None, override: list[str] | None, config: Path | None,
             activation: str | None = None) -> dict[str, Any]:
    """Return keyword arguments of quantize(), and `name`, a word for the output folder."""
    asked = _toml(config) if config else {}
    if preset is not None:  # a flag beats the file
        asked["preset"] = preset
        asked.pop("scheme", None)
    changes = {"method": method, "planes": planes, "salient": salient,
               "group_size": _group_size(group_size), "activation": activation}
    changes = {key: value for key, value in changes.items() if value is not None}
    if bits is not None:
        if method or planes or salient is not None or preset:
            raise SchemeError("--bits makes a uniform grid: it does not go with --preset, "
                              "--method, --planes or --salient")
        base = grid(bits)
    else:
        base = asked.get("scheme") or preset_named(asked.get("preset") or DEFAULT_PRESET)
    if salient is not None and method is None and base.method != "salient":
        changes["method"] = "salient"
    if method in PRESETS and preset is None and "scheme" not in asked and bits is None:
        base = preset_named(method)
    if method == "grid" and base.method != "grid":
        base = grid(planes or 4)
    scheme = base.replace(**changes)
    overrides = dict(asked.get("overrides", {})) | _overrides(override or [])
    packed = embeddings if embeddings is not None else asked.get("embeddings")
    if packed is not None and activation is not None:
        packed = packed if isinstance(packed, Scheme) else embedding_scheme(packed)
        packed = packed.replace(activation=activation)
    return {"scheme": scheme, "overrides": overrides,
            "skip": (*asked.get("skip", ()), *(skip or ())), "embeddings": packed,
            "name": _name(scheme, asked.get("preset"))}


def _name(scheme: Scheme, preset: str | None) -> str:
    scheme = scheme.replace(activation="float")
    if preset in PRESETS and scheme == PRESETS[preset]:
        return preset
    found = next((name for name, value in PRESETS.items() if value == scheme), None)
    return found or f"{scheme.method}{scheme.planes if scheme.planes > 1 else ''}"


def _group_size(text: str | None) -> int | str | None:
    return int(text) if text is not None and re.fullmatch(r"-?\d+", text) else text


def _toml(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise SchemeError(f"{path} is no file: --config takes a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SchemeError(f"{path} is no TOML file: {error}") from None
    for key in data:
        if key not in TOML_KEYS:
            raise SchemeError(f"{path} has the unknown key {key!r}: the keys are "
                              f"{', '.join(TOML_KEYS)}")
    kinds = {"scheme": dict, "preset": str, "overrides": dict, "skip": list}
    for key, kind in kinds.items():
        if not isinstance(data.get(key, kind()), kind):
            raise SchemeError(f"{path}: {key} is {data[key]!r}, it should be a "
                              f"{'table' if kind is dict else kind.__name__}")
    for pattern, changes in data.get("overrides", {}).items():
        if not isinstance(changes, dict):
            raise SchemeError(f"{path}: the override {pattern!r} should be a table of fields")
        Scheme().replace(**changes)
    if not all(isinstance(pattern, str) for pattern in data.get("skip", [])):
        raise SchemeError(f"{path}: skip should be a list of regular expressions")
    if "scheme" in data and "preset" in data:
        raise SchemeError(f"{path} has a preset and a scheme: give one")
    if "scheme" in data:
        data["scheme"] = Scheme.from_dict(data["scheme"])
    if isinstance(data.get("embeddings"), dict):
        data["embeddings"] = Scheme.from_dict(data["embeddings"])
    return data


def _overrides(texts: list[str]) -> dict[str, dict[str, Any]]:
    """Parse RE=KEY:VALUE,KEY:VALUE; the last "=" before a key ends the expression."""
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Scheme)}
    overrides = {}
    for text in texts:
        match = re.fullmatch(r"(.+)=(\w+:[^=]*)", text)
        if not match:
            raise SchemeError(f"--override {text!r} is not of the form RE=KEY:VALUE,KEY:VALUE")
        changes = {}
        for pair in match[2].split(","):
            key, _, value = pair.partition(":")
            if key not in kinds:
                raise SchemeError(f"--override names the unknown key {key!r}: the keys are "
                                  f"{', '.join(kinds)}")
            changes[key] = _value(key, value, kinds[key])
        overrides[match[1]] = changes
    return overrides


def _value(key: str, text: str, kind: type) -> Any:
    try:
        if key == "group_size":
            return _group_size(text)
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        word = {int: "whole number", float: "number", bool: "true or false"}.get(kind, "text")
        raise SchemeError(f"--override {key}:{text}: {text!r} is no {word}") from None


def _show_plan(model: str, asked: dict[str, Any], calibrated: bool, tokens: int | None,
               revision: str | None, json_file: Path | None) -> None:
    from .. import source
    from ..calibration.windows import TOKENS
    from ..memory import peak_memory
    from ..quantize import make_request, plan_for
    from ..report import mib, plan_rows
    from .output import console, table, write_json
    asked.pop("name")
    request = make_request(calibrated=calibrated, **asked)
    plan = plan_for(source.resolve(model, revision), request)
    memory = peak_memory(plan, (tokens or TOKENS) if calibrated else 0)
    screen = console()
    screen.print(f"Plan for {model}\n")
    screen.print(table(("modules", "weights", "size", "scheme"), [
        (kind, f"{numel:,}", mib(size), scheme) for kind, scheme, numel, size in plan_rows(plan)]))
    if plan.skipped:
        screen.print("", table(("stays dense", "weights", "why"), [
            (each.name, f"{each.numel:,}", each.reason) for each in plan.skipped]))
    screen.print("", table(("", ""), [
        ("bits per weight, packed layers", f"{plan.packed_bits:.3f}"),
        ("bits per weight, whole file", f"{plan.file_bits:.3f}"),
        ("size", f"{mib(plan.total_bytes)} (dense: {mib(plan.source_bytes)})"),
        ("peak memory, about", mib(memory))], left=True))
    for each in plan.skipped:
        if each.loud:
            console(stderr=True).print(f"[bold red]warning:[/] {each.name}: {each.reason}")
    if json_file:
        write_json(json_file, {
            "entries": [{"name": e.name, "scheme": e.scheme.to_dict(), "bytes": e.nbytes()}
                        for e in plan.entries],
            "skipped": [dataclasses.asdict(s) for s in plan.skipped],
            "bits_packed": plan.packed_bits, "bits_file": plan.file_bits,
            "total_bytes": plan.total_bytes, "source_bytes": plan.source_bytes,
            "peak_memory": memory})


def _short(name: str) -> str:
    return name.removesuffix(".weight")[-40:].rjust(40)


def _command() -> str:
    return shlex.join(["bitlm", *sys.argv[1:]])
