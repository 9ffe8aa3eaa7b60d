import json
import shutil

import pytest

from bitlm.evaluate.card import COLUMNS, HEADING, add_measurement
from tests.tiny import make_llama


def test_perplexity_as_table_and_json(run, zoo, tmp_path):
    result = run("evaluate", zoo / "llama", "--data", zoo / "text.txt", "--context", 64, "--json",
                 tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout and "x 64 tokens" in result.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens"] == found["windows"] * 63
    assert found["perplexity"] > 1
    assert "kl" not in found


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
    (["--task", "glue/sst2"], 2, "the tasks are perplexity"),
    ([], 2, "name a text: --data"),
    (["--data", "missing.txt"], 1, "no such file: missing.txt"),
    (["--data", "TEXT", "--context", "100000"], 1, "100000 are needed"),
    (["--data", "TEXT", "--context", "200"], 1, "reads at most 128"),
    (["--data", "TEXT", "--json", "missing/out.json"], 1, "missing: no such folder"),
    (["--data", "TEXT", "--against", "BERT"], 1, "no causal language model"),
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


def test_card_keeps_what_stands_behind_the_table():
    row = {"Task": "perplexity", "Data": "a.txt"}
    card = f"# model\n\n{HEADING}\n\n## Layers\n\n| x |\n"
    changed = add_measurement(add_measurement(card, row), row)
    assert changed.endswith("\n\n## Layers\n\n| x |\n")
    assert changed.count("a.txt") == 1
    assert add_measurement("", row).startswith(HEADING)
