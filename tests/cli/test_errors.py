import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from bitlm import cli
from bitlm.cli.errors import describe
from bitlm.scheme import SchemeError

BITLM = [sys.executable, "-c", "from bitlm.cli import main; main()"]


@pytest.fixture
def failing(monkeypatch):
    """Make `bitlm doctor` raise what the test wants."""
    from bitlm.cli import doctor as module

    def raising(error):
        def doctor() -> None:
            raise error
        monkeypatch.setattr(module, "doctor", doctor)
    return raising


@pytest.mark.parametrize("error, code, line", [
    (ValueError("no good:\n  take another"), 1, "bitlm: no good: take another\n"),
    (SchemeError("unknown preset"), 2, "bitlm: unknown preset\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1,
     "bitlm: no space left on the device for /x/y: free some, or choose another folder\n"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, "bitlm: /x: Permission denied\n"),
    (KeyboardInterrupt(), 1, "bitlm: interrupted\n"),
    (TypeError("a bug"), 1,
     "bitlm: unexpected TypeError: a bug (--debug shows where; please report it)\n"),
    (ModuleNotFoundError("No module", name="datasets"), 1,
     "bitlm: datasets is not installed: pip install datasets\n"),
])
def test_each_error_is_one_line_and_a_code(run, failing, error, code, line):
    failing(error)
    result = run("doctor")
    assert result.exit_code == code
    assert result.stderr == line


@pytest.mark.parametrize("args", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_lets_the_error_through(run, failing, args):
    failing(TypeError("a bug"))
    result = run(*args)
    assert isinstance(result.exception, TypeError)


def test_an_interrupted_quantization_can_go_on():
    assert describe(KeyboardInterrupt(), "quantize")[0].endswith("with --resume to go on")


@pytest.mark.parametrize("args, line", [
    (["evalate"], "No such command 'evalate' (see bitlm --help)"),
    (["--nonsense"], "No such option: --nonsense (see bitlm --help)"),
    (["doctor", "--nonsense"], "No such option: --nonsense (see bitlm doctor --help)"),
    (["generate"], "Missing argument 'model' (see bitlm generate --help)"),
    (["quantize", "x", "--planes", "two"], "Invalid value for '--planes': "),
])
def test_wrong_usage_is_one_line(run, args, line):
    result = run(*args)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"bitlm: {line}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [[], ["--help"], ["doctor", "--help"]])
def test_help_is_shown_whole(run, args):
    result = run(*args)
    assert "Usage" in result.output and result.output.count("\n") > 4
    assert result.exit_code == 0 or not args


def test_version_and_help_are_fast():
    start = time.perf_counter()
    done = subprocess.run([*BITLM, "--help"], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        assert command in done.stdout
    assert seconds < 5  # far above what it takes, far below importing torch on a busy machine
    check = "import sys; from bitlm.cli import app; import typer; typer.main.get_command(app); " \
            "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
    done = subprocess.run([*BITLM, "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("bitlm 0.")


def _open_when_read(pipe, process):
    """Open a named pipe for writing once the process reads it, so that it now waits for text."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            time.sleep(0.05)
    raise AssertionError(process.communicate()[1])


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes and SIGINT")
def test_ctrl_c_in_a_real_process(zoo, tmp_path):
    pipe = tmp_path / "text.txt"
    os.mkfifo(pipe)
    command = [*BITLM, "evaluate", str(zoo / "llama"), "--data", str(pipe)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer = _open_when_read(pipe, process)
    time.sleep(0.2)
    # Python misses a signal that comes just before it waits for the pipe: then once more.
    for patience in (10, 60):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            _, stderr = process.communicate(timeout=patience)
            break
    os.close(writer)
    assert process.returncode == 1
    assert stderr.strip().splitlines()[-1] == "bitlm: interrupted"
    assert "Traceback" not in stderr
