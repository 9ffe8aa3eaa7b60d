"""Two processes of one training, as torchrun starts them, from a server that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 120  # a collective that nobody answers would wait for ever


def run_two(function: Callable[..., Any], *args: Any) -> str:
    """Call a function of a module in two processes; return what the first one printed.

    Raises AssertionError with the traceback of a process that failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.trainer", "bitlm.train.stages",
                                    "torch.distributed.fsdp", "torch.distributed.checkpoint"])
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    queue = context.Queue()
    started = [context.Process(target=_run, args=(rank, port, queue, function, args))
               for rank in range(2)]
    for process in started:
        process.start()
    try:
        ended = dict(queue.get(timeout=SECONDS) for _ in started)
    finally:
        for process in started:
            process.join(5)
            process.terminate()
    errors = [error for error, _ in ended.values() if error]
    assert not errors, "\n".join(errors)
    return ended[0][1]


def _run(rank: int, port: int, queue: Any, function: Callable[..., Any], args: tuple) -> None:
    import contextlib
    import io

    import torch

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    error, shown = "", io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            function(*args)
    except BaseException as raised:
        if not isinstance(raised, SystemExit) or raised.code:
            error = traceback.format_exc()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    queue.put((rank, (error, shown.getvalue())))


def run_script(path: Path, *arguments: str) -> None:
    """Run a Python file as a script."""
    import runpy

    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")
