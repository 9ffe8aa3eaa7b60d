"""The blocks of a model (encoder and decoder layers)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def find_blocks(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Group weight names by block, in the model's order: {"model.layers.0": [...], ...}.

    A block is an element of an outermost nn.ModuleList; weights outside all of them come under "".
    """
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [p for p in lists if not any(p.startswith(f"{other}.") for other in lists)]
    blocks: dict[str, list[str]] = {}
    outside = []
    for name in names:
        home = next((path for path in outermost if name.startswith(f"{path}.")), None)
        if home is None:
            outside.append(name)
        else:
            index = name.removeprefix(f"{home}.").partition(".")[0]
            blocks.setdefault(f"{home}.{index}", []).append(name)
    return blocks | ({"": outside} if outside else {})
