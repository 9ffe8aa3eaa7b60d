"""The output folder of a recipe, which one run at a time writes, with one or several processes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..job import JobError, locked
from .recipe import Settings, plain

# Settings that change neither weights nor scores.
FREE = ("out", "log_every", "save_every", "eval_batch")
RESULT, SETTINGS, LOG = "result.json", "settings.json", "log.jsonl"


@contextmanager
def work(out: Path, settings: Settings, names: list[str]) -> Iterator[None]:
    """Hold an output folder; raises JobError where it is another's, or had other settings."""
    identity = json.loads(json.dumps({"recipe": settings.recipe} | {
        name: {key: value for key, value in plain(settings.at(scheme=name)).items()
               if key not in FREE} for name in names or [""]}))
    if not is_main():
        wait()
        yield
        return
    with locked(out):
        if out.exists() and not (out / SETTINGS).is_file() and (
                not out.is_dir() or any(out.iterdir())):
            raise JobError(f"{out} exists, and no recipe made it: choose another out")
        if (out / SETTINGS).is_file() and any(path.name != SETTINGS for path in out.iterdir()):
            before = json.loads((out / SETTINGS).read_text("utf-8"))
            changed = _difference(before, identity)
            if changed:
                teacher = out / "teacher" / "model"
                keep = f" with teacher.model={teacher}" if teacher.is_dir() else ""
                raise JobError(f"{out} was made with other settings, {changed}: use the same to go "
                               f"on, or another out{keep}")
        out.mkdir(parents=True, exist_ok=True)
        write(out / SETTINGS, identity)
        wait()
        yield


def _difference(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """Return the first difference of two trees in words, "" where they are equal."""
    for key in [*now, *(key for key in before if key not in now)]:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found = _difference(old, new, f"{prefix}{key}.")
            if found:
                return found
        elif old != new:
            return f"{prefix}{key} was {old!r} and is {new!r}"
    return ""


def result(folder: Path) -> dict[str, Any] | None:
    """Return the result of a stage, None while it is not done."""
    path = folder / RESULT
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def make(folder: Path) -> None:
    """Make a folder, for all processes."""
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    wait()


def write(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all, in the first process."""
    if is_main():
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
        os.replace(part, path)


def is_main() -> bool:
    """Tell whether this is the process that writes."""
    return _state().is_main_process


def wait() -> None:
    """Wait for all processes."""
    _state().wait_for_everyone()


def on_cpu() -> bool:
    """Tell whether there is nothing but the CPU: several processes need to be told."""
    return not torch.accelerator.is_available()


def _state() -> PartialState:
    return PartialState(cpu=on_cpu())
