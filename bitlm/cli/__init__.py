"""The `bitlm` command. One file per subcommand, imported when it is asked for."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import Annotated

import typer
from typer.core import TyperGroup

from .errors import exit_code_of

COMMANDS = ("quantize", "distill", "evaluate", "inspect", "generate", "chat", "doctor", "demo")


class Group(TyperGroup):
    """A group whose commands live in modules of this package, function and module named alike.

    It takes --debug before or after the subcommand, and turns every error into one line.
    """

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, cmd_name):
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"{__name__}.{cmd_name}")
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(getattr(module, cmd_name))
        return typer.main.get_command(single)

    def parse_args(self, ctx, args):
        end = args.index("--") if "--" in args else len(args)
        ctx.meta["debug"] = "--debug" in args[:end]
        kept = [arg for arg in args[:end] if arg != "--debug"] + args[end:]
        with _ending(ctx):
            return super().parse_args(ctx, kept)

    def invoke(self, ctx):
        with _ending(ctx):
            return super().invoke(ctx)


@contextmanager
def _ending(ctx):
    """Turn an error into one line and an exit code: the one place where errors end."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if ctx.meta["debug"]:
            raise
        code = exit_code_of(error, ctx.invoked_subcommand)
        if code is None:
            raise
        raise typer.Exit(code) from None


app = typer.Typer(cls=Group, name="bitlm", add_completion=False, no_args_is_help=True,
                  pretty_exceptions_enable=False, rich_markup_mode=None)


def _version(asked: bool) -> None:
    if asked:
        from .output import version
        typer.echo(f"bitlm {version()}")
        raise typer.Exit


@app.callback()
def bitlm(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True,
                                          help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Turn Hugging Face checkpoints into 1-bit and ternary ones, and run them."""


def main() -> None:
    """Run the command line."""
    app(prog_name="bitlm")
