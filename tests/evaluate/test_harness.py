import json
import sys
from importlib.util import find_spec

import pytest
from transformers import AutoModelForCausalLM

from bitlm.evaluate.harness import measure
from bitlm.evaluate.language import EvaluationError
from tests.tiny import make_bert, make_llama, make_tokenizer

# lm-eval imports these itself but is sometimes installed without them.
needs_lm_eval = pytest.mark.skipif(
    not all(map(find_spec, ("lm_eval", "evaluate", "requests", "pytablewriter", "sqlitedict"))),
    reason="lm-eval is not installed, or without what it needs")
YAML = """
task: toy_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""
CHOICE = """doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_llama(tmp_path_factory.mktemp("llama"), initializer_range=0.5)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("yaml")
    rows = [{"question": f"is {i} even", "choices": ["yes", "not"], "answer": i % 2}
            for i in range(7)]
    (folder / "toy.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind, rest in (("multiple_choice", CHOICE), ("loglikelihood_rolling", ROLLING)):
        (folder / f"{kind}.yaml").write_text(
            YAML.format(kind=kind, data=folder / "toy.jsonl") + rest)
    return folder


def test_a_missing_lm_eval_is_told(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match="lm-eval is not installed.*pip install lm-eval"):
        measure(model, make_tokenizer(), ["toy"])


@needs_lm_eval
def test_own_tasks_run_offline(model, tasks, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    choice, rolling = measure(model, make_tokenizer(), ["toy_multiple_choice",
                                                        "toy_loglikelihood_rolling"],
                              include=tasks, batch_size=2, resamples=50)
    assert choice.task == "lm:toy_multiple_choice" and choice.headline == "acc"
    right = [record["acc"] for record in choice.predictions]
    assert choice.scores["acc"].value == pytest.approx(sum(right) / 7)
    assert choice.scores["acc"].samples.shape == (50,)
    assert [record["row"] for record in choice.predictions] == list(range(1, 8))
    assert rolling.scores["bits_per_byte"].value > 0
    limited, = measure(model, make_tokenizer(), ["toy_multiple_choice"], include=tasks, limit=3)
    assert limited.facts["rows"] == 3


@needs_lm_eval
def test_what_is_refused(model, tasks, tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match="is no folder of task files"):
        measure(model, make_tokenizer(), ["toy"], include=tmp_path / "none")
    from bitlm.evaluate.load import load_model
    bert, _ = load_model(make_bert(tmp_path / "bert"))
    with pytest.raises(EvaluationError, match="is no language model"):
        measure(bert, make_tokenizer(), ["toy_multiple_choice"], include=tasks)
    (tmp_path / "bad.yaml").write_text(YAML.format(
        kind="multiple_choice", data=tmp_path / "missing.jsonl") + CHOICE)
    with pytest.raises(EvaluationError, match="could not measure toy_multiple_choice"):
        measure(model, make_tokenizer(), ["toy_multiple_choice"], include=tmp_path)
