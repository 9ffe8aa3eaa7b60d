"""What one core can multiply at most, by a small program compiled for this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).resolve().parent.parent / "peak.cpp"


def measure(instruction_set: str) -> dict[str, float]:
    """Return 10^9 multiplications and additions a second by instructions.

    {} where there is no C++ compiler. instruction_set: "avx2" and "scalar" leave AVX-512 out.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        return {}
    flags = ["-march=native"]
    if instruction_set in ("avx2", "scalar"):
        flags.append("-mno-avx512f")
    elif instruction_set != "amx":
        flags.append("-mno-amx-int8")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        subprocess.run([compiler, "-O2", "-std=c++17", *flags, _SOURCE, "-o", program], check=True)
        return json.loads(subprocess.run([program], check=True, capture_output=True).stdout)
