"""llama.cpp as a peer: `bench_ggml` runs beside this process and takes its turns on command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


class Ggml:
    """A running bench_ggml of a folder that scripts/benchmarks/ggml/build filled."""

    def __init__(self, folder: Path, instruction_set: str) -> None:
        self.programs = programs(folder, instruction_set)
        self._process = subprocess.Popen([self.programs / "bench_ggml"], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, bufsize=1,
                                         env={**os.environ, "OMP_PROC_BIND": "true"})

    def ask(self, *words: object) -> object:
        """Send a command and return its answer."""
        try:
            self._process.stdin.write(" ".join(map(str, words)) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            sys.exit(f"bench_ggml ended with {self._process.wait()} at: {words}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Type:
    """An engine: products with one type of ggml, in the buffer that proves fastest here."""

    def __init__(self, ggml: Ggml, name: str, batch: int, threads: int,
                 variants: list[str]) -> None:
        self.name, self.batch = f"ggml {name}", batch
        self._ggml, self._threads, self._variants = ggml, threads, variants

    def turn(self, seconds: float) -> float:
        if len(self._variants) > 1:
            times = {}
            for variant in self._variants:
                self._run(variant, seconds / 2)
                times[variant] = self._run(variant, seconds)
            self._variants = [min(times, key=times.get)]
        return self._run(self._variants[0], seconds)

    def _run(self, variant: str, seconds: float) -> float:
        return self._ggml.ask("run", variant, self.batch, self._threads, seconds)

    @property
    def detail(self) -> str:
        """The variant that is timed: `q4_0@AMX`."""
        return self._variants[0]


def programs(folder: Path, instruction_set: str) -> Path:
    """Return where the build for an instruction set is; ends the program when there is none."""
    path = folder / ("avx2" if instruction_set in ("avx2", "scalar") else "native") / "bin"
    if not (path / "bench_ggml").exists():
        sys.exit(f"{path}/bench_ggml is missing: scripts/benchmarks/ggml/build builds it")
    return path
