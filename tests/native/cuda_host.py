"""The CUDA library on the host: the same sources over cuda_emulation.h, and its binding."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import which

from torch import Tensor

from bitlm.ops import cuda, cuda_launch, cuda_table, library

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "bitlm" / "native"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror",
         "-Wno-unknown-pragmas", f"-I{SOURCES}", f"-I{Path(__file__).parent}")


def compiler() -> str | None:
    """Return a g++, the only compiler that the emulation is written for."""
    return which("g++")


def build(folder: Path) -> library.Loaded:
    """Compile every .cu file with g++ into one library in `folder`, and load it."""
    def compiled(source: Path) -> str:
        out = str(folder / f"{source.stem}.o")
        _run([compiler(), *FLAGS, "-x", "c++", "-c", str(source), "-o", out])
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted(SOURCES.glob("cuda_*.cu"))))
    path = folder / "libbitlm_cuda_emulated.so"
    _run([compiler(), "-shared", "-o", str(path), *objects])
    return library.load_file(path, library.CUDA)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def native(x: Tensor, tensors: list[Tensor], form, *args) -> Tensor:
    """Return the op's result, which no reference may have made."""
    y = cuda.packed_linear(x, tensors, form.text, *args)
    assert not cuda.handed_back
    return y


def launched(monkeypatch, settings: cuda_table.Settings) -> set[str]:
    """Set what suits the card; return where the names of launches go."""
    launch, names = cuda_launch._launch, set()
    monkeypatch.setattr(cuda_launch, "settings_of", lambda device: settings)
    monkeypatch.setattr(cuda_launch, "_launch",
                        lambda name, *rest: (names.add(name), launch(name, *rest)))
    return names
