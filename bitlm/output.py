"""The output folder: whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from . import source
from .job import JobError

REPORT = "bitlm_report.json"


def check(out: Path, inputs: list[Path], overwrite: bool) -> None:
    """Raise JobError unless `out` may be written: nothing else is there, and no input."""
    for path in inputs:
        real = path.resolve()
        if real == out or real.is_relative_to(out):
            raise JobError(f"{out} holds {path}, which this run reads: choose another output "
                           "folder")
        if real.is_dir() and out.is_relative_to(real):
            raise JobError(f"{out} lies inside the source model: choose another output folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise JobError(f"{out} is a file: choose another output folder")
    if not overwrite:
        raise JobError(f"{out} exists: choose another output folder or pass --overwrite")
    if any(out.iterdir()) and not (out / REPORT).is_file():
        raise JobError(f"{out} is no folder that bitlm wrote: --overwrite replaces only those, so "
                       "remove it yourself or choose another")


def copy_companions(folder: Path, out: Path) -> None:
    for pattern in source.COMPANIONS:
        for path in folder.glob(pattern):
            target = out / path.relative_to(folder)
            if path.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `out` at the end, or nothing at all."""
    part, old = (out.parent / f".{out.name}.bitlm-{word}" for word in ("part", "old"))
    if old.exists() and not out.exists():  # a run was killed between the two renames
        os.replace(old, out)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if out.exists():
            os.replace(out, old)
        os.replace(part, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def room() -> Iterator[None]:
    """Turn safetensors' own word for a full disk into the usual OSError."""
    try:
        yield
    except SafetensorError as error:
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, "no space left on the disk of the output folder: free some "
                          "and continue with --resume") from None
        raise


def publish_modes(folder: Path) -> None:
    """Give the files the permissions that the umask asks for: safetensors makes them private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)
