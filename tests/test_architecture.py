"""Who may import whom, and a few things that must not be anywhere in the package."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import bitlm

ROOT = Path(bitlm.__file__).parent
# Each part of the package and the parts that it may import, also inside functions. `bitlm` is the
# package's own __init__ (its version). A part that is not listed fails: think, then list it.
FORM = {"scheme", "ops", "weight", "modules", "targets", "methods", "plan", "packing"}
RUN = FORM | {"calibration", "job", "memory", "output"}
ALLOWED: dict[str, set[str]] = {
    "bitlm": set(),
    "scheme": set(),
    "verdict": set(),
    "job": set(),
    "ops": {"bitlm"},  # where the compiled library lies
    "weight": {"ops"},
    "modules": {"weight"},
    "targets": {"modules"},
    "activations": {"scheme", "modules", "targets"},
    "placement": {"scheme"},
    "quantizers": {"scheme", "ops", "weight"},
    "attention": {"scheme", "weight", "quantizers"},
    "methods": {"scheme", "ops"},
    "plan": {"scheme", "targets", "ops", "methods"},  # the registry says a method's alphabet
    "packing": {"plan", "methods", "weight"},
    "calibration": {"targets"},
    "memory": {"calibration", "plan"},
    "checkpoint": {"plan", "weight", "modules", "ops"},
    "report": {"scheme", "plan", "verdict"},
    "source": {"checkpoint", "targets"},
    "output": {"source", "job"},
    # What training needs of the architectures' loader, `bitlm` hands on lazily.
    "train": FORM | {"bitlm", "placement", "quantizers", "attention", "job", "output", "source"},
    # `train` lazily, to open a model in training again.
    "hf": FORM | {"bitlm", "checkpoint", "quantizers", "attention", "train"},
    "evaluate": {"scheme", "ops", "weight", "modules", "attention", "plan", "hf", "report",
                 "source", "activations", "calibration"},
    "run": RUN,
    "quantize": RUN | {"bitlm", "run", "report", "hf", "source", "verdict"},
    "cli": RUN | {"bitlm", "activations", "checkpoint", "evaluate", "hf", "quantize", "report",
                  "run", "source", "train", "verdict"},
}
# Libraries of others that a part must not need at all.
NO_LIBRARIES = ("scheme",)
ONLY_TORCH = ("ops", "weight", "modules", "targets", "activations", "methods", "plan", "packing")
HEAVY = ("datasets", "gguf", "rouge_score", "lm_eval", "matplotlib", "sklearn", "scipy", "peft",
         "sacrebleu")


@cache
def sources() -> dict[str, tuple[Path, ast.Module]]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ("bitlm", *path.relative_to(ROOT).with_suffix("").parts)
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path, ast.parse(path.read_text("utf-8"))
    return found


def imports(name: str, inside_functions: bool = True) -> set[str]:
    """Return the dotted names that a module imports; of a package's submodule, the submodule."""
    path, tree = sources()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in _walk(tree, inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                start = package.split(".")[:len(package.split(".")) - node.level + 1]
                base = ".".join([*start, *filter(None, [base])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in sources() else base)
    return found


def _walk(tree: ast.AST, inside_functions: bool):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not inside_functions:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _walk(node, inside_functions)


def part(name: str) -> str:
    return name.split(".")[1] if "." in name else name


def libraries(name: str) -> set[str]:
    return {i.split(".")[0] for i in imports(name)} - set(sys.stdlib_module_names) - {"bitlm"}


@pytest.mark.parametrize("name", sources())
def test_import_directions(name):
    own = part(name)
    assert own in ALLOWED, f"{own} is new: say in ALLOWED what it may import"
    wrong = {i for i in imports(name) if i.split(".")[0] == "bitlm"
             and part(i) != own and part(i) not in ALLOWED[own]}
    assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}"


def test_nothing_imports_what_is_on_top():
    for own, allowed in ALLOWED.items():
        assert own == "cli" or "cli" not in allowed
    for name in sources():
        assert not libraries(name) & {"recipes", "eval", "tests", "scripts"}, name


def test_parts_do_not_depend_on_each_other_in_a_circle():
    order: list[str] = []

    def visit(own: str, above: tuple[str, ...]) -> None:
        assert own not in above, f"a circle: {' -> '.join((*above, own))}"
        if own not in order:
            for other in ALLOWED[own]:
                visit(other, (*above, own))
            order.append(own)

    for own in ALLOWED:
        visit(own, ())


def test_modules_do_not_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a circle: {' -> '.join((*above, name))}"
        if name not in done:
            for other in imports(name, inside_functions=False) & set(sources()):
                if other != name and not name.startswith(f"{other}."):  # its own package
                    visit(other, (*above, name))
            done.add(name)

    for name in sources():
        visit(name, ())


def test_libraries():
    for name in sources():
        own = part(name)
        if own in NO_LIBRARIES:
            assert not libraries(name), name
        if own in ONLY_TORCH:
            assert libraries(name) <= {"torch"}, name
        assert not {i.split(".")[0] for i in imports(name, False)} & set(HEAVY), name


def test_files():
    assert [p.name for p in ROOT.rglob("utils.py")] == []
    for name, (path, tree) in sources().items():
        text = path.read_text("utf-8")
        assert "torch.load" not in text, name
        assert not libraries(name) & {"dill", "cloudpickle", "joblib"}, name
        assert not {"pickle", "marshal", "shelve"} & imports(name), name
        prints = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call)
                  and isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert part(name) == "cli" or not prints, f"{name} prints in lines {prints}"


def test_import_bitlm_is_light_and_quick():
    code = ("import sys, time; start = time.perf_counter(); import bitlm; "
            "seconds = time.perf_counter() - start; "
            "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); "
            "assert not heavy, heavy; print(seconds)")
    times = [float(subprocess.run([sys.executable, "-c", code], check=True, text=True,
                                  capture_output=True).stdout) for _ in range(3)]
    assert min(times) < 0.2, times
