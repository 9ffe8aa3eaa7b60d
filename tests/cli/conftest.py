from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bitlm.cli import app
from tests.tiny import TEXT, make_bert, make_llama


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep subprocesses from waiting for a hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense llama, a packed one, a bert and a text file; tests leave it alone."""
    from bitlm.quantize import quantize

    folder = tmp_path_factory.mktemp("zoo")
    make_llama(folder / "llama")
    make_bert(folder / "bert")
    quantize(folder / "llama", out=folder / "packed")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    return folder


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command line in this process."""
    return lambda *args, **options: CliRunner().invoke(app, [str(arg) for arg in args], **options)
