"""The emulated GPU, built once, and the binding over it."""

from __future__ import annotations

import pytest

from bitlm.ops import cuda, library
from tests.native import cuda_host


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if cuda_host.compiler() is None:
        pytest.skip("there is no g++ to build the emulated GPU with")
    loaded = cuda_host.build(tmp_path_factory.mktemp("cuda"))
    assert loaded.reason is None
    return loaded


@pytest.fixture
def kernels(emulated, monkeypatch):
    """Let the binding launch on the host, and see that nothing is handed back unasked."""
    load = library.load
    monkeypatch.setattr(library, "load", lambda name="bitlm_cpu":
                        emulated if name == "bitlm_cuda" else load(name))
    monkeypatch.setattr(cuda, "handed_back", {})
    yield emulated.library
    emulated.library.bitlm_cuda_emulate_backwards(0)
