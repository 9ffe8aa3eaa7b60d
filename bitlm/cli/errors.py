"""Errors as one line and an exit code: 0 ok, 1 failed, 2 wrong usage."""

from __future__ import annotations

import errno
import json
import sys

FAILED, USAGE = 1, 2


class UsageError(ValueError):
    """A wrong combination of arguments: exit code 2."""


def exit_code_of(error: BaseException, command: str | None = None) -> int | None:
    """Print an error as one line on stderr and return the exit code.

    None, and nothing printed, for the exceptions by which typer itself ends a command.
    """
    if type(error).__module__.split(".")[0] in ("typer", "click"):
        return _of_usage(error)
    if isinstance(error, BrokenPipeError):
        return None
    line, code = describe(error, command)
    print(f"bitlm: {line}", file=sys.stderr)
    return code


def describe(error: BaseException, command: str | None = None) -> tuple[str, int]:
    """Return what to tell the user of an error, in one line, and the exit code."""
    from ..scheme import SchemeError

    if isinstance(error, KeyboardInterrupt):
        again = ": run the same command again with --resume to go on" * (command == "quantize")
        return f"interrupted{again}", FAILED
    if isinstance(error, (UsageError, SchemeError)):
        return _one_line(error), USAGE
    if isinstance(error, OSError):
        return _of_system(error, command), FAILED
    if isinstance(error, MemoryError) or "not enough memory" in str(error):
        return f"out of memory: {_one_line(error)}", FAILED
    known = isinstance(error, ValueError) and not isinstance(error, (json.JSONDecodeError,
                                                                     UnicodeError))
    if known and str(error):
        return _one_line(error), FAILED
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("bitlm"):
        return f"{error.name} is not installed: pip install {error.name}", FAILED
    return (f"unexpected {type(error).__name__}: {_one_line(error)} (--debug shows where; please "
            "report it)"), FAILED


def _of_usage(error: BaseException) -> int | None:
    """Print what typer has against the arguments in one line in place of its own three."""
    if not hasattr(error, "format_message") or "Help" in type(error).__name__:
        return None  # it ends the command, or shows the help
    context = getattr(error, "ctx", None)
    where = f" (see {context.command_path} --help)" if context else ""
    print(f"bitlm: {' '.join(error.format_message().split()).rstrip('.')}{where}", file=sys.stderr)
    return getattr(error, "exit_code", USAGE)


def _of_system(error: OSError, command: str | None) -> str:
    where = error.filename2 or error.filename or ""
    if error.errno == errno.ENOSPC:
        target = f" for {where}" if where else ""
        again = " and go on with --resume" * (command == "quantize")
        return f"no space left on the device{target}: free some{again}, or choose another folder"
    if error.errno is None or not error.strerror:
        return _one_line(error)
    return f"{where}: {error.strerror}" if where else error.strerror


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:1000]
