"""The verdict in words and figures."""

from __future__ import annotations

import pytest
import torch
import transformers

from bitlm.verdict import NoVerdict, Verdict, bundled_ids, measure
from tests import zoo
from tests.tiny import make_tokenizer

IDS = [torch.tensor([[1, 5, 9, 30, 4, 7, 8]]), torch.tensor([[3, 3, 8]])]


@pytest.mark.parametrize("name", ["llama", "bert", "t5_relu", "bart"])
def test_a_model_is_close_to_itself(name):
    found = measure(zoo.make(name), zoo.make(name), IDS)
    assert found.word == "close" and found.kl == pytest.approx(0, abs=1e-6) and found.top1 == 1


def test_kl_is_that_of_the_definition():
    dense, other = zoo.make("llama"), zoo.make("llama", seed=3)
    with torch.no_grad():
        p, q = (torch.cat([model(ids).logits[0].double().softmax(-1) for ids in IDS])
                for model in (dense, other))
    found = measure(other, dense, IDS)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert found.tokens == 10 and found.texts == 2


def test_a_model_without_head_is_judged_by_its_states():
    dense, other = zoo.make("bert").bert, zoo.make("bert", seed=2).bert
    found = measure(other, dense, IDS)
    assert found.kl is None and found.cosine < 0.9 and found.word == "unusable without training"
    assert "cosine" in found.sentence()


def test_words_follow_the_figures():
    verdict = Verdict("degraded", 0.5, 0.8, None, 256, 4, "more planes")
    assert verdict.sentence() == ("degraded (KL 0.5 nats, top-1 agreement 80% against the dense "
                                  "model on 256 tokens in 4 texts)")
    assert verdict.to_dict() == {"word": "degraded", "kl": 0.5, "top1": 0.8, "tokens": 256,
                                 "texts": 4, "advice": "more planes"}


def test_the_bundled_text_fits_the_model():
    model = zoo.make("llama", vocab_size=300)
    texts = bundled_ids(make_tokenizer(), model)
    assert [ids.shape for ids in texts] == [(1, 62)] * 4  # two less than the model's context
    assert bundled_ids(make_tokenizer(), zoo.make("llama")) is None  # ids beyond its vocabulary
    assert bundled_ids(None, model) is None
    assert bundled_ids(make_tokenizer(), zoo.make("vit")) is None


@pytest.mark.parametrize("cls", ["BertForQuestionAnswering", "BertForPreTraining",
                                 "BertForTokenClassification", "ElectraForPreTraining"])
def test_outputs_of_other_heads_are_compared_too(cls):
    config = zoo.make("bert").config
    config.num_labels = 2
    if cls.startswith("Electra"):
        config = transformers.ElectraConfig(**zoo.SMALL, embedding_size=16)
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config).eval()
    assert measure(model, model, IDS).word == "close"


def test_a_single_label_is_judged_by_the_states():
    dense = zoo.make("bert", num_labels=1)
    found = measure(zoo.make("bert", seed=5, num_labels=1), dense, IDS)
    assert found.kl is None and found.word == "unusable without training"


def test_a_dense_model_that_gives_nan_gets_no_verdict():
    dense = zoo.make("llama")
    with torch.no_grad():
        dense.model.norm.weight.fill_(float("inf"))
    with pytest.raises(NoVerdict, match="the dense model itself"):
        measure(zoo.make("llama"), dense, IDS)
