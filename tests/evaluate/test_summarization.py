from types import SimpleNamespace

import pytest

from bitlm.evaluate.data import DataError
from bitlm.evaluate.generation import Settings
from bitlm.evaluate.summarization import (
    METRICS,
    examples,
    lead,
    measure,
    prefix_of,
    rouge,
)
from tests.evaluate import models
from tests.tiny import make_tokenizer

ROWS = [{"document": f"The cat {i} sat. It was happy! Then it ran.", "summary": f"A cat {i} sat."}
        for i in range(3)]
needs_rouge = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("rouge_score"),
    reason="rouge-score is not installed")


@needs_rouge
def test_rouge_by_hand():
    found = rouge(["the cat sat", "the cat ran"], [["the cat ran"], ["the cat ran"]])
    assert list(found) == list(METRICS)
    # 2 of 3 words, 1 of 2 pairs of words, a common subsequence of 2 of 3.
    assert found["rouge1"].tolist() == pytest.approx([100 * 2 / 3, 100])
    assert found["rouge2"].tolist() == pytest.approx([50, 100])
    assert found["rougeL"].tolist() == pytest.approx([100 * 2 / 3, 100])


@needs_rouge
def test_words_are_stemmed():
    assert rouge(["cats running"], [["cat runs"]])["rouge1"].tolist() == [100]


@needs_rouge
def test_lsum_takes_lines_for_sentences():
    found = rouge(["b c\na d"], [["a d\nb c"]])
    assert found["rougeLsum"].tolist() == [100]
    assert found["rougeL"].tolist() == [50]


@needs_rouge
def test_the_best_reference_counts_for_each_metric():
    found = rouge(["a b c"], [["a b x y", "c b a"]])
    assert found["rouge1"][0] == pytest.approx(100)  # the second one
    assert found["rouge2"][0] == pytest.approx(100 * 2 * 1 / (2 + 3))  # the first one


@needs_rouge
def test_an_empty_prediction_scores_nothing():
    assert all(values.tolist() == [0] for values in rouge([""], [["a b"]]).values())


def test_the_lead():
    text = "Mr. smith came at 3.5 p.m. today. \"Why?\" He left! The end."
    assert lead(text, 1) == "Mr. smith came at 3.5 p.m. today."
    assert lead("one. Two.\nthree.\n\nfour.", 2) == "one. Two.\nthree."
    assert lead("short", 3) == "short" and lead("", 3) == ""
    masked = SimpleNamespace(all_special_tokens=["<s>", "<mask>"])
    assert lead("<mask> saw<mask> dog. Two.", 1, masked).split() == ["saw", "dog."]


def test_lsum_takes_the_sentences_of_one_line(tmp_path):
    reference = "The cat sat here. A dog ran off.\nIt was late."
    same = "The cat sat here. A dog ran off. It was late."
    lines = "A dog ran off.\nThe cat sat here.\nIt was late."
    assert rouge([same], [[same]])["rougeLsum"][0] == pytest.approx(100)
    assert rouge([lines.replace("\n", " ")], [[same]])["rougeLsum"][0] == pytest.approx(
        rouge([lines], [[same]])["rougeLsum"][0])
    assert rouge([same], [[reference]])["rougeLsum"][0] > 90


def test_columns():
    assert examples(ROWS)[1][2] == ["A cat 2 sat."]
    several = [{"article": "x", "summary": "no", "references": ["a", "b"]}]
    assert examples(several) == (["x"], [["a", "b"]])
    named = [{"body": "x", "tl": "y"}]
    assert examples(named, {"document": "body", "summary": "tl"}) == (["x"], [["y"]])


@pytest.mark.parametrize("summary, words", [
    ("  ", "row 2: the reference in 'summary' is empty"), ([], "row 2.*is empty"),
    (["a", ""], "row 2.*is empty"), (None, "row 2: 'summary' is neither"),
    ([1], "row 2: 'summary' is neither")])
def test_references_that_cannot_be_used(summary, words):
    with pytest.raises(DataError, match=words):
        examples([ROWS[0], ROWS[1] | {"summary": summary}])


@needs_rouge
def test_a_model_is_measured_beside_the_lead():
    model = models.bart()
    result = measure(model, make_tokenizer(), ROWS, Settings(2, max_length=10), task="xsum",
                     lead_sentences=1, resamples=20)
    assert list(result.scores) == list(METRICS) and result.task == "xsum"
    texts = [record["prediction"] for record in result.predictions]
    assert result.scores["rouge1"].value == pytest.approx(
        rouge(texts, [[row["summary"]] for row in ROWS])["rouge1"].mean())
    # "The cat i sat." against "A cat i sat.": 3 of 4 words.
    assert result.baselines["lead-1"]["rouge1"] == pytest.approx(75)
    assert [record["row"] for record in result.predictions] == [1, 2, 3]
    assert result.facts["rows"] == 3 and result.facts["beams"] == 2
    assert result.to_dict()["baselines"] == result.baselines


def test_t5_is_told_what_to_do():
    model = models.t5()
    assert prefix_of(model) == "summarize: " and prefix_of(models.bart()) == ""
    model.config.task_specific_params = {"summarization": {"prefix": "sum: "}}
    assert prefix_of(model) == "sum: "
