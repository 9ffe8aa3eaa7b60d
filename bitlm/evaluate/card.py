"""The "Measured" table of a model card."""

from __future__ import annotations

HEADING = "## Measured"
COLUMNS = ("Task", "Data", "Context", "Tokens", "Perplexity", "Dense perplexity", "KL to dense",
           "Top-1 agreement")
_KEYS = 3  # task, data and context tell which row a measurement replaces


def add_measurement(card: str, row: dict[str, str]) -> str:
    """Return the model card with a row of the "Measured" table added.

    row: text by column of COLUMNS, missing ones stay empty. A row of the same task, data and
    context is replaced; the table and its heading are made where they are missing.
    """
    cells = [row.get(column, "").replace("|", "/").replace("\n", " ") for column in COLUMNS]
    before, rows, after = _split(card)
    same = [i for i, other in enumerate(rows) if other[:_KEYS] == cells[:_KEYS]]
    if same:
        rows[same[0]] = cells
    else:
        rows.append(cells)
    table = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([*before, HEADING, "", *lines, *after]) + "\n"


def _split(card: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the lines before the table's heading, the cells of its rows, the lines after it."""
    lines = card.rstrip("\n").split("\n") if card.strip() else []
    if HEADING not in lines:
        return lines + [""] * bool(lines), [], []
    start = lines.index(HEADING)
    end = start + 1
    rows = []
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith("|")):
        if lines[end].startswith("|"):
            rows.append([cell.strip() for cell in lines[end].strip().strip("|").split("|")])
        end += 1
    after = lines[end:]
    return lines[:start], rows[2:], ["", *after] if after else []
