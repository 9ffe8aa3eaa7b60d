"""What the numbers depend on: processor, instruction sets, and limits set on all engines."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_vbmi", "avx512_bf16", "gfni",
         "amx_int8", "asimd", "asimddp", "i8mm")
# Holds torch, oneDNN, fbgemm and MKL to AVX2.
TORCH_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
              "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def limit(instruction_set: str | None) -> str:
    """Hold bitlm to an instruction set, and torch to AVX2 for that or less; return bitlm's own.

    torch reads its limits when it is imported, so the process starts itself again with them.
    """
    if instruction_set in ("scalar", "avx2") and not TORCH_AVX2.items() <= os.environ.items():
        os.environ.update(TORCH_AVX2)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from bitlm.ops import library

    used = library.limit_instruction_set(instruction_set)
    if used is None:
        sys.exit(f"bitlm has no native library here: {library.load().reason}")
    return used


def describe() -> dict[str, object]:
    """Return processor, instruction sets and versions, without names of hosts."""
    import torch

    info: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    flags = info.get("flags", info.get("Features", "")).split()
    return {"cpu": info.get("model name", platform.processor() or platform.machine()),
            "family": info.get("cpu family"), "model": info.get("model"),
            "cores": os.cpu_count(), "flags": [flag for flag in FLAGS if flag in flags],
            "torch": torch.__version__}
