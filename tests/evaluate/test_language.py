import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import bitlm  # noqa: F401
from bitlm.evaluate import bootstrap, language
from bitlm.evaluate.language import (
    EvaluationError,
    compare,
    compare_encoders,
    perplexity,
    throughput,
)
from bitlm.evaluate.load import LoadError, load_model
from tests.tiny import VOCABULARY, make_bert, make_llama, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def other(model):
    torch.manual_seed(1)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.model.layers.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return changed


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, VOCABULARY, (7, 20), generator=torch.Generator().manual_seed(0))


def plain(model, windows):
    """Mean negative log-likelihood, one token at a time, in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0].double()
            for position in range(len(window) - 1):
                scores = logits[position] - logits[position].logsumexp(0)
                total -= scores[window[position + 1]].item()
                count += 1
    return total / count


def test_perplexity_equals_a_plain_loop(model, windows):
    result = perplexity(model, windows)
    assert result.nll == pytest.approx(plain(model, windows), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert (result.tokens, result.windows, result.context) == (7 * 19, 7, 20)


def test_its_interval_is_that_of_windows_drawn_again(model, windows):
    found = perplexity(model, windows, resamples=200, seed=3)
    assert found.low < found.perplexity < found.high and found.seconds > 0 and found.peak_bytes
    assert sum(found.by_window) / 7 == pytest.approx(found.nll)
    assert found.by_window[2] == pytest.approx(plain(model, windows[2:3]), rel=1e-6)
    again = compare(model, model, windows, resamples=200, seed=3)
    assert (again.packed.low, again.packed.high) == (found.low, found.high)
    drawn = np.asarray(found.by_window)[list(bootstrap.draws(7, 200, 3))].mean(-1)
    assert found.low == pytest.approx(np.exp(np.quantile(drawn, 0.025)), rel=1e-4)
    assert "by_window" not in found.to_dict() and "low" not in perplexity(model, windows).to_dict()


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_an_uneven_last_batch_changes_nothing(model, windows, batch_size):
    seen = []
    result = perplexity(model, windows, batch_size, lambda done, total: seen.append((done, total)))
    assert result.nll == pytest.approx(perplexity(model, windows, 1).nll, rel=1e-6)
    assert seen[-1] == (7, 7)
    assert len(seen) == -(-7 // batch_size)


def test_small_chunks_change_nothing(model, other, windows, monkeypatch):
    whole = compare(other, model, windows)
    monkeypatch.setattr(language, "_CHUNK", 3 * VOCABULARY)
    cut = compare(other, model, windows)
    assert cut.kl == pytest.approx(whole.kl, rel=1e-6)
    assert cut.packed.nll == pytest.approx(whole.packed.nll, rel=1e-6)
    assert cut.top1 == whole.top1


def test_a_model_agrees_with_itself(model, windows):
    found = compare(model, model, windows)
    assert found.kl == 0 and found.top1 == 1 and found.logit_error == 0
    assert found.packed == found.dense == perplexity(model, windows)


def test_comparison_equals_its_definition(model, other, windows):
    found = compare(other, model, windows, batch_size=2)
    with torch.no_grad():
        p, q = (m(input_ids=windows).logits[:, :-1].double().flatten(0, 1) for m in (model, other))
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.top1 == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.logit_error == pytest.approx(((q - p).norm() / p.norm()).item(), rel=1e-5)
    assert found.packed.perplexity != found.dense.perplexity
    assert found.to_dict()["dense"]["tokens"] == 7 * 19


def test_a_destroyed_model_has_an_infinite_perplexity(model, windows):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight *= 1e6
    assert perplexity(broken, windows).perplexity == math.inf


def test_the_mode_of_a_model_is_kept(model, windows):
    model.train()
    perplexity(model, windows)
    assert model.training
    model.eval()


def test_what_cannot_be_measured(model, windows, tmp_path):
    with pytest.raises(EvaluationError, match="reads at most 128"):
        perplexity(model, windows.repeat(1, 10))
    with pytest.raises(EvaluationError, match="expected"):
        perplexity(model, windows[:, :1])
    bert, _ = load_model(make_bert(tmp_path / "bert"))
    with pytest.raises(EvaluationError, match="no causal language model"):
        perplexity(bert, windows)
    wider, _ = load_model(make_llama(tmp_path / "wide", vocab_size=VOCABULARY + 8))
    with pytest.raises(EvaluationError, match="not versions of the same model"):
        compare(wider, model, windows)


def test_throughput_and_its_limits(model):
    assert throughput(model, torch.tensor([[1, 5, 6]]), new_tokens=4, repeats=1) > 0
    with pytest.raises(EvaluationError, match="at least 2"):
        throughput(model, torch.tensor([[1]]), new_tokens=1)


def test_encoders_by_cosine_and_classifiers_by_kl(tmp_path):
    tokenizer = make_tokenizer()
    batches = [tokenizer(texts, padding=True, return_tensors="pt")
               for texts in (["a short one", "one that is a good deal longer"], ["third"])]
    bert, _ = load_model(make_bert(tmp_path / "bert"))
    same = compare_encoders(bert, bert, batches)
    assert same.cosine == pytest.approx(1) and same.kl is None and same.top1 is None
    assert same.tokens == sum(int(batch["attention_mask"].sum()) for batch in batches)
    first = AutoModelForSequenceClassification.from_pretrained(
        make_bert(tmp_path / "one", labels=3)).eval()
    second = AutoModelForSequenceClassification.from_pretrained(
        make_bert(tmp_path / "two", labels=3, seed=1)).eval()
    same, unlike = compare_encoders(first, first, batches), compare_encoders(second, first, batches)
    assert same.kl == 0 and same.top1 == 1
    assert unlike.kl > 0 and unlike.cosine < 0.9
    with pytest.raises(EvaluationError, match="no text"):
        compare_encoders(bert, bert, [])


def test_padding_does_not_count(tmp_path):
    tokenizer = make_tokenizer()
    one, _ = load_model(make_bert(tmp_path / "one"))
    two, _ = load_model(make_bert(tmp_path / "two", seed=1))
    alone = compare_encoders(one, two, [tokenizer(["abc"], return_tensors="pt")])
    padded = tokenizer(["abc"], padding="max_length", max_length=30, return_tensors="pt")
    assert compare_encoders(one, two, [padded]).cosine == pytest.approx(alone.cosine, abs=1e-5)


def test_load_picks_the_class_and_the_tokenizer(folder, tmp_path):
    model, tokenizer = load_model(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert tokenizer("a")["input_ids"][0] == 1
    classifier = make_bert(tmp_path / "cls", labels=2)
    for path in classifier.glob("tokenizer*"):
        path.unlink()
    model, tokenizer = load_model(classifier)
    assert type(model).__name__ == "BertForSequenceClassification" and tokenizer is None


def test_load_refuses_in_one_line(folder, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def refused(path, words):
        with pytest.raises(LoadError, match=words) as caught:
            load_model(path)
        assert "\n" not in str(caught.value)

    refused(tmp_path / "missing", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json")
    refused("some/model", "hub")
    cut = make_llama(tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-50])
    refused(cut, "damaged or cut short")
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, cut / "model.safetensors", metadata={"format": "pt"})
    refused(cut, "lacks model.layers.0.mlp.up_proj.weight")
    for labels in (0, 2):  # a classifier uses its pooler
        bert = make_bert(tmp_path / f"bert{labels}", labels=labels)
        tensors = load_file(bert / "model.safetensors")
        save_file({name: tensor for name, tensor in tensors.items() if "pooler" not in name},
                  bert / "model.safetensors", metadata={"format": "pt"})
    assert type(load_model(tmp_path / "bert0")[0]).__name__ == "BertModel"
    refused(tmp_path / "bert2", "lacks bert.pooler.dense.bias and 1 more")
    (cut / "config.json").write_text('{"model_type": "nothing_known"}')
    refused(cut, "cannot be loaded")


def test_a_packed_model_loads_in_a_fresh_process(folder, tmp_path):
    from bitlm.quantize import quantize

    quantize(folder, out=tmp_path / "packed", measure_verdict=False)
    code = ("from bitlm.evaluate.load import load_model; "
            f"model, _ = load_model({str(tmp_path / 'packed')!r}); "
            "print(type(model.model.layers[0].mlp.up_proj.weight).__name__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "PackedWeight", done.stderr
    assert not done.stderr.strip()
