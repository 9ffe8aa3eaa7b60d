"""For all tests: no network, few threads, the same random numbers every time."""

from __future__ import annotations

import os

# Before torch and huggingface_hub are imported; subprocesses inherit both.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # each of several processes has a core of its own
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("COLUMNS", None)  # xdist sets the width of a terminal
os.environ.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 2)))

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test with the same seed."""
    torch.manual_seed(0)
