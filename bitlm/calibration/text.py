"""Text for calibration and evaluation: files and hub ids -> texts -> windows of tokens."""

from __future__ import annotations

import gzip
import json
import logging
import random
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz")
_BATCH = 256  # texts tokenised in one call
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")


class TextError(ValueError):
    """Text that cannot be used: the message says what was found and what to do."""


def read_texts(source: str | Path, *, field: str = "text", split: str = "train",
               limit: int | None = None) -> list[str]:
    """Return the texts of a file or of a hub dataset, at most `limit`, empty ones left out.

    A path that exists wins over a hub id. A `.txt` file is one text, so that perplexity sees one
    continuous stream of tokens; `.jsonl`, `.json` and `.parquet` hold one text a record, in
    `field`; `.gz` files are decompressed. A hub id is `id`, `id:config` or `id:config:split`.
    Raises TextError naming what is wrong, with the line number and the fields that there are.
    """
    path = Path(source)
    if path.is_dir():
        raise TextError(f"{source} is a folder: name one text file in it "
                        f"({', '.join(SUFFIXES)})")
    if path.exists():
        found = _read_file(path, field)
    elif _looks_like_path(str(source)):
        raise TextError(f"no such file: {source}")
    else:
        found = _read_hub(str(source), field, split, limit)
    texts = list(islice((text for text in found if text.strip()), limit))
    if not texts:
        raise TextError(f"{source} holds no text")
    return texts


def token_windows(tokenizer: Any, texts: list[str], length: int, count: int | None = None,
                  seed: int | None = 0) -> Tensor:
    """Return non-overlapping windows of tokens, int64 [n, length].

    The texts are tokenised one by one, with the special tokens that the tokenizer adds to each,
    and joined to one stream. Without `count` all full windows are returned, in order. With it
    `count` windows: the first ones where `seed` is None, else drawn at random over the whole
    text, the same for the same seed. Of many texts no more are tokenised than are needed.
    Raises TextError when the text is too short.
    """
    if length < 2:
        raise TextError(f"windows of {length} tokens: a window needs at least 2")
    if count is not None and count < 1:
        raise TextError(f"{count} windows asked for: ask for at least 1")
    draw = random.Random(seed) if count is not None and seed is not None else None
    if draw:
        texts = draw.sample(texts, len(texts))
    enough = None if count is None else count * length
    ids, complete = _stream(tokenizer, texts, enough)
    windows = ids[:ids.numel() // length * length].view(-1, length)
    needed = length * (count or 1)
    if ids.numel() < needed:
        raise TextError(f"the text has {ids.numel()} tokens, {needed} are needed "
                        f"({count or 1} x {length}): use a longer text or fewer tokens")
    if count is None:
        return windows
    if draw and complete:
        windows = windows[sorted(draw.sample(range(len(windows)), count))]
    return windows[:count].clone()


def check_ids(ids: Tensor, vocab_size: int, tokenizer: Any = None) -> None:
    """Raise TextError when a token id does not exist in a model with `vocab_size` embeddings."""
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= vocab_size:
        name = f" ({tokenizer.convert_ids_to_tokens(largest)!r})" if tokenizer is not None else ""
        raise TextError(f"the text has token {largest}{name}, the model only {vocab_size} "
                        "embeddings: this tokenizer does not belong to this model")


def _stream(tokenizer: Any, texts: list[str], enough: int | None) -> tuple[Tensor, bool]:
    """Return the ids of the joined texts, and whether all texts were tokenised.

    Of a single text all of it, of several as many as give `enough` ids.
    """
    ids: list[int] = []
    for start in range(0, len(texts), _BATCH):
        if enough is not None and len(ids) >= enough:
            return torch.tensor(ids), False
        batch = tokenizer(texts[start:start + _BATCH], add_special_tokens=True, truncation=False,
                          return_attention_mask=False, verbose=False)
        for text_ids in batch["input_ids"]:
            ids += text_ids
    return torch.tensor(ids, dtype=torch.int64), True


def _looks_like_path(source: str) -> bool:
    return source.lower().endswith(SUFFIXES) or not _HUB_ID.fullmatch(source)


def _read_file(path: Path, field: str) -> Iterator[str]:
    name = path.name.lower()
    if path.is_file() and path.stat().st_size == 0:  # a pipe has no size
        raise TextError(f"{path} is empty")
    if name.endswith(".parquet"):
        return _read_parquet(path, field)
    text = _decode(path)
    plain = name.removesuffix(".gz")
    if plain.endswith(".jsonl"):
        return _json_lines(path, text, field)
    if plain.endswith(".json"):
        return _json_file(path, text, field)
    return iter([text])


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or name "
                        "another file") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise TextError(f"{path} cannot be decompressed: {error}") from None


def _json_lines(path: Path, text: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise TextError(f"{path}, line {number}: no JSON ({error.msg})") from None
            yield _text_of(record, field, f"{path}, line {number}")


def _json_file(path: Path, text: str, field: str) -> Iterator[str]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError:
        return _json_lines(path, text, field)
    if not isinstance(records, list):
        records = [records]
    return (_text_of(r, field, f"{path}, record {i}") for i, r in enumerate(records, 1))


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import datasets
    import pyarrow

    try:
        rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetGenerationError) as error:
        raise TextError(f"{path} cannot be read as parquet: {_first_line(error)}") from None
    return _records(rows, field, str(path))


def _read_hub(source: str, field: str, split: str, limit: int | None) -> Iterator[str]:
    import datasets

    name, _, rest = source.partition(":")
    config, _, own_split = rest.partition(":")
    # Without a network the hub's client retries for half a minute and logs each attempt.
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        rows = datasets.load_dataset(name, config or None, split=own_split or split,
                                     streaming=limit is not None)
        return iter(list(islice(_records(rows, field, source), limit)))
    except TextError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise TextError(f"{source!r} is no file here, and as a dataset of the hub it could not be "
                        f"read ({_first_line(error)}): name a local text or jsonl file, or check "
                        "the name and the network") from None
    finally:
        client.setLevel(level)


def _records(rows: Iterable[dict], field: str, name: str) -> Iterator[str]:
    return (_text_of(row, field, f"{name}, row {i}") for i, row in enumerate(rows, 1))


def _text_of(record: Any, field: str, where: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise TextError(f"{where}: neither an object nor a text")
    if field not in record:
        keys = ", ".join(map(str, record)) or "none"
        raise TextError(f"{where}: no field {field!r}; the fields are: {keys} (choose one with "
                        "--field)")
    if not isinstance(record[field], str):
        raise TextError(f"{where}: field {field!r} is no text but "
                        f"{type(record[field]).__name__}")
    return record[field]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
