"""`bitlm doctor`: what this machine has, what runs natively, and why not."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

_WIDTH = 4096  # of the example weights


def doctor(
    json: Annotated[Path | None, typer.Option(help="Also write the findings to this file.")] = None,
) -> None:
    """Show versions, the native library and what runs on it."""
    from .output import console, table, write_json

    found = examine()
    rows = [(what, _text(value)) for what, value in found.items() if what != "forms"]
    console().print(table(("bitlm doctor", ""), rows, left=True))
    forms = [(name, reason or "native kernel") for name, reason in found["forms"].items()]
    console().print("", table(("scheme", f"linear layers on the CPU, {_WIDTH}x{_WIDTH}, float32"),
                              forms, left=True))
    if json:
        write_json(json, found)


def examine() -> dict[str, Any]:
    """Return everything that `doctor` shows, as JSON types; `forms`: reason or None by scheme."""
    import torch
    import transformers

    from ..ops import cpu
    from .output import version

    kernel = cpu.describe()
    return {
        "bitlm": version(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "platform": platform.platform(),
        "cpu": cpu_model(), "threads": torch.get_num_threads(),
        "native library": kernel["library"] or f"none: {kernel['reason']}",
        "instruction set": kernel["instruction_set"], "native": kernel["native"],
        "reference": kernel["reference"], "autoload hook": autoload_state(),
        "cuda": _cuda(), "forms": forms(),
    }


def forms() -> dict[str, str | None]:
    """Return for each preset, and a grid, why its layers go to the reference; None: native."""
    import torch

    from .. import methods  # noqa: F401 - registers the methods
    from ..ops import cpu
    from ..plan import Entry
    from ..scheme import PRESETS, grid
    from ..targets import Target

    schemes = {f"preset {name}": scheme for name, scheme in PRESETS.items()}
    schemes["4-bit grid"] = grid(4)
    target = Target("example", _WIDTH, _WIDTH, "linear", torch.float32)
    return {name: cpu.unsupported(Entry(target, scheme).form, torch.float32)
            for name, scheme in schemes.items()}


def cpu_model() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def autoload_state() -> str:
    """Return whether packed checkpoints load without `import bitlm`, and why not."""
    from importlib.metadata import entry_points

    hooks = [hook for hook in entry_points(group="torch.backends") if hook.name == "bitlm"]
    if not hooks:
        return "not installed: `import bitlm` before loading (pip install bitlm adds the hook)"
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return "off (TORCH_DEVICE_BACKEND_AUTOLOAD=0): `import bitlm` before loading"
    return f"on ({hooks[0].value}): packed checkpoints load without `import bitlm`"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "not available" + ("" if torch.version.cuda else " (torch is a CPU build)")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda}); packed layers use the reference there"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


