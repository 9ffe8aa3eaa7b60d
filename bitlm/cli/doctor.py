"""`bitlm doctor`: what this machine has, what runs natively, and why not."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Annotated, Any

import typer

_WIDTH = 4096  # of the example weights
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# What of cpu.describe() has a row of its own, or a table.
_SHOWN = ("library", "reason", "binding", "instruction_set", "order", "kernels", "dtypes", "native",
          "reference")
_TABLES = ("kernels", "forms")


def doctor(
    json: Annotated[Path | None, typer.Option(help="Also write the findings to this file.")] = None,
) -> None:
    """Show versions, the native library and what runs on it."""
    from .output import console, table, write_json

    found = examine()
    screen = console()
    rows = [(what, _text(value)) for what, value in found.items() if what not in _TABLES]
    screen.print(table(("bitlm doctor", ""), rows, left=True))
    if found["kernels"]:
        screen.print("", table(("work", "kernel", "why"),
                               [tuple(_text(kernel.get(key)) for key in ("work", "choice", "why"))
                                for kernel in found["kernels"]], left=True))
    forms = [(name, reason or "native kernel") for name, reason in found["forms"].items()]
    screen.print("", table(("scheme", f"linear layers on the CPU, {_WIDTH}x{_WIDTH}, float32"),
                           forms, left=True))
    if json:
        write_json(json, found)


def examine() -> dict[str, Any]:
    """Return everything that `doctor` shows, as JSON types.

    kernels: which is chosen for each kind of work, and why. forms: for each scheme why its layers
    go to the reference, None where they are native.
    """
    import torch
    import transformers

    from ..ops import cpu
    from .output import version

    facts = cpu.describe()
    return {
        "bitlm": version(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "platform": platform.platform(),
        "cpu": cpu_model(), "threads": threads(), "huge pages": huge_pages(), **_native(facts),
        "autoload hook": autoload_state(), "cuda": _cuda(),
        "CUDA kernels": _cuda_kernels(), "kernels": facts.get("kernels") or [],
        "forms": forms(bool(facts["library"])),
    }


def _native(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the rows on the native library; without it only why."""
    if not facts["library"]:
        return {"native library": f"none: {facts['reason']}",
                "reference": "everything, in pure torch: right, but slow"}
    rows = {"native library": facts["library"], "binding": facts.get("binding"),
            "instruction set": facts["instruction_set"], "order of codes": facts.get("order"),
            "inputs": facts.get("dtypes"), "native": facts["native"],
            "reference": facts["reference"]}
    rows |= {key.replace("_", " "): value for key, value in facts.items() if key not in _SHOWN}
    return {what: value for what, value in rows.items() if value is not None}


def threads() -> str:
    """Return the threads that kernels may use, which is torch's setting, and the cores there are.

    Cores of this process, which are fewer than the machine's in a container or under taskset.
    """
    import torch

    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        cores = os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS")
    why = f", OMP_NUM_THREADS={asked}" if asked else ""
    return f"{torch.get_num_threads()} (torch's setting{why}) on {cores} cores"


def huge_pages() -> str:
    """Return whether the kernel gives 2 MiB pages to who asks, as bitlm does for its weights."""
    try:
        text = _PAGES.read_text("utf-8")
    except OSError:
        return "not known here (no transparent_hugepage in /sys): weights lie in small pages"
    mode = text.partition("[")[2].partition("]")[0] or text.strip()
    if mode == "never":
        return f"never: weights lie in small pages; `echo madvise > {_PAGES}` as root allows them"
    return f"{mode}: weights lie in 2 MiB pages where the system has them"


def forms(native: bool = True) -> dict[str, str | None]:
    """Return for each preset, and a grid, why its layers go to the reference; None: native.

    Without a native library, whose reason has its own row, there is only one answer.
    """
    if not native:
        return {"all": "reference: there is no native library"}
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
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _cuda_kernels() -> str:
    """Return the CUDA library and what it is for, or why packed layers use the reference there."""
    from ..ops import cuda

    facts = cuda.describe()
    if not facts["library"]:
        return f"none: {facts['reason']}"
    import torch

    cards = {f"cuda:{i}": torch.device("cuda", i) for i in range(torch.cuda.device_count())}
    tried = [f"{name}: {_agreement(card)}" for name, card in cards.items()]
    return "; ".join([f"{facts['library']}, machine code for {facts['architectures']}", *tried,
                      f"native: {facts['native']}", f"reference: {', '.join(facts['reference'])}"])


def _agreement(card: Any) -> str:
    from ..ops import cuda

    unfit, left_out = cuda.unfit(card), cuda.not_used(card)
    partly = f", but for products by wgmma, which are not used: {left_out}" if left_out else ""
    return unfit or f"agrees with the reference{partly}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return "none" if value is None else str(value)


