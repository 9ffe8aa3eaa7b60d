import json
import shutil

import pytest

from bitlm.evaluate.card import COLUMNS, HEADING, add_measurement
from tests.evaluate import models
from tests.tiny import make_bert, make_llama


def test_perplexity_as_table_and_json(run, zoo, tmp_path):
    result = run("evaluate", zoo / "llama", "--data", zoo / "text.txt", "--context", 64, "--json",
                 tmp_path / "out.json", "--resamples", 50, "--predictions", tmp_path / "nll.jsonl")
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.stdout and "peak memory" in result.stdout
    assert "perplexity" in result.stdout and "x 64 tokens" in result.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == found["windows"] * 63
    assert 1 < found["low"] < found["perplexity"] < found["high"]
    assert "kl" not in found and "by_window" not in found
    lines = [json.loads(line) for line in (tmp_path / "nll.jsonl").read_text().splitlines()]
    assert [line["window"] for line in lines] == list(range(1, found["windows"] + 1))
    assert sum(line["nll"] for line in lines) / len(lines) == pytest.approx(found["nll"])


def test_against_the_dense_model_goes_to_the_card_once(run, zoo, tmp_path):
    packed = tmp_path / "packed"
    shutil.copytree(zoo / "packed", packed)
    for _ in range(2):
        result = run("evaluate", packed, "--data", zoo / "text.txt", "--windows", 3, "--against",
                     zoo / "llama")
        assert result.exit_code == 0, result.output
    assert "top-1 agreement" in result.stdout
    card = (packed / "README.md").read_text()
    assert card.count(HEADING) == 1
    assert card.count("| perplexity | text.txt | 128 | 381 |") == 1


def test_each_activation_mode_has_its_row(run, zoo, tmp_path):
    packed = shutil.copytree(zoo / "packed", tmp_path / "packed")
    for mode in (None, "int8", "int8"):
        result = run("evaluate", packed, "--task", "perplexity", "--data", zoo / "text.txt",
                     "--windows", 2, "--against", zoo / "llama", "--json", tmp_path / "out.json",
                     *(("--activation", mode) if mode else ()))
        assert result.exit_code == 0, result.output
        assert (mode or "float") in result.stdout
        assert json.loads((tmp_path / "out.json").read_text())["activations"] == (mode or "float")
    card = (packed / "README.md").read_text()
    assert [f"| 254 | {mode} |" in card for mode in ("float", "int8")] == [True, True]
    assert card.count("| perplexity | text.txt |") == 2


def test_a_dense_folder_gets_no_card(run, zoo):
    run("evaluate", zoo / "llama", "--data", zoo / "text.txt", "--windows", 1)
    assert not (zoo / "llama" / "README.md").exists()


@pytest.mark.parametrize("options, code, words", [
    (["--task", "glue/nothing"], 2, "the tasks are perplexity"),
    (["--task", "summarization"], 2, "name the data of summarization"),
    (["--task", "xsum", "--context", "64"], 2, "xsum takes no --context"),
    (["--data", "TEXT", "--beams", "2"], 2, "perplexity takes no --beams"),
    (["--task", "xsum", "--columns", "document"], 2, "expected FIELD=COLUMN"),
    (["--task", "xsum", "--data", "missing.jsonl"], 1, "no such file or folder: missing.jsonl"),
    (["--task", "xsum", "--data", "TEXT"], 1, "neither json, jsonl, csv nor parquet"),
    (["--task", "translation", "--data", "TEXT"], 1, "neither json, jsonl, csv nor parquet"),
    (["--task", "xsum", "--predictions", "missing/out.jsonl"], 1, "missing: no such folder"),
    ([], 2, "name a text: --data"),
    (["--data", "missing.txt"], 1, "no such file: missing.txt"),
    (["--data", "TEXT", "--context", "100000"], 1, "100000 are needed"),
    (["--data", "TEXT", "--context", "200"], 1, "reads at most 128"),
    (["--data", "TEXT", "--json", "missing/out.json"], 1, "missing: no such folder"),
    (["--data", "TEXT", "--against", "BERT"], 1, "no causal language model"),
    (["--data", "TEXT", "--device", "gpu"], 1, "no device 'gpu' here: leave --device out"),
])
def test_what_is_refused(run, zoo, options, code, words):
    places = {"TEXT": zoo / "text.txt", "BERT": zoo / "bert"}
    result = run("evaluate", zoo / "llama", *[places.get(option, option) for option in options])
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_another_models_tokenizer_is_noticed(run, zoo, tmp_path):
    small = make_llama(tmp_path / "small", vocab_size=60)
    result = run("evaluate", small, "--data", zoo / "text.txt")
    assert result.exit_code == 1
    assert "only 60 embeddings" in result.stderr


