"""The work folder of a running quantization: finished units, and what a resume must agree with."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows has no flock: two runs into one folder are then not kept apart
    fcntl = None

JOB = "job.json"


class JobError(ValueError):
    """A work folder or output folder that stands in the way: the message names the next step."""


class Job:
    """Finished units of a quantization, one file each, beside the output folder.

    out: the output folder. identity: JSON values that must be the same for a resume, by field.
    Raises JobError when `resume` finds other values, or when an interrupted run is in the way.
    """

    def __init__(self, out: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> None:
        self.folder = out.parent / f".{out.name}.bitlm-work"
        self.identity = json.loads(json.dumps(identity))
        found = self._read()
        if found is not None and resume:
            _compare(found, self.identity)
            return
        unfinished = self.folder.exists() and any(self.folder.glob("unit-*"))
        if unfinished and not resume and not overwrite:
            raise JobError(f"an interrupted run for {out} is in {self.folder}: continue it with "
                           "--resume or start again with --overwrite")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        _write_json(self.folder / JOB, self.identity)

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / JOB).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def path(self, unit: int) -> Path:
        return self.folder / f"unit-{unit:04d}.safetensors"

    def done(self, unit: int) -> bool:
        """Tell whether a unit was finished; a file that a crash left damaged does not count."""
        try:
            with safe_open(self.path(unit), framework="pt") as file:
                return "notes" in file.metadata()
        except (OSError, SafetensorError, TypeError):
            return False

    def write(self, unit: int, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Store a finished unit; the file appears only when it is whole."""
        temporary = self.path(unit).with_suffix(".part")
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary,
                  metadata={"notes": json.dumps(notes)})
        os.replace(temporary, self.path(unit))

    def read(self, unit: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a finished unit's tensors, mapped from its file, and its notes."""
        with safe_open(self.path(unit), framework="pt") as file:
            return ({name: file.get_tensor(name) for name in file.keys()},
                    json.loads(file.metadata()["notes"]))

    def discard(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the output folder's lock; raises JobError while another run holds it."""
    path = out.parent / f".{out.name}.bitlm-lock"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(f"another bitlm run is writing {out}: wait for it, or choose another "
                           "output folder") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _compare(found: dict[str, Any], wanted: dict[str, Any], path: str = "") -> None:
    for key in {**found, **wanted}:
        name = f"{path}{key}"
        old, new = found.get(key), wanted.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            _compare(old, new, f"{name}.")
        elif old != new:
            raise JobError(f"cannot resume: {name} was {_shown(old)} in the interrupted run and is "
                           f"{_shown(new)} now: use the same, or start again with --overwrite")


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(data, indent=2) + "\n", "utf-8")
    os.replace(temporary, path)
