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


def copy_companions(folder: Path, out: Path) -> None:
    for pattern in source.COMPANIONS:
        for path in folder.glob(pattern):
            target = out / path.relative_to(folder)
            if path.is_file() and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


@contextmanager
def whole(out: Path, overwrite: bool) -> Iterator[Path]:
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
