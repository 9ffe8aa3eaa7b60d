import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
)

from bitlm.evaluate.data import DataError
from bitlm.evaluate.generation import Settings
from bitlm.evaluate.language import EvaluationError
from bitlm.evaluate.translation import bleu, examples, measure, route
from tests.evaluate import models
from tests.tiny import make_llama, make_tokenizer

ROWS = [{"en": f"The {word} sat on the mat.", "ro": f"Un {word} stătea pe covor."}
        for word in ("cat", "dog", "bird", "fox")]
needs_sacrebleu = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("sacrebleu"),
    reason="sacrebleu is not installed")


@needs_sacrebleu
def test_bleu_by_hand():
    found, signatures = bleu(["the cat sat on the mat"], ["the cat sat on a mat"], resamples=0)
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; no brevity penalty.
    assert found["bleu"].value == pytest.approx(
        100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert "tok:13a" in signatures["bleu"] and "version:" in signatures["bleu"]
    assert bleu(["a b c d e"], ["a b c d e"], resamples=0)[0]["chrf"].value == pytest.approx(100)


@needs_sacrebleu
def test_a_language_without_spaces():
    pair = ["我喜欢猫和狗。"], ["我喜欢猫和小狗。"]
    found, signatures = bleu(*pair, "zh", resamples=0)
    assert found["bleu"].value > 40 and "tok:zh" in signatures["bleu"]
    assert bleu(*pair, resamples=0)[0]["bleu"].value == 0


@needs_sacrebleu
def test_scores_and_intervals_are_sacrebleus_on_the_rows_drawn():
    from sacrebleu.metrics import BLEU, CHRF

    from bitlm.evaluate.bootstrap import draws

    targets = [row["ro"] for row in ROWS]
    guesses = [targets[0], targets[1].replace("pe", "de pe"), "Un covor.", targets[3][:12]]
    found, _ = bleu(guesses, targets, resamples=5, seed=3)
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        assert found[name].value == pytest.approx(metric.corpus_score(guesses, [targets]).score)
        samples = [metric.corpus_score(*(lambda rows: (
            [guesses[i] for i in rows], [[targets[i] for i in rows]]))(drawn)).score
            for drawn in draws(4, 5, 3)]
        assert found[name].samples == pytest.approx(np.array(samples))


def test_columns_by_language():
    assert examples(ROWS, "ro", "en")[1][0] == "The cat sat on the mat."
    nested = [{"translation": row} for row in ROWS]
    assert examples(nested, "en", "ro") == examples(ROWS, "en", "ro")
    other = [{"src": "a", "tgt": "b"}]
    assert examples(other, "en", "ro", {"source": "src", "target": "tgt"}) == (["a"], ["b"])
    with pytest.raises(DataError, match="no column de .the target.: the columns are en, ro"):
        examples(ROWS, "en", "de")
    with pytest.raises(DataError, match="row 5: the reference is empty"):
        examples([*ROWS, {"en": "a", "ro": " "}], "en", "ro")


def test_t5_bart_and_decoders_are_told_in_their_way(tmp_path):
    tokenizer = make_tokenizer()
    t5 = models.t5()
    assert route(t5, tokenizer, "en", "ro").prefix == "translate English to Romanian: "
    t5.config.task_specific_params = {"translation_en_to_ro": {"prefix": "en-ro: "}}
    assert route(t5, tokenizer, "en", "ro").prefix == "en-ro: "
    assert route(t5, tokenizer, "en", "ro", prefix="").prefix == ""
    plain = route(models.bart(), tokenizer, "en", "ro")
    assert (plain.prefix, plain.suffix, plain.options) == ("", "", {})
    llama = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path))
    assert route(llama, tokenizer, "en", "xx").suffix == "\nxx:"


@pytest.mark.parametrize("make, option", [(MBartTokenizer, "decoder_start_token_id"),
                                          (MBart50Tokenizer, "forced_bos_token_id")])
def test_language_codes(make, option):
    tokenizer = make()
    for source, target in (("en", "ro"), ("en_XX", "ro_RO")):
        way = route(models.bart(), tokenizer, source, target)
        assert way.options == {option: tokenizer.convert_tokens_to_ids("ro_RO")}
        assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en_XX", "ro_RO")
        assert tokenizer.convert_tokens_to_ids("en_XX") in tokenizer("a")["input_ids"]
    with pytest.raises(EvaluationError, match="no language 'ron': give its own code.*ro_RO"):
        route(models.bart(), tokenizer, "en", "ron")


@needs_sacrebleu
def test_mbart_starts_with_the_language():
    torch.manual_seed(0)
    tokenizer = MBart50Tokenizer()
    model = MBartForConditionalGeneration(MBartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_position_embeddings=64, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, decoder_start_token_id=2)).eval()
    starts = []
    generate = model.generate

    def watched(**options):
        outputs = generate(**options)
        starts.append(outputs[:, :2])
        return outputs

    model.generate = watched
    result = measure(model, tokenizer, ROWS, "en", "ro", Settings(1, max_length=6), resamples=0)
    romanian = tokenizer.convert_tokens_to_ids("ro_RO")
    assert starts[0].tolist() == [[2, romanian]] * 4
    assert all("ro_RO" not in record["prediction"] for record in result.predictions)


@needs_sacrebleu
def test_a_model_is_measured_beside_the_copy():
    result = measure(models.bart(), make_tokenizer(), ROWS, "en", "ro", Settings(2, max_length=10),
                     task="wmt16/en-ro", resamples=20)
    assert result.headline == "bleu" and list(result.scores) == ["bleu", "chrf"]
    copied = bleu([row["en"] for row in ROWS], [row["ro"] for row in ROWS], resamples=0)[0]
    assert result.baselines["copy"] == {name: score.value for name, score in copied.items()}
    assert [record["source"] for record in result.predictions] == [row["en"] for row in ROWS]
    assert result.facts["signatures"]["chrf"].startswith("nrefs:1")


@needs_sacrebleu
def test_a_decoders_first_line_counts(tmp_path):
    llama = AutoModelForCausalLM.from_pretrained(make_llama(tmp_path, initializer_range=0.5))
    result = measure(llama.eval(), make_tokenizer(), ROWS, "en", "ro", Settings(1, max_length=30),
                     resamples=0)
    assert all("\n" not in record["prediction"] for record in result.predictions)
