"""The "Measured" table of a model card."""

from __future__ import annotations

HEADING = "## Measured"
COLUMNS = ("Task", "Data", "Context", "Tokens", "Activations", "Perplexity", "Dense perplexity",
           "KL to dense", "Top-1 agreement", "Scores", "Dense scores")
# They tell which row a measurement replaces.
_KEYS = ("Task", "Data", "Context", "Tokens", "Activations")


def add_measurement(card: str, row: dict[str, str]) -> str:
    """Return the model card with a row of the "Measured" table added.

    row: text by column of COLUMNS, missing ones stay empty. A row of the same task, data, context,
    tokens and activations is replaced; the table and its heading are made where they are missing.
    """
    row = {column: text.replace("|", "/").replace("\n", " ") for column, text in row.items()}
    before, rows, after = _split(card)
    same = [i for i, other in enumerate(rows)
            if all(other.get(key, "") == row.get(key, "") for key in _KEYS)]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)
    table = [COLUMNS, ["---"] * len(COLUMNS),
             *([each.get(column, "") for column in COLUMNS] for each in rows)]
    lines = ["| " + " | ".join(line) + " |" for line in table]
    return "\n".join([*before, HEADING, "", *lines, *after]) + "\n"


def _split(card: str) -> tuple[list[str], list[dict[str, str]], list[str]]:
    """Return the lines before the table's heading, its rows by column, the lines after it."""
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
    # By their own header: a card that an earlier version wrote may lack a column.
    named = [dict(zip(rows[0], cells)) for cells in rows[2:]]
    return lines[:start], named, ["", *after] if after else []
