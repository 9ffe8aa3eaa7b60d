"""What the commands share: tables, progress bars, JSON files, the version."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..scheme import ACTIVATIONS

MODES = ", ".join(ACTIVATIONS)
ActivationOption = Annotated[str | None, typer.Option(
    help=f"How packed layers round their inputs: {MODES} (default: as the checkpoint says).")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")]
_WIDTH_OF_A_FILE = 160  # a pipe has no width: rich would cut tables at 80 columns


def console(stderr: bool = False) -> Console:
    """Return a console for stdout or stderr that never cuts a table short in a pipe."""
    found = Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not found.is_terminal and "COLUMNS" not in os.environ:
        found = Console(stderr=stderr, highlight=False, width=_WIDTH_OF_A_FILE)
    return found


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> Table:
    """Return a plain table: the first column to the left, the others to the right unless `left`."""
    made = Table(box=None, pad_edge=False, padding=(0, 1), show_header=any(columns))
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index and not left else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def activations_of(model: Any) -> str:
    """Return the modes of a loaded model's packed layers, "" for a dense model."""
    from ..activations import activations
    from ..report import count_activations

    found = activations(model)
    return count_activations(found.values()) if found else ""


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the time left on a terminal's stderr; yield a function of (done, total)."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeftColumn

    screen = console(stderr=True)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                   TimeLeftColumn(), console=screen, transient=True,
                   disable=not screen.is_terminal)
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def check_target(path: Path) -> None:
    """Raise OSError when a file cannot be written, before the work that it should hold."""
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder: name a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder: make it first", str(path.parent))
    if not path.exists() or path.is_file():
        part = _part(path)
        part.touch()
        part.unlink()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file that is there whole or not at all."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once, keeping its mode; what a link points to, not the link."""
    path = path.resolve()
    if path.exists() and not path.is_file():  # a device or a pipe cannot be replaced
        path.write_text(text, "utf-8")
        return
    temporary = _part(path)
    try:
        temporary.write_text(text, "utf-8")
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def version() -> str:
    """Return the version of bitlm."""
    from .. import __version__
    return __version__