@pytest.fixture(scope="module")
def glue_zoo(tmp_path_factory):
    """A dense classifier of two classes, a packed one, and data of three tasks."""
    from bitlm.quantize import quantize

    folder = tmp_path_factory.mktemp("glue")
    make_bert(folder / "dense", labels=2, initializer_range=0.5)
    quantize(folder / "dense", out=folder / "packed", measure_verdict=False)
    for task, fields in (("sst2", ["sentence"]), ("mrpc", ["sentence1", "sentence2"]),
                         ("mnli", ["premise", "hypothesis"])):
        (folder / "data" / task).mkdir(parents=True)
        rows = [dict.fromkeys(fields, "a word " * (1 + i % 4)) | {"label": i % 2}
                for i in range(9)]
        (folder / "data" / task / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_glue_against_the_dense_model(run, glue_zoo, tmp_path):
    packed = shutil.copytree(glue_zoo / "packed", tmp_path / "packed")
    out, written = tmp_path / "out.json", tmp_path / "rows.jsonl"
    for _ in range(2):
        result = run("evaluate", packed, "--task", "glue/sst2", "--data", glue_zoo / "data",
                     "--against", glue_zoo / "dense", "--json", out, "--predictions", written,
                     "--resamples", 20, "--limit", 8, "--batch-size", 3)
        assert result.exit_code == 0, result.output
    assert "accuracy" in result.stdout and "difference" in result.stdout
    found = json.loads(out.read_text())
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert found["rows"] == len(rows) == 8 and found["split"] == "validation"
    right = sum(row["prediction"] == row["label"] for row in rows)
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(right / 8)
    same = sum(row["prediction"] == row["dense"] for row in rows)
    assert found["agreement"] == pytest.approx(same / 8)
    assert found["activations"].startswith("float") and found["transformers"]
    card = (packed / "README.md").read_text()
    assert card.count("| glue/sst2 | sst2 validation, 8 rows |") == 1
    assert not list(tmp_path.glob(".*.part"))
    result = run("evaluate", packed, "--task", "glue/sst2", "--data", glue_zoo / "data",
                 "--json", out, "--predictions", out)
    assert result.exit_code == 2 and "give each a file of its own" in result.stderr


def test_all_glue_tasks_that_a_model_is_for(run, glue_zoo, tmp_path):
    result = run("evaluate", glue_zoo / "dense", "--task", "glue", "--data", glue_zoo / "data",
                 "--resamples", 10, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert [each["task"] for each in found["results"]] == ["glue/sst2", "glue/mrpc"]
    assert "mnli needs 3" in found["skipped"]["glue/mnli"]
    assert "average of 2 tasks" in result.stdout


def test_a_folder_with_a_model_for_each_task(run, glue_zoo, tmp_path):
    shutil.copytree(glue_zoo / "dense", tmp_path / "models" / "sst2")
    make_bert(tmp_path / "models" / "mnli", labels=3)
    shutil.copytree(glue_zoo / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "mrpc")
    result = run("evaluate", tmp_path / "models", "--task", "glue", "--data", tmp_path / "data",
                 "--resamples", 0, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert [each["task"] for each in found["results"]] == ["glue/sst2", "glue/mnli"]
    assert found["skipped"] == {}
    shutil.rmtree(tmp_path / "models" / "mnli")
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "out.json")
    result = run("evaluate", tmp_path / "models", "--task", "glue", "--data", glue_zoo / "data",
                 "--resamples", 0, "--json", link, "--against", glue_zoo / "dense")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())  # what the link points to
    assert link.is_symlink() and list(found["skipped"]) == ["glue/mrpc", "glue/mnli"]
    assert list(found["dense_skipped"]) == ["glue/mnli"] and "average" not in found


def test_averages_are_of_the_tasks_that_both_have(run, glue_zoo, tmp_path):
    for name in ("sst2", "mrpc"):
        shutil.copytree(glue_zoo / "dense", tmp_path / "models" / name)
    make_bert(tmp_path / "models" / "mnli", labels=3)
    result = run("evaluate", tmp_path / "models", "--task", "glue", "--data", glue_zoo / "data",
                 "--resamples", 10, "--json", tmp_path / "out.json", "--against",
                 glue_zoo / "dense")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["results"]) == 3 and "average of 2 tasks" in result.stdout
    assert found["average_of"] == ["glue/sst2", "glue/mrpc"]
    assert found["average"] == found["dense_average"]
    assert found["average_difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_model_of_another_task_is_refused(run, glue_zoo):
    result = run("evaluate", glue_zoo / "dense", "--task", "glue/mnli", "--data",
                 glue_zoo / "data")
    assert result.exit_code == 1 and "has 2 outputs, mnli needs 3" in result.stderr


@pytest.fixture(scope="module")
def bart_folder(tmp_path_factory):
    return models.save(models.bart(), tmp_path_factory.mktemp("bart") / "bart")


def test_summaries_beside_the_lead(run, bart_folder, tmp_path):
    pytest.importorskip("rouge_score")
    rows = [{"text": f"The cat {i} sat. It ran.", "tldr": f"A cat {i} sat."} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("evaluate", bart_folder, "--task", "xsum", "--data", tmp_path / "data.jsonl",
                 "--columns", "document=text,summary=tldr", "--beams", 2, "--max-length", 14,
                 "--predictions", tmp_path / "rows.jsonl", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "lead-1" in result.stdout and "rougeLsum" in result.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["beams"], found["min_length"], found["max_length"]) == (2, 11, 14)
    assert found["baselines"]["lead-1"]["rouge1"] == pytest.approx(75)
    assert found["tokens_per_second"] > 0 and found["mean_length"] <= 13
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


def test_translations_beside_the_copy(run, bart_folder, tmp_path):
    pytest.importorskip("sacrebleu")
    rows = [{"en": "The cat sat.", "ro": "Pisica stă."}, {"en": "Yes", "ro": "Da"}]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("evaluate", bart_folder, "--task", "translation", "--data", tmp_path,
                 "--source", "en", "--target", "ro", "--beams", 1, "--max-length", 9)
    assert result.exit_code == 0, result.output
    assert "copy" in result.stdout and "bleu signature" in result.stdout and "tok:13a" in (
        result.stdout)
    result = run("evaluate", bart_folder, "--task", "translation", "--data", tmp_path)
    assert result.exit_code == 2 and "--source en --target ro" in result.stderr


def test_a_dense_model_that_is_not_there_shows_at_once(run, glue_zoo, tmp_path):
    result = run("evaluate", glue_zoo / "dense", "--task", "glue/sst2", "--data",
                 glue_zoo / "data", "--against", tmp_path / "missing", "--predictions",
                 tmp_path / "rows.jsonl")
    assert result.exit_code == 1 and "missing does not exist" in result.stderr
    assert not (tmp_path / "rows.jsonl").exists()
    (tmp_path / "empty").mkdir()
    result = run("evaluate", glue_zoo / "dense", "--task", "glue/sst2", "--data",
                 glue_zoo / "data", "--against", tmp_path / "empty")
    assert result.exit_code == 1 and "empty has no config.json" in result.stderr
    assert "accuracy" not in result.stdout


def test_card_rows_are_added_and_replaced():
    row = {"Task": "perplexity", "Data": "a.txt", "Context": "64", "Perplexity": "9.5"}
    card = "# model\n\nsome words\n"
    once = add_measurement(card, row)
    assert once.startswith(card) and once.endswith("\n")
    assert add_measurement(once, row) == once
    both = add_measurement(once, row | {"Data": "b|c.txt"})
    assert both.count("| perplexity |") == 2 and "b/c.txt" in both
    again = add_measurement(both, row | {"Perplexity": "8.0"})
    assert "9.5" not in again.split("b/c.txt")[0] and again.count("| perplexity |") == 2
    assert again.count("| Task |") == 1
    assert all(line.count("|") == len(COLUMNS) + 1 for line in again.splitlines() if "|" in line)


def test_a_table_without_a_column_gets_it():
    card = f"{HEADING}\n\n| Task | Data | Perplexity |\n|---|---|---|\n| a | b | 7.5 |\n"
    changed = add_measurement(card, {"Task": "a", "Data": "b", "Activations": "int8"})
    rows = [line.split(" | ") for line in changed.splitlines() if line.startswith("| a")]
    assert len(rows) == 2 and {len(row) for row in rows} == {len(COLUMNS)}
    assert rows[0][COLUMNS.index("Perplexity")] == "7.5"
    assert rows[1][COLUMNS.index("Activations")] == "int8"


def test_an_older_card_takes_scores():
    card = f"{HEADING}\n\n| Task | Data | Perplexity |\n|---|---|---|\n| a | b | 7.5 |\n"
    changed = add_measurement(card, {"Task": "glue/sst2", "Data": "sst2", "Scores": "accuracy 0.9"})
    rows = [line.strip("|").split("|") for line in changed.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {len(COLUMNS)}
    assert rows[-1][COLUMNS.index("Scores")].strip() == "accuracy 0.9"
    assert rows[2][COLUMNS.index("Perplexity")].strip() == "7.5"


def test_card_keeps_what_stands_behind_the_table():
    row = {"Task": "perplexity", "Data": "a.txt"}
    card = f"# model\n\n{HEADING}\n\n## Layers\n\n| x |\n"
    changed = add_measurement(add_measurement(card, row), row)
    assert changed.endswith("\n\n## Layers\n\n| x |\n")
    assert changed.count("a.txt") == 1
    assert add_measurement("", row).startswith(HEADING)
