from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from bitlm.cli import app
from tests.tiny import TEXT, make_bert, make_llama


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep subprocesses from waiting for a hub, and from crowding a busy machine with threads."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Run tiny models on one thread: more only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
