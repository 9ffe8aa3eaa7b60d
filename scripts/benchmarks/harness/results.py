"""Results on disk: one block for each machine and instruction set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Block = dict[str, Any]

_SAME = ("gpu", "cpu", "family", "model", "flags", "instruction_set")


def load(path: Path) -> list[Block]:
    return json.loads(path.read_text())["blocks"] if path.exists() else []


def save(path: Path, block: Block) -> None:
    """Add a block to a file.

    What an earlier run on the same machine measured stays, but for the groups measured again.
    """
    blocks = load(path)
    same = next((b for b in blocks if _key(b) == _key(block)), None)
    if same is None:
        blocks.append(block)
    else:
        fresh = {group["name"] for group in block["groups"]}
        block = same | block | {
            "groups": [g for g in same["groups"] if g["name"] not in fresh] + block["groups"]}
        if "errors" in same:
            block["errors"] = same["errors"] | block["errors"]
        blocks[blocks.index(same)] = block
    text = json.dumps({"blocks": blocks}, indent=1)
    # Lists and records without anything nested take one line.
    text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda m: re.sub(r"\s*\n\s*", " ", m[0]), text)
    path.write_text(text + "\n")


def _key(block: Block) -> list[object]:
    return [block["machine"].get(name) for name in _SAME]


def title(block: Block) -> str:
    machine = block["machine"]
    return (f"{machine['cpu']} (family {machine['family']}, model {machine['model']}), "
            f"{machine['cores']} cores, {machine['instruction_set']}")
