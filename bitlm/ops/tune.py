"""Chooses between kernels that are close, by a short measurement whose result is kept on disk.

For 1-bit codes an instruction set may have two products, look-ups and digit products. Both are
exact, so the choice changes the speed, not the numbers that a mode promises. Which is faster
depends on the processor's ports and caches, on the activation mode and on the number of tokens.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import struct
import tempfile
import threading
import time
from ctypes import CDLL
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from . import library as native
from .form import Form
from .prepare import prepare
from .structs import ACTIVATIONS, TYPES

MODES = ACTIVATIONS[:3]
TOKENS = (1, 4, 8, 32)  # one of each class that the library tells apart
PRODUCTS = "look-ups", "digit products"
_ROWS, _COLUMNS, _GROUP = 1024, 2048, 128
# One token reads weights from memory, so its measurement goes over more of them than caches hold.
_COLD_BYTES = 48 << 20
_ROUNDS = 3
_VERSION = 1  # of the file; raise it when kernels change
_lock = threading.Lock()


def ensure(instruction_set: str) -> None:
    """Make the choices for an instruction set, once in a process; reads or writes the file."""
    with _lock:  # a measurement changes the choices of all threads
        _choices(instruction_set)


def choices(instruction_set: str) -> list[dict[str, str]]:
    """Return what was chosen for which work, and why: keys work, choice, why."""
    library = native.native()
    ensure(instruction_set)
    measured = _choices(instruction_set)
    rows = []
    for number, mode in enumerate(MODES):
        for tokens in TOKENS:
            choice = library.bitlm_cpu_prefer(number, tokens, -1)
            found = measured.get(f"{mode} {tokens}")
            why = (f"the only one of {instruction_set}" if choice > 1 else
                   f"measured: {found[0]:.0f} against {found[1]:.0f} us" if found else
                   "default, not measured (BITLM_TUNE=0)")
            rows.append({"work": f"1-bit, {mode}, {tokens} token{'s' * (tokens > 1)}",
                         "choice": PRODUCTS[choice % 2], "why": why})
    return rows


@cache
def _choices(instruction_set: str) -> dict[str, list[float]]:
    """Return microseconds of both products by "mode tokens", {} when there is nothing to choose."""
    library = native.native()
    if library.bitlm_cpu_prefer(0, 1, -1) > 1 or os.environ.get("BITLM_TUNE") == "0":
        return {}
    path, key = _path(), _key(instruction_set)
    known = _read(path)
    if key not in known:
        known[key] = _measure(library)
        _write(path, known)
    for number, mode in enumerate(MODES):
        for tokens in TOKENS:
            look_ups, digits = known[key][f"{mode} {tokens}"]
            library.bitlm_cpu_prefer(number, tokens, int(digits < look_ups))
    return known[key]


def _measure(library: CDLL) -> dict[str, list[float]]:
    rounds = {}
    form = Form(_ROWS, _COLUMNS, ("plane0.signs", "plane0.scales"), _GROUP)
    pattern = torch.arange(_ROWS * _COLUMNS // 8, dtype=torch.int64).mul_(2654435761)
    signs = (pattern >> 16).to(torch.uint8).reshape(_ROWS, _COLUMNS // 8)
    blob, _ = prepare(form, [signs, torch.ones(_ROWS, form.groups, dtype=torch.float16)],
                      library.bitlm_cpu_order())
    copies = [blob, *(blob.clone() for _ in range(_COLD_BYTES // blob.nbytes))]
    for number, mode in enumerate(MODES):
        for tokens in TOKENS:
            x = torch.linspace(-1, 1, tokens * _COLUMNS).reshape(tokens, _COLUMNS)
            weights = copies if tokens == 1 else copies[:4]
            calls = _calls(x, weights, number)
            times: list[list[float]] = [[], []]
            for _ in range(_ROUNDS):
                for digits in (0, 1):
                    library.bitlm_cpu_prefer(number, tokens, digits)
                    start = time.perf_counter()
                    for call in calls:
                        library.bitlm_cpu_linear(call)
                    times[digits].append((time.perf_counter() - start) / len(calls) * 1e6)
            rounds[f"{mode} {tokens}"] = [round(statistics.median(t), 2) for t in times]
    return rounds


def _calls(x: Tensor, weights: list[Tensor], activation: int) -> list[bytes]:
    y = torch.empty(x.shape[0], _ROWS)
    _calls.keep = y  # the structs only have its address
    kind = TYPES[x.dtype]
    return [struct.pack("=6Qq6i", w.data_ptr(), x.data_ptr(), 0, y.data_ptr(), 0, 0, x.shape[0],
                        kind, 0, kind, activation, 1, 0) for w in weights]


def _path() -> Path:
    base = os.environ.get("BITLM_CACHE") or os.environ.get("XDG_CACHE_HOME")
    # Unlike Path.home(), this has an answer where the user has no home.
    return Path(base or os.path.expanduser("~/.cache")) / "bitlm" / "kernels.json"


def _key(instruction_set: str) -> str:
    """Return what the measurement depends on: the processor and the kernels."""
    names = {}
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            names.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    model = [names.get(n, "") for n in ("model name", "cpu family", "model", "stepping")]
    processor = " ".join(filter(None, model)) or platform.processor() or platform.machine()
    return f"{processor}, {instruction_set}, {_VERSION}"


def _read(path: Path) -> dict[str, dict[str, list[float]]]:
    try:
        known = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: entry for key, entry in known.items() if _is_entry(entry)} \
        if isinstance(known, dict) else {}


def _is_entry(entry: object) -> bool:
    """Tell whether a value of the file is what `_measure` returns."""
    wanted = {f"{mode} {tokens}" for mode in MODES for tokens in TOKENS}
    return isinstance(entry, dict) and set(entry) == wanted and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(t) in (int, float) for t in pair)
        for pair in entry.values())


def _write(path: Path, known: dict[str, dict[str, list[float]]]) -> None:
    """Write the file whole or not at all; without a place for it the next process measures anew."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass
