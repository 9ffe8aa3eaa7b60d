"""Results on disk: one block for each machine and instruction set, replaced when measured again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Block = dict[str, Any]

_SAME = ("cpu", "family", "model", "flags", "instruction_set")


def load(path: Path) -> list[Block]:
    return json.loads(path.read_text())["blocks"] if path.exists() else []


def save(path: Path, block: Block) -> None:
    """Add a block to a file, in the place of the one of the same machine."""
    blocks = [b for b in load(path) if _key(b) != _key(block)] + [block]
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
