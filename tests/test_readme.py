"""What the README says can be typed can be typed, and its tables are those of the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from bitlm.cli import COMMANDS, app
from bitlm.ops.form import TABLE
from bitlm.scheme import PRESETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_exist_with_their_flags(words):
    program = words[0]
    if program != "bitlm" and not program.endswith("/bitlm"):
        assert program.startswith(("./", "eval/", "scripts/")), f"what is {program}?"
        assert (ROOT / program).is_file()
        if program == "scripts/bench":
            assert (ROOT / "scripts" / "benchmarks" / f"{words[1]}.py").is_file()
        return
    assert words[1] in COMMANDS
    command = typer.main.get_command(app).get_command(None, words[1])
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert not [word for word in words if word.startswith("--") and word not in known]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_examples_run(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bitlm").mkdir()
    (tmp_path / "bitlm" / "demo").symlink_to(ROOT / "bitlm" / "demo")
    exec(compile(blocks("python")[number], f"README block {number}", "exec"), {})


def test_the_format_table_is_that_of_the_code():
    section = README.split("## The file format")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([a-z_{}.pq]+)` \| (?:uint8|int32|fp16/fp32) (\[.*?\])", section,
                           re.M))
    written = {name.replace("{p}", "").replace("{q}", ""): shape for name, shape in rows.items()}
    assert set(written) == set(TABLE)
    for name, row in TABLE.items():
        axes = ", ".join({"P": "parts"}.get(axis, axis) for axis in row.axes)
        shape = re.sub(r"⌈(\w)/(\d)⌉", r"\1/\2", written[name])
        # K stands for the columns that a plane covers, in a table for people.
        assert shape.replace("K", "C") == f"[{axes}]".replace("K", "C"), name


def test_every_preset_is_measured():
    section = README.split("| preset |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.M)) == set(PRESETS)


def test_paths_that_are_named_exist():
    for path in set(re.findall(r"`((?:bitlm|scripts|eval|tests)/[\w./]+)`", README)):
        assert (ROOT / path).exists(), path
