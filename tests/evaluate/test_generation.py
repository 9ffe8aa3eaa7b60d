import pytest
import torch
from transformers import AutoModelForCausalLM

import bitlm
from bitlm.evaluate import batches
from bitlm.evaluate.generation import Settings, encode, generate_texts
from bitlm.evaluate.language import EvaluationError
from bitlm.evaluate.peak import peak_bytes
from tests.evaluate import models
from tests.tiny import make_bert, make_llama, make_tokenizer

TEXTS = ["a", "the cat sat on the mat", "hello there", "zzz zz z", "one two three four five"]
SHORT = Settings(beams=2, max_length=12)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = make_llama(tmp_path_factory.mktemp("llama"), initializer_range=0.5)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def model_of(kind, llama):
    return {"bart": models.bart, "t5": models.t5, "llama": lambda: llama}[kind]()


@pytest.mark.parametrize("kind", ["bart", "t5", "llama"])
def test_order_and_batches_change_nothing(kind, llama, tokenizer):
    model, seen = model_of(kind, llama), []
    alone = [generate_texts(model, tokenizer, [text], SHORT, batch_size=1).texts[0]
             for text in TEXTS]
    for batch_size in (1, 2, 5):
        seen.clear()
        found = generate_texts(model, tokenizer, TEXTS, SHORT, batch_size=batch_size,
                               progress=lambda done, total: seen.append((done, total)))
        assert found.texts == alone
        assert seen[-1] == (5, 5)
    if kind != "t5":
        assert len(set(alone)) > 2  # the order matters


def test_what_is_written_is_what_generate_writes(tokenizer):
    model = models.bart()
    ids = tokenizer(TEXTS[1], return_tensors="pt")
    with torch.no_grad():
        plain = model.generate(ids["input_ids"], attention_mask=ids["attention_mask"], num_beams=3,
                               length_penalty=2.0, min_length=6, max_length=9, do_sample=False)
    found = generate_texts(model, tokenizer, TEXTS[1:2], Settings(3, 2.0, 6, 9))
    assert found.texts == [tokenizer.decode(plain[0], skip_special_tokens=True).strip()]
    assert found.lengths == [plain.shape[1] - 1]


def test_beam_settings_reach_generate(tokenizer, monkeypatch):
    model, asked = models.bart(), []
    generate = model.generate
    monkeypatch.setattr(model, "generate",
                        lambda **options: asked.append(options) or generate(**options))
    generate_texts(model, tokenizer, TEXTS[:1], Settings(3, 2.0, 6, 9))
    generate_texts(model, tokenizer, TEXTS[:1], Settings(1, 2.0, 6, 9), options={"top_k": 4})
    assert (asked[0]["num_beams"], asked[0]["length_penalty"]) == (3, 2.0)
    assert (asked[1]["num_beams"], asked[1]["top_k"]) == (1, 4)
    assert not asked[0]["do_sample"]


def test_lengths_are_kept(tokenizer, llama):
    for model, start in ((models.bart(), 1), (llama, 0)):
        found = generate_texts(model, tokenizer, TEXTS, Settings(1, 1.0, 10, 10))
        assert found.lengths == [10 - start] * 5
        facts = found.facts()
        assert facts["mean_length"] == 10 - start and facts["tokens_per_second"] > 0
        assert facts["seconds"] == found.seconds > 0


def test_the_checkpoints_own_lengths_do_not_interfere(tokenizer):
    model = models.bart()
    model.generation_config.update(max_length=5, min_length=4, num_beams=3)
    plain = generate_texts(models.bart(), tokenizer, TEXTS, SHORT)
    assert generate_texts(model, tokenizer, TEXTS, SHORT).texts == plain.texts


def test_the_end_token_counts_and_padding_does_not(tokenizer):
    model = models.bart(forced_eos_token_id=2)
    found = generate_texts(model, tokenizer, TEXTS, Settings(1, 1.0, 0, 20))
    assert all(1 <= length <= 19 for length in found.lengths)
    assert all(len(text) < 20 for text in found.texts)


def test_the_prompt_is_cut_and_the_suffix_stays(tokenizer):
    ids = encode(tokenizer, ["abcdefgh", "ab"], 6, prefix="p", suffix="xy")
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == ["pabxy", "pabxy"]
    assert [len(each) for each in ids] == [6, 6]


def test_there_is_room_for_a_text_or_an_error(tokenizer):
    for limit in (5, 4, 1):  # <s> p and xy are four tokens
        with pytest.raises(EvaluationError, match="what stands around each text has 4"):
            if limit == 5:
                assert encode(tokenizer, ["ab"], limit, "p", "xy") == encode(
                    tokenizer, ["a"], 9, "p", "xy")
                limit = 4
            encode(tokenizer, ["ab"], limit, "p", "xy")


def test_a_decoder_keeps_room_for_its_output(tokenizer, llama):
    found = generate_texts(llama, tokenizer, ["x" * 400], Settings(1, max_length=20), suffix=":")
    assert found.lengths[0] <= 20
    with pytest.raises(EvaluationError, match="leave no room.*at most 128"):
        generate_texts(llama, tokenizer, ["x"], Settings(1, max_length=128))
    with pytest.raises(EvaluationError, match="leave no room"):
        generate_texts(models.bart(), tokenizer, ["x"], Settings(1, max_length=200))


def test_what_does_not_generate(tokenizer, tmp_path):
    from bitlm.evaluate.load import load_model

    bert, _ = load_model(make_bert(tmp_path / "bert"))
    with pytest.raises(EvaluationError, match="BertModel does not generate text"):
        generate_texts(bert, tokenizer, ["a"], SHORT)
    with pytest.raises(EvaluationError, match="text 2 has no tokens"):
        encode(make_tokenizer(bos=False), ["a", ""], 9)
    for wrong, words in ((dict(beams=0), "beams is 0: use 1"), (dict(max_length=1), "max_length"),
                         (dict(min_length=9, max_length=8), "min_length is 9, max_length 8")):
        with pytest.raises(EvaluationError, match=words):
            Settings(**wrong)


def test_a_packed_model_in_memory(tokenizer):
    model = models.bart()
    bitlm.pack(model)
    one = generate_texts(model, tokenizer, TEXTS, SHORT, batch_size=5)
    assert one.texts == generate_texts(model, tokenizer, TEXTS, SHORT, batch_size=2).texts
    assert not model.training


def test_batches_hold_every_input_once_the_longest_first():
    lengths = [3, 9, 1, 9, 4]
    found = list(batches.by_length(lengths, 2))
    assert found == [[1, 3], [4, 0], [2]]


def test_peak_memory_is_a_number_of_bytes():
    peak = peak_bytes(torch.device("cpu"))
    assert peak is None or peak > 1 << 20
