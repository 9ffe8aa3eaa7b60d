"""What an installation holds, and that a stale one does not break torch."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import bitlm

ROOT = Path(__file__).parent.parent
CHECKOUT = ("pyproject.toml", "README.md", "LICENSE", "bitlm", "bitlm_autoload.py", "recipes")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what the package is made of."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in CHECKOUT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def build(checkout, monkeypatch):
    """Return a function that makes a wheel without the compiled library, `editable` or not."""
    backend = pytest.importorskip("scikit_build_core.build")

    def built(kind: str) -> zipfile.ZipFile:
        monkeypatch.chdir(checkout)
        made = getattr(backend, f"build_{kind}")(str(checkout.parent), {"wheel.cmake": "false"})
        return zipfile.ZipFile(checkout.parent / made)

    return built


def contents(wheel: zipfile.ZipFile, name: str) -> str:
    return wheel.read(next(path for path in wheel.namelist() if path.endswith(name))).decode()


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_a_wheel_holds_a_copy_of_the_hook_and_the_version(kind, build):
    wheel = build(kind)
    assert wheel.read("bitlm_autoload.py").decode() == (ROOT / "bitlm_autoload.py").read_text()
    assert "bitlm = bitlm_autoload:hook" in contents(wheel, ".dist-info/entry_points.txt")
    assert f"\nVersion: {bitlm.__version__}\n" in contents(wheel, ".dist-info/METADATA")


def test_a_wheel_holds_the_package_and_nothing_else(build):
    inside = {name for name in build("wheel").namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bitlm").rglob("*")
             if path.is_file() and "__pycache__" not in path.parts
             and ROOT / "bitlm" / "native" not in path.parents}
    recipes = {f"bitlm/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.*")}
    assert inside == files | recipes | {"bitlm_autoload.py"}
    assert {"bitlm/verdict.txt", "bitlm/demo/model.safetensors",
            "bitlm/recipes/glue.py", "bitlm/recipes/glue.toml"} <= inside


def test_the_checkout_of_an_editable_installation_may_go(build, checkout):
    packages = checkout.parent / "site-packages"
    build("editable").extractall(packages)
    paths = str(packages), sysconfig.get_path("purelib")  # torch, perhaps another bitlm, after ours

    def run(code: str) -> str:
        code = f"import site; site.addsitedir({str(packages)!r})\n{code}"
        done = subprocess.run(
            [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=120,
            cwd=checkout.parent, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    run(f"import bitlm; assert bitlm.__file__.startswith({str(checkout)!r}), bitlm.__file__")
    shutil.rmtree(checkout)
    errors = run("import torch, transformers.modeling_utils, transformers.cache_utils\n"
                 "import sys; assert 'bitlm_autoload' in sys.modules\n"
                 "assert not any(type(f).__name__ == 'Watcher' for f in sys.meta_path)\n")
    assert "bitlm" not in errors


def test_this_installation_has_a_current_copy_of_the_hook():
    try:
        installed = metadata.distribution("bitlm")
    except metadata.PackageNotFoundError:
        pytest.skip("bitlm is not installed here")
    copy = Path(installed.locate_file("bitlm_autoload.py"))
    assert copy.is_file(), "torch could not be imported without the checkout: reinstall bitlm"
    assert copy.read_text() == (ROOT / "bitlm_autoload.py").read_text(), "reinstall bitlm"
    assert Path(importlib.import_module("bitlm_autoload").__file__).is_file()
