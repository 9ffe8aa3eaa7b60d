import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import bitlm
from bitlm.evaluate import glue
from bitlm.evaluate.data import DataError
from bitlm.evaluate.language import EvaluationError
from tests.evaluate import models
from tests.tiny import VOCABULARY, make_tokenizer

WORDS = ["a", "bad", "cat", "did", "eat", "fish", "good"]
ROWS = [{"sentence": " ".join(WORDS[:1 + i % 7]), "label": i % 2} for i in range(13)]


def classifier(labels=2, seed=0, **changes):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48,
                        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64,
                        pad_token_id=0, initializer_range=0.5, num_labels=labels, **changes)
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def pairs(task, labels):
    first, second = glue.TASKS[task].columns
    return [{first: f"one {i}", second: "two " * (i + 1), "label": label}
            for i, label in enumerate(labels)]


def test_all_nine_tasks_have_metrics_and_outputs():
    assert set(glue.TASKS) == {"cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"}
    assert [glue.TASKS[name].outputs for name in ("cola", "mnli", "stsb")] == [2, 3, 1]


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_outputs_are_those_of_each_text_alone_in_order(tokenizer, batch_size):
    model, seen = classifier(), []
    inputs, _ = glue.examples("sst2", ROWS)
    outputs = glue.predict(model, tokenizer, inputs, batch_size,
                           progress=lambda done, total: seen.append((done, total)))
    with torch.no_grad():
        alone = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits
                           for text, in inputs])
    assert outputs.shape == (13, 2) and outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, alone, atol=1e-5, rtol=1e-4)
    assert alone.std(0).min() > 0.01  # the order matters
    assert seen[-1] == (13, 13) and len(seen) == -(-13 // batch_size)


def test_long_texts_are_cut_at_what_is_allowed(tokenizer):
    model = classifier()
    long = [("x" * 300,)]
    glue.predict(model, tokenizer, long)  # 64 positions
    short = glue.predict(model, tokenizer, long, max_length=10)
    torch.testing.assert_close(short, glue.predict(model, tokenizer, [("x" * 9,)]))


def test_sst2_by_hand(tokenizer):
    model = classifier()
    result = glue.measure(model, tokenizer, "sst2", {"validation": ROWS}, resamples=20)
    guesses = glue.predict(model, tokenizer, glue.examples("sst2", ROWS)[0]).argmax(1).tolist()
    right = sum(guess == row["label"] for guess, row in zip(guesses, ROWS))
    assert result.headline == "accuracy" and result.task == "glue/sst2"
    assert result.scores["accuracy"].value == pytest.approx(right / 13)
    assert [record["prediction"] for record in result.predictions] == guesses
    assert [record["label"] for record in result.predictions] == [row["label"] for row in ROWS]
    assert result.facts["rows"] == 13 and result.to_dict()["metrics"]["accuracy"]["low"] <= 1


def test_several_metrics_have_their_mean_as_headline(tokenizer):
    result = glue.measure(classifier(), tokenizer, "mrpc",
                          {"validation": pairs("mrpc", [0, 1, 1, 0, 1])}, resamples=10)
    assert list(result.scores) == ["accuracy", "f1", "mean"] and result.headline == "mean"
    assert result.scores["mean"].value == pytest.approx(
        (result.scores["accuracy"].value + result.scores["f1"].value) / 2)


def test_a_number_is_predicted_for_stsb(tokenizer):
    rows = pairs("stsb", [0.0, 5.0, 2.5, 4.0])
    result = glue.measure(classifier(1), tokenizer, "stsb", {"validation": rows}, resamples=5)
    assert list(result.scores) == ["pearson", "spearman", "mean"]
    assert all(isinstance(record["prediction"], float) for record in result.predictions)


def test_both_halves_of_mnli(tokenizer):
    halves = {"validation_matched": pairs("mnli", [0, 1, 2]),
              "validation_mismatched": pairs("mnli", [2, 2, 2, 2])}
    model, seen = classifier(3), []
    result = glue.measure(model, tokenizer, "mnli", halves, resamples=5,
                          progress=lambda done, total: seen.append((done, total)))
    assert list(result.scores) == ["accuracy matched", "accuracy mismatched", "mean"]
    assert result.facts["rows"] == 7 and seen[-1] == (7, 7)
    one = glue.measure(model, tokenizer, "mnli", {"": halves["validation_matched"]}, resamples=0)
    assert list(one.scores) == ["accuracy"]
    assert one.scores["accuracy"].value == result.scores["accuracy matched"].value


def test_a_models_own_order_of_labels_counts(tokenizer):
    rows = pairs("mnli", [0, 1, 2, 0])
    names = ["CONTRADICTION", "Entailment", "neutral"]
    model = classifier(3, label2id={name: i for i, name in enumerate(names)},
                       id2label=dict(enumerate(names)))
    assert glue.label_order(model, "mnli") == [1, 2, 0]
    inputs, _ = glue.examples("mnli", rows)
    outputs = glue.predict(model, tokenizer, inputs)
    wanted = ["entailment neutral contradiction".split().index(names[i].lower())
              for i in outputs.argmax(1).tolist()]
    assert glue.predictions(model, "mnli", outputs) == wanted
    assert glue.label_order(classifier(3), "mnli") == [0, 1, 2]
    model.config.label2id = None  # as where config.json has id2label alone
    assert glue.label_order(model, "mnli") == [1, 2, 0]
    with pytest.raises(DataError, match="row 1: label None is none of"):
        glue.examples("sst2", [{"sentence": "x", "label": None}])


def test_unknown_names_of_labels_are_told(caplog):
    model = classifier(2, label2id={"ham": 0, "spam": 1}, id2label={0: "ham", 1: "spam"})
    assert glue.label_order(model, "sst2") == [0, 1]
    assert "ham, spam" in caplog.text


def test_labels_by_name_and_as_text():
    rows = [{"sentence": "a", "label": label} for label in ("negative", "Positive", "1", 0.0)]
    assert glue.examples("sst2", rows)[1] == [0, 1, 1, 0]
    rows = [{"sentence1": "a", "sentence2": "b", "label": "3.5"}]
    assert glue.examples("stsb", rows)[1] == [3.5]


def test_other_names_of_columns():
    rows = [{"text": "a", "gold": 1}]
    assert glue.examples("sst2", rows, {"sentence": "text", "label": "gold"}) == ([("a",)], [1])


@pytest.mark.parametrize("task, label, words", [
    ("sst2", 2, "row 2: label 2 is none of 0 negative, 1 positive"),
    ("sst2", -1, "secret.*validation split"),
    ("sst2", 0.5, "label 0.5"),
    ("sst2", None, "label None"),
    ("sst2", "good", "label 'good'"),
    ("stsb", 5.5, "label 5.5 is none of the numbers 0 to 5"),
    ("stsb", float("nan"), "label nan"),
])
def test_labels_outside_the_range(task, label, words):
    rows = [{"sentence": "a", "sentence1": "a", "sentence2": "b", "label": value}
            for value in (1, label)]
    with pytest.raises(DataError, match=words):
        glue.examples(task, rows)


def test_models_that_do_not_fit(tokenizer):
    with pytest.raises(EvaluationError, match="has 3 outputs, sst2 needs 2"):
        glue.measure(classifier(3), tokenizer, "sst2", {"validation": ROWS})
    with pytest.raises(EvaluationError, match="is no sequence classifier"):
        glue.predict(models.bart(), tokenizer, [("a",), ("b",)])
    broken = classifier()
    with torch.no_grad():
        broken.classifier.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="row 1 is NaN"):
        glue.predict(broken, tokenizer, [("a",)])


