"""Rows of labelled data: files and folders first, ids of the hub where there are none."""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
SPLITS = ("train", "validation", "test")
_ALIASES = {"dev": "validation", "valid": "validation", "val": "validation"}
# The name of a split's file: the hub's shards and the two halves of MNLI too.
_SPLIT_FILE = re.compile(r"(train|validation|valid|val|dev|test)(_matched|_mismatched)?"
                         r"(-\d+-of-\d+)?")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

Row = dict[str, Any]
Rows = Sequence[Row]  # a list, or a datasets.Dataset, which leaves its rows on the disk


class DataError(ValueError):
    """Data that cannot be used: the message names file and row, and what to do."""


def load_split(source: str | Path, split: str = "validation", config: str | None = None,
               limit: int | None = None) -> Rows:
    """Return the rows of one split, at most the first `limit`.

    source: a file (json, jsonl, csv or parquet), which is one split whatever `split` says; a folder
    with a file for each split (train, validation or dev, test); else a hub id. A path that exists
    wins. config: of a hub id or, where there is one of that name, a folder in `source`. Json and
    csv give a list, parquet and the hub a datasets.Dataset. Raises DataError for data that is not
    there, is damaged or empty, and for a split that does not exist.
    """
    path = Path(source)
    if path.is_file():
        rows = _read([path])
    elif path.is_dir():
        found = splits(path, config)
        if _canonical(split) not in found:
            raise DataError(f"{source} has no split {split}: it has {', '.join(found)}; put "
                            f"{split}.jsonl beside them (or .json, .csv, .parquet)")
        rows = _read(found[_canonical(split)])
    elif path.exists() or str(source).endswith(SUFFIXES) or not _HUB_ID.fullmatch(str(source)):
        raise DataError(f"no such file or folder: {source}")
    else:
        rows = _read_hub(str(source), split, config)
    if not len(rows):
        raise DataError(f"{source} holds no rows")
    if limit is None or limit >= len(rows):
        return rows
    return rows[:limit] if isinstance(rows, list) else rows.select(range(limit))


def splits(folder: str | Path, config: str | None = None) -> dict[str, list[Path]]:
    """Return the files of each split in a folder, in the order train, validation, test.

    They are looked for in the folder, in its folder `config` and in its folder `data`. A split is
    one file or numbered parts (`-00000-of-00002`). Raises DataError when there are none, and for
    two files of one split.
    """
    folder = Path(folder)
    for place in (folder, *([folder / config] if config else []), folder / "data"):
        found: dict[str, list[Path]] = {}
        for path in sorted(place.iterdir() if place.is_dir() else ()):
            name = path.name.lower()
            suffix = next((each for each in SUFFIXES if name.endswith(each)), None)
            match = suffix and _SPLIT_FILE.fullmatch(name.removesuffix(suffix))
            if match:
                others = found.setdefault(_canonical(match[1] + (match[2] or "")), [])
                if others and not match[3]:
                    raise DataError(f"{others[-1]} and {path.name} are both of one split: name the "
                                    "file to use, or move one of them")
                others.append(path)
        if found:
            return {name: found[name] for name in sorted(found, key=_order)}
    raise DataError(f"{folder} has no file of a split: expected train, validation (or dev) and test"
                    f" as {', '.join(SUFFIXES[:4])}")


def choose_split(source: str | Path, wanted: Sequence[str], config: str | None = None) -> str:
    """Return the first of the wanted splits that a folder has; "" of a file, which is one split.

    Of a hub id the first one wanted. Raises DataError where a folder has none of them.
    """
    path = Path(source)
    if path.is_file():
        return ""
    if not path.is_dir():
        return wanted[0]
    found = splits(path, config)
    for split in wanted:
        if split in found:
            return split
    raise DataError(f"{source} has no {' or '.join(wanted)} split: it has {', '.join(found)}; put "
                    f"{wanted[0]}.jsonl beside them (or .json, .csv, .parquet), or name a split or "
                    "a file")


def pick_column(rows: Rows, candidates: Sequence[str], what: str = "") -> str:
    """Return the first candidate that the rows have as a column; DataError where none is there."""
    for name in candidates:
        if name in rows[0]:
            return name
    raise DataError(f"no column {' or '.join(candidates)}{f' ({what})' * bool(what)}: the columns "
                    f"are {', '.join(map(str, rows[0]))}")


def texts(rows: Rows, column: str) -> list[str]:
    """Return a column of texts; DataError names the first row that has none."""
    found = []
    for number, row in enumerate(rows, 1):
        value = row.get(column)
        if not isinstance(value, str):
            raise DataError(f"row {number}: {column!r} is no text but {type(value).__name__}")
        found.append(value)
    return found


def renamed(columns: Mapping[str, str] | None, fields: Iterable[str]) -> Mapping[str, str]:
    """Return the given names of columns by field; DataError for a field that is not one of
    `fields`."""
    unknown = sorted(set(columns or ()) - set(fields))
    if unknown:
        raise DataError(f"no field {unknown[0]!r}: the fields are {', '.join(fields)}")
    return columns or {}


def _canonical(split: str) -> str:
    """Return a split's usual name: `dev_matched` is `validation_matched`."""
    name, _, half = split.lower().partition("_")
    return _ALIASES.get(name, name) + (f"_{half}" if half else "")


def _order(split: str) -> tuple[int, str]:
    return SPLITS.index(split.partition("_")[0]), split


def _read(paths: list[Path]) -> Rows:
    if all(path.name.lower().endswith(".parquet") for path in paths):
        return _read_parquet(paths)
    return [row for path in paths for row in _read_text(path)]


def _read_text(path: Path) -> list[Row]:
    name = path.name.lower().removesuffix(".gz")
    if not name.endswith(SUFFIXES[:3]):
        raise DataError(f"{path} is neither json, jsonl, csv nor parquet")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.name.lower().endswith(".gz") else data).decode(
            "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path} cannot be decompressed: {error}") from None
    if name.endswith(".csv"):
        csv.field_size_limit(max(len(text), 1))  # a cell may be as long as a document
        return list(csv.DictReader(io.StringIO(text, newline="")))
    return _records(path, text)


def _records(path: Path, text: str) -> list[Row]:
    """Return the objects of a jsonl file or of a json list."""
    if text.lstrip().startswith("["):
        try:
            numbered = list(enumerate(json.loads(text), 1))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: no JSON ({error.msg})") from None
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}: no JSON ({error.msg})") from None
    for number, record in numbered:
        if not isinstance(record, dict):
            raise DataError(f"{path}, row {number}: no object but {type(record).__name__}")
    return [record for _, record in numbered]


def _read_parquet(paths: list[Path]) -> Rows:
    import datasets
    import pyarrow.parquet

    try:
        table = pyarrow.concat_tables(pyarrow.parquet.read_table(str(path), memory_map=True)
                                      for path in paths)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{paths[0]} cannot be read as parquet: {_first_line(error)}") from None
    return datasets.Dataset(table)


def _read_hub(source: str, split: str, config: str | None) -> Rows:
    import datasets

    # Without a network the hub's client retries for half a minute and logs each attempt.
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        return datasets.load_dataset(source, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source!r} is no file or folder here, and split {split} of it could not "
                        f"be had from the hub ({_first_line(error)}): name a local file or folder, "
                        "or check the name and the network") from None
    finally:
        client.setLevel(level)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
