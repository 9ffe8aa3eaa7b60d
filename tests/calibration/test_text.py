import gzip
import json
import logging
import subprocess
import sys

import pytest
import torch

from bitlm.calibration.text import TextError, check_ids, read_texts, token_windows
from tests.tiny import SPECIAL, TEXT, make_tokenizer

LINES = [{"text": "one", "other": "ONE"}, {"text": "two"}, {"text": " "}, {"text": "three"}]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def test_a_text_file_is_one_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first\n\nsecond é\n", "utf-8")
    assert read_texts(path) == ["first\n\nsecond é\n"]
    zipped = tmp_path / "a.txt.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read_texts(zipped) == read_texts(str(path))


def test_json_records_are_texts_of_their_own(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", LINES)
    assert read_texts(path) == ["one", "two", "three"]
    assert read_texts(path, limit=2) == ["one", "two"]
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps(LINES))
    assert read_texts(listed) == ["one", "two", "three"]
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read_texts(zipped) == ["one", "two", "three"]
    assert read_texts(jsonl(tmp_path / "b.jsonl", ["one", "two"])) == ["one", "two"]


def test_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]}).to_parquet(str(path))
    assert read_texts(path) == ["one", "two"]
    with pytest.raises(TextError, match="fields are: text, n"):
        read_texts(path, field="body")
    path.write_bytes(b"PAR1 broken")
    with pytest.raises(TextError, match="cannot be read as parquet"):
        read_texts(path)


def test_missing_field_names_line_and_fields(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", LINES)
    with pytest.raises(TextError, match=r"a.jsonl, line 2: no field 'other'; the fields are: text"):
        read_texts(path, field="other")
    with pytest.raises(TextError, match="line 1: field 'text' is no text but int"):
        read_texts(jsonl(tmp_path / "b.jsonl", [{"text": 3}]))
    with pytest.raises(TextError, match="line 1: neither an object nor a text"):
        read_texts(jsonl(tmp_path / "c.jsonl", [[1]]))
    path.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(TextError, match="line 2: no JSON"):
        read_texts(path)


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"", "is empty"),
    ("a.txt", b" \n\n", "holds no text"),
    ("a.txt", b"caf\xe9", r"not UTF-8 text \(byte 3\)"),
    ("a.txt.gz", b"no gzip", "cannot be decompressed"),
    ("a.jsonl", b'{"text": ""}\n', "holds no text"),
])
def test_files_that_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=words):
        read_texts(tmp_path / name)


def test_places_that_are_refused(tmp_path):
    with pytest.raises(TextError, match="is a folder"):
        read_texts(tmp_path)
    for missing in (tmp_path / "x", "x.txt", "./x", "a/b/c"):
        with pytest.raises(TextError, match="no such file"):
            read_texts(missing)


def test_a_hub_id_without_network_is_one_line():
    pytest.importorskip("datasets")
    for source in ("some/dataset", "some/dataset:config:test", "dataset"):
        with pytest.raises(TextError, match="name a local text or jsonl file") as caught:
            read_texts(source)
        assert "\n" not in str(caught.value)


def test_a_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squad").write_text("a local file")
    assert read_texts("squad") == ["a local file"]


def test_windows_join_the_texts_each_with_its_bos():
    tokenizer = make_tokenizer()
    windows = token_windows(tokenizer, ["abc", "defgh"], 5)
    joined = tokenizer("abc")["input_ids"] + tokenizer("defgh")["input_ids"]
    assert windows.dtype == torch.int64
    assert windows.tolist() == [joined[:5], joined[5:10]]
    assert joined[4] == 1
    plain = token_windows(make_tokenizer(bos=False), ["abc", "de"], 5)
    assert (plain >= len(SPECIAL)).all()


def test_windows_by_count_are_drawn_by_seed():
    tokenizer = make_tokenizer()
    everything = token_windows(tokenizer, [TEXT], 16)
    first = token_windows(tokenizer, [TEXT], 16, 5, seed=None)
    assert torch.equal(first, everything[:5])
    drawn = token_windows(tokenizer, [TEXT], 16, 5, seed=3)
    assert torch.equal(drawn, token_windows(tokenizer, [TEXT], 16, 5, seed=3))
    assert not torch.equal(drawn, token_windows(tokenizer, [TEXT], 16, 5, seed=4))
    rows = everything.tolist()
    assert all(row in rows for row in drawn.tolist())


def test_of_many_texts_no_more_are_tokenised_than_needed():
    tokenizer = make_tokenizer()
    seen = []

    def counting(texts, **options):
        seen.extend(texts)
        return tokenizer(texts, **options)

    texts = [f"text number {i}" for i in range(2000)]
    windows = token_windows(counting, texts, 16, 10, seed=0)
    assert windows.shape == (10, 16)
    assert len(seen) < 500
    assert torch.equal(windows, token_windows(tokenizer, texts, 16, 10, seed=0))
    assert token_windows(tokenizer, texts, 16, 10, seed=None)[0].tolist() != windows[0].tolist()


def test_too_short_a_text_says_how_much_is_needed():
    tokenizer = make_tokenizer()
    with pytest.raises(TextError, match=r"has 4 tokens, 8 are needed \(1 x 8\)"):
        token_windows(tokenizer, ["abc"], 8)
    with pytest.raises(TextError, match=r"40 are needed \(5 x 8\)"):
        token_windows(tokenizer, ["abcdefghijk"], 8, 5)
    with pytest.raises(TextError, match="at least 2"):
        token_windows(tokenizer, [TEXT], 1)
    with pytest.raises(TextError, match="at least 1"):
        token_windows(tokenizer, [TEXT], 8, 0)


def test_long_texts_give_no_warning(caplog, recwarn):
    tokenizer = make_tokenizer()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        token_windows(tokenizer, [TEXT * 3], 16)
    assert not caplog.records and not recwarn.list


def test_ids_beyond_the_vocabulary_are_named():
    tokenizer = make_tokenizer()
    ids = token_windows(tokenizer, [TEXT], 16)
    check_ids(ids, 300, tokenizer)
    largest = int(ids.max())
    with pytest.raises(TextError, match=rf"token {largest} \('.*'\), the model only {largest} "):
        check_ids(ids, largest, tokenizer)
    with pytest.raises(TextError, match="does not belong"):
        check_ids(ids, 10)


def test_reading_a_text_file_does_not_import_datasets(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    code = ("import sys; from bitlm.calibration.text import read_texts; "
            f"read_texts({str(tmp_path / 'a.txt')!r}); sys.exit('datasets' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
