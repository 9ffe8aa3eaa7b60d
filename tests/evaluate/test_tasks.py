import json

import pytest

from bitlm.evaluate import outcome, tasks
from bitlm.evaluate.data import DataError
from bitlm.evaluate.generation import Settings
from bitlm.evaluate.result import Result, Score
from bitlm.evaluate.tasks import Options, TaskError, Work, find, prepare


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


SST2 = [{"sentence": "good", "label": 1}, {"sentence": "bad", "label": 0}]


def test_the_papers_beam_settings():
    assert find("xsum").settings == Settings(6, 1.0, 11, 62)
    assert find("cnn_dailymail").settings == Settings(4, 2.0, 56, 142)
    assert (find("wmt16/en-ro").data, find("wmt16/en-ro").config) == ("wmt/wmt16", "ro-en")
    assert find("glue/mnli").splits == ("validation_matched", "validation_mismatched")
    assert find("lm:arc_easy").kind == "harness"


@pytest.mark.parametrize("name", ["glue/nothing", "lm:", "rouge"])
def test_unknown_tasks(name):
    with pytest.raises(TaskError, match="the tasks are perplexity, glue, glue/cola"):
        find(name)


def test_a_folder_of_tasks_is_one_work_each(tmp_path, caplog):
    write(tmp_path / "sst2" / "dev.jsonl", SST2)
    write(tmp_path / "MNLI" / "dev_matched.jsonl", [
        {"premise": "a", "hypothesis": "b", "label": 0}])
    work = prepare(find("glue"), str(tmp_path))
    assert [(each.task, each.split) for each in work] == [
        ("glue/sst2", "validation"), ("glue/mnli", "validation_matched")]
    assert [record.getMessage().partition(" has ")[2] for record in caplog.records] == [
        "no validation_mismatched: the score of mnli is that of one half"]
    # The folder of all tasks, the folder of one and its file are the same task.
    for place in (tmp_path, tmp_path / "sst2", tmp_path / "sst2" / "dev.jsonl"):
        work, = prepare(find("glue/sst2"), str(place))
        assert work.task == "glue/sst2"
    with pytest.raises(DataError, match="holds no folder of a GLUE task"):
        prepare(find("glue"), str(tmp_path / "sst2"))


def test_a_task_without_a_validation_split(tmp_path):
    write(tmp_path / "sst2" / "train.jsonl", SST2)
    with pytest.raises(DataError, match="has no validation split: it has train"):
        prepare(find("glue/sst2"), str(tmp_path))
    work, = prepare(find("glue/sst2"), str(tmp_path), Options(split="train"))
    assert work.split == "train"


def test_bad_rows_show_before_a_model_is_loaded(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"document": "a", "summary": ""}])
    with pytest.raises(DataError, match="row 1: the reference"):
        prepare(find("xsum"), data)
    data = write(tmp_path / "b.jsonl", [{"sentence": "a", "label": 7}])
    with pytest.raises(DataError, match="row 1: label 7"):
        prepare(find("glue/cola"), data)
    data = write(tmp_path / "c.jsonl", [{"en": "a", "ro": ""}])
    with pytest.raises(DataError, match="row 1: the reference"):
        prepare(find("wmt16/en-ro"), data)


def test_the_test_split_comes_first(tmp_path):
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.jsonl", [{"document": name, "summary": "b"}])
    assert prepare(find("summarization"), str(tmp_path))[0].split == "test"
    (tmp_path / "test.jsonl").unlink()
    assert prepare(find("summarization"), str(tmp_path))[0].split == "validation"


@pytest.mark.parametrize("name, options, words", [
    ("glue/sst2", Options(beams=2), "glue/sst2 takes no --beams"),
    ("lm:x", Options(max_length=3), "lm:x takes no --max-length"),
    ("summarization", Options(), "name the data of summarization"),
    ("summarization", Options(source="en"), "takes no --source"),
])
def test_options_that_do_not_belong(name, options, words):
    with pytest.raises(TaskError, match=words):
        prepare(find(name), "", options)


def test_languages_are_needed(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"en": "a", "ro": "b"}])
    with pytest.raises(TaskError, match="--source en --target ro"):
        prepare(find("translation"), data, Options(source="en"))
    assert prepare(find("translation"), data, Options(source="en:eng_Latn", target="ro"))
    with pytest.raises(TaskError, match="takes no --data"):
        prepare(find("lm:x"), data)


def results(*values, task="glue/sst2"):
    work = Work(task, "data", "validation", lambda *_: [])
    return [(work, Result(task, {"accuracy": Score(value, value - .1, value + .1)}, "accuracy",
                          {"rows": 2, "seconds": 1.0, "peak_bytes": 5 << 20},
                          [{"row": 1, "prediction": 1}, {"row": 2, "prediction": int(value > .5)}]))
            for value in values]


def test_one_result_is_flat():
    found = outcome.Outcome("packed", results(0.75), activations="int8 (W1A8)")
    dense = outcome.Outcome("dense", results(0.5))
    data = outcome.to_dict(found, "glue/sst2", dense)
    assert data["metrics"] == {"accuracy": {"value": 0.75, "low": 0.65, "high": 0.85}}
    assert data["difference"] == {"accuracy": {"value": 0.25}} and data["agreement"] == 0.5
    assert data["dense"]["metrics"]["accuracy"]["value"] == 0.5
    assert data["activations"] == "int8 (W1A8)" and data["split"] == "validation"
    heading, rows = outcome.table(found, dense)
    assert heading == ("", "packed", "dense", "difference")
    assert ("accuracy", "0.7500 [0.6500, 0.8500]", "0.5000 [0.4000, 0.6000]", "+0.2500") in rows
    assert {len(row) for row in rows} == {4}
    assert outcome.card_rows(found, dense) == [{
        "Task": "glue/sst2", "Data": "data validation, 2 rows", "Activations": "int8 (W1A8)",
        "Scores": "accuracy 0.7500 [0.6500, 0.8500]",
        "Dense scores": "accuracy 0.5000 [0.4000, 0.6000]"}]
    lines = [json.loads(line) for line in outcome.predictions(found, dense).splitlines()]
    assert lines[1] == {"task": "glue/sst2", "row": 2, "prediction": 1, "dense": 0}


def test_several_results_have_an_average():
    found = outcome.Outcome("m", results(0.8) + results(0.4, task="glue/rte"),
                            {"glue/mnli": "the model has 2 outputs"})
    data = outcome.to_dict(found, "glue")
    assert [entry["task"] for entry in data["results"]] == ["glue/sst2", "glue/rte"]
    assert data["average"]["value"] == pytest.approx(0.6)
    assert data["skipped"] == {"glue/mnli": "the model has 2 outputs"}
    names = [row[0] for row in outcome.table(found)[1]]
    assert "average of 2 tasks" in names and "glue/mnli: skipped" in names


def test_every_option_is_taken_by_some_task():
    taken = {name for names in tasks.TAKES.values() for name in names}
    assert taken == set(vars(Options()))
