"""`bitlm distill RECIPE [KEY=VALUE …]`: run a recipe; and the same for a recipe's own script."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import FAILED, exit_code_of


def distill(
    recipe: Annotated[str, typer.Argument(
        help="glue, summarization, translation, causal_lm, bert_pretrain, or a file: a TOML file "
             "that names its recipe, or a recipe's own .py.")],
    settings: Annotated[list[str] | None, typer.Argument(
        metavar="[KEY=VALUE]...", help="Settings, profile=small among them; --show lists all.")
    ] = None,
    show: Annotated[bool, typer.Option(
        "--show", help="Show the settings that would be used; train nothing.")] = False,
) -> None:
    """Train a binary or ternary student by distillation, and pack it."""
    from ..train import recipe as recipes

    path, file = recipes.find(recipe)
    _run(path, file, settings or [], show)


def script(file: str) -> None:
    """Run a recipe as a script: its arguments are a TOML file, KEY=VALUE, --show and --debug."""
    given = sys.argv[1:]
    options = {option: option in given for option in ("--show", "--debug")}
    pairs = [each for each in given if each not in options and not each.endswith(".toml")
             or "=" in each]
    files = [Path(each) for each in given if each not in options and each not in pairs]
    try:
        _run(Path(file).resolve(), files[0] if files else None, pairs, options["--show"])
    except typer.Exit as ending:
        raise SystemExit(ending.exit_code) from None
    except (Exception, KeyboardInterrupt) as error:
        if options["--debug"]:
            raise
        raise SystemExit(exit_code_of(error, "distill")) from None


def _run(path: Path, file: Path | None, pairs: list[str], show: bool) -> None:
    from ..source import quiet
    from ..train import recipe as recipes

    found = recipes.settings(path, pairs, file)
    if show:
        names = recipes.scheme_names(found.at().scheme) or [""]
        _show([recipes.plain(found.at(scheme=name)) for name in names], names, found)
        return
    module = recipes.load(path)
    try:
        with quiet():
            module.run(found, _say)
    except KeyboardInterrupt:
        print("bitlm: interrupted: run the same command again to go on from the last checkpoint",
              file=sys.stderr)
        raise typer.Exit(FAILED) from None


def _say(line: str) -> None:
    print(line, flush=True)


def _show(stages: list[dict[str, Any]], names: list[str], found: Any) -> None:
    """Show the settings of each stage, one column each."""
    from .output import console, table

    columns = [dict(_flat(values)) for values in stages]
    rows = [(name, *(repr(values.get(name)) for values in columns)) for name in columns[0]]
    console().print(f"{found.recipe}, profile {found.profile or 'none'}", "", table(
        ("setting", *(name or "value" for name in names)), rows, left=True), sep="\n",
        markup=False)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [pair for key, value in values.items() for pair in (
        _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value
        else [(prefix + key, value)])]
