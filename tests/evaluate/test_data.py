import csv
import gzip
import json

import pytest

from bitlm.evaluate.data import (
    DataError,
    choose_split,
    load_split,
    pick_column,
    renamed,
    splits,
    texts,
)

ROWS = [{"sentence": f"text {i}, \"é\"\nmore", "label": i % 2} for i in range(5)]


def write(path, rows=ROWS):
    text = "\n".join(json.dumps(row) for row in rows) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.jsonl.gz"])
def test_json_files(tmp_path, name):
    assert load_split(write(tmp_path / name)) == ROWS
    assert load_split(tmp_path / name, "train", limit=2) == ROWS[:2]


def test_a_json_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    assert load_split(tmp_path / "a.json") == ROWS


def test_csv_keeps_commas_quotes_and_newlines(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["sentence", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    assert [row["sentence"] for row in load_split(tmp_path / "a.csv")] == [
        row["sentence"] for row in ROWS]


def test_parquet_in_shards(tmp_path):
    pytest.importorskip("datasets")
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for shard, rows in enumerate((ROWS[:3], ROWS[3:])):
        parquet.write_table(pa.Table.from_pylist(rows),
                            tmp_path / f"train-0000{shard}-of-00002.parquet")
    found = load_split(tmp_path, "train")
    assert list(found) == ROWS and found[4] == ROWS[4]
    assert list(load_split(tmp_path, "train", limit=4)) == ROWS[:4]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_split(tmp_path / "bad.parquet")


def test_folders_name_their_splits(tmp_path):
    for name in ("dev", "train", "test"):
        write(tmp_path / f"{name}.jsonl", [{"split": name}])
    (tmp_path / "notes.jsonl").write_text("{}")
    assert list(splits(tmp_path)) == ["train", "validation", "test"]
    for asked in ("validation", "dev"):
        assert load_split(tmp_path, asked) == [{"split": "dev"}]
    assert choose_split(tmp_path, ("test", "validation")) == "test"
    assert choose_split(tmp_path / "dev.jsonl", ("test",)) == ""
    assert choose_split("some/id", ("test", "validation")) == "test"


def test_folders_of_the_hub(tmp_path):
    write(tmp_path / "mnli" / "dev_matched.jsonl")
    write(tmp_path / "mnli" / "validation_mismatched.jsonl")
    assert list(splits(tmp_path, "mnli")) == ["validation_matched", "validation_mismatched"]
    assert load_split(tmp_path, "dev_mismatched", "mnli") == ROWS
    write(tmp_path / "x" / "data" / "test.jsonl")
    assert load_split(tmp_path / "x", "test") == ROWS


def test_what_is_refused(tmp_path, monkeypatch):
    def refused(words, *args, call=load_split):
        with pytest.raises(DataError, match=words) as caught:
            call(*args)
        assert "\n" not in str(caught.value)

    refused("no such file or folder: none.jsonl", "none.jsonl")
    refused("no such file or folder", "/nowhere/at/all")
    refused("no file of a split", tmp_path)
    write(tmp_path / "train.jsonl")
    refused("no split validation: it has train", tmp_path)
    refused("has no test or validation split", tmp_path, ("test", "validation"), call=choose_split)
    (tmp_path / "empty.jsonl").write_text("\n")
    refused("holds no rows", tmp_path / "empty.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a": \n')
    refused("line 2: no JSON", tmp_path / "broken.jsonl")
    (tmp_path / "list.jsonl").write_text('{"a": 1}\n3\n')
    refused("row 2: no object but int", tmp_path / "list.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    refused("is not UTF-8", tmp_path / "latin.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-6])
    refused("cannot be decompressed", tmp_path / "cut.jsonl.gz")
    (tmp_path / "a.xlsx").write_text("x")
    refused("neither json, jsonl, csv nor parquet", tmp_path / "a.xlsx")
    refused("no column premise or text .the document.: the columns are sentence, label", ROWS,
            ("premise", "text"), "the document", call=pick_column)
    refused("row 2: 'a' is no text but NoneType", [{"a": "x"}, {"a": None}], "a", call=texts)
    refused("no field 'sentense': the fields are sentence", {"sentense": "a"}, ("sentence",),
            call=renamed)


def test_a_hub_that_cannot_be_reached(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*args, **options):
        raise ConnectionError("offline mode\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="no file or folder here.*offline mode"):
        load_split("nyu-mll/glue", "validation", "sst2")


def test_two_files_of_one_split_are_refused(tmp_path):
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n')
    assert list(splits(tmp_path)) == ["train", "validation"]
    (tmp_path / "validation.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="dev.jsonl and validation.jsonl are both of one split"):
        splits(tmp_path)


def test_a_long_cell_and_a_damaged_archive(tmp_path):
    (tmp_path / "long.csv").write_text("a,b\n" + "x" * 200_000 + ",1\n")
    assert len(load_split(tmp_path / "long.csv")[0]["a"]) == 200_000
    whole = gzip.compress(b'{"a": 1}\n' * 100)
    (tmp_path / "bad.jsonl.gz").write_bytes(whole[:20] + b"\xff" * 10 + whole[30:])
    with pytest.raises(DataError, match="bad.jsonl.gz cannot be decompressed"):
        load_split(tmp_path / "bad.jsonl.gz")


def test_the_hub_gets_id_config_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(load_split("nyu-mll/glue", "validation", "sst2", limit=2)) == ROWS[:2]
    assert asked == [(("nyu-mll/glue", "sst2"), {"split": "validation"})]