def test_without_a_padding_token_texts_run_alone():
    tokenizer = make_tokenizer()
    inputs, _ = glue.examples("sst2", ROWS)
    expected = glue.predict(classifier(), tokenizer, inputs)
    tokenizer.pad_token = None
    torch.testing.assert_close(glue.predict(classifier(), tokenizer, inputs), expected, atol=1e-5,
                               rtol=1e-4)


def test_a_packed_model_in_memory(tokenizer):
    model = classifier()
    model.train()
    dense = glue.measure(model, tokenizer, "sst2", {"validation": ROWS}, resamples=0)
    assert model.training
    bitlm.pack(model)
    packed = glue.measure(model, tokenizer, "sst2", {"validation": ROWS}, resamples=0)
    assert packed.facts["rows"] == 13
    assert packed.predictions[0]["outputs"] != dense.predictions[0]["outputs"]


def test_folders_of_tasks(tmp_path):
    for name in ("SST-2", "mnli", "other"):
        (tmp_path / name).mkdir()
    assert glue.find(tmp_path) == {"sst2": tmp_path / "SST-2", "mnli": tmp_path / "mnli"}


def test_the_average_is_that_of_the_headlines(tokenizer):
    results = [glue.measure(classifier(), tokenizer, task, {"validation": rows}, resamples=10)
               for task, rows in (("sst2", ROWS), ("mrpc", pairs("mrpc", [1, 0, 1])))]
    found = glue.average(results)
    assert found.value == pytest.approx(sum(
        result.scores[result.headline].value for result in results) / 2)
    assert found.low <= found.value <= found.high
