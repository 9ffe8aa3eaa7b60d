"""`bitlm distill`: the recipes from data to packed model, their folders, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertForMaskedLM

from bitlm.modules import packed_weights
from bitlm.train import callbacks, recipe, stages
from bitlm.train.callbacks import DivergedError
from bitlm.train.layers import fake_quant_layers
from tests.processes import run_script, run_two
from tests.tiny import make_bert, make_llama, make_tokenizer

WORDS = ("good", "bad", "fine", "poor", "the film", "a plot", "is", "was", "and", "very")


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * step + step) % len(WORDS)] for step in range(2, 4 + number % 4))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A BERT, a llama, and data for each recipe; tests leave it alone."""
    folder = tmp_path_factory.mktemp("world")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    make_bert(folder / "bert", **sizes)
    make_llama(folder / "llama", **sizes, num_key_value_heads=1)
    rows = [{"sentence": sentence(n), "label": n % 2} for n in range(48)]
    lines(folder / "glue" / "sst2" / "train.jsonl", rows[:32])
    lines(folder / "glue" / "sst2" / "dev.jsonl", rows[32:])
    pairs = [{"en": sentence(n), "ro": sentence(n)[::-1]} for n in range(40)]
    lines(folder / "pairs" / "train.jsonl", pairs[:32])
    lines(folder / "pairs" / "dev.jsonl", pairs[32:])
    lines(folder / "stories.jsonl", [{"text": f"{sentence(n).capitalize()}. "
                                      f"{sentence(n + 1).capitalize()}."} for n in range(60)])
    return folder


GLUE = ["task=sst2", "profile=small", "steps=3", "batch=8", "log_every=1", "teacher.steps=3",
        "teacher.epochs=0", "teacher.batch=8", "length=32"]


def glue(world: Path, out: Path, *more: str) -> list[str]:
    return ["glue", f"data={world / 'glue'}", f"model={world / 'bert'}", f"out={out}", *GLUE, *more]


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def test_a_chain_from_teacher_to_packed_model(run, world, tmp_path):
    out = tmp_path / "out"
    result = run("distill", *glue(world, out, "scheme=w1a8,w1a1+estimators"))
    assert result.exit_code == 0, result.output
    found = read(out / "result.json")
    assert list(found["stages"]) == ["teacher", "w1a8", "w1a1+estimators"]
    assert all(0 <= stage["metrics"]["accuracy"] <= 1 and stage["steps"] == 3
               for stage in found["stages"].values())
    assert found["packed"]["metrics"] == found["stages"]["w1a1+estimators"]["metrics"]
    assert found["settings"]["task"] == "sst2" and found["seconds"] > 0
    assert "packed: " in result.stdout and "w1a8: accuracy" in result.stdout
    for stage in ("teacher", "w1a8", "w1a1-estimators"):
        assert (out / stage / "model" / "tokenizer.json").is_file()
        assert not (out / stage / "checkpoints").exists()
        steps = [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3]
    assert {"soft_cross_entropy", "hidden_mse"} <= set(steps[0])
    assert not [path for path in out.rglob(".*")]
    packed = AutoModelForSequenceClassification.from_pretrained(out / "packed")
    assert packed_weights(packed)
    student = AutoModelForSequenceClassification.from_pretrained(out / "w1a1-estimators" / "model")
    assert fake_quant_layers(student)
    ids = {"input_ids": torch.tensor([[1, 20, 30, 40]])}
    torch.testing.assert_close(student.eval()(**ids).logits, packed(**ids).logits, rtol=1e-4,
                               atol=1e-5)


def test_after_a_divergence_its_last_checkpoint_is_gone_on_from(run, world, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    result = run("distill", *glue(world, out, "lr=1e38", "save_every=1", "quantizer_lr=1e38"))
    assert result.exit_code == 1
    assert "lower learning rate" in result.stderr
    for saved in (out / "w1a8" / "checkpoints").glob("*/model.safetensors"):
        assert all(bool(t.isfinite().all()) for t in load_file(saved).values())
    assert run("distill", *glue(world, again, "scheme=w1a8", "save_every=2")).exit_code == 0
    kept, teacher = again / "w1a8" / "model", again / "teacher" / "model"
    more = [f"student={kept}", f"teacher.model={teacher}", "lr=1e-5"]
    result = run("distill", *glue(world, tmp_path / "on", "scheme=w1a8", *more))
    assert result.exit_code == 0, result.output
    for change, what in (("scheme=w1a1", "weights or activations"), ("estimator=ede", "estimator"),
                         ("weights=learned", "weights or activations"), ("embeddings=2",
                                                                         "embeddings"),
                         ("estimators=2", "attention"), ('skip=["pooler"]', "skip")):
        result = run("distill", *glue(world, tmp_path / change[:11], "scheme=w1a8", *more, change))
        assert f"with other {what} than" in result.stderr, (change, result.stderr)
        assert result.exit_code == 2
    result = run("distill", *glue(world, tmp_path / "self", "scheme=w1a8", f"teacher.model={kept}"))
    assert result.exit_code == 2 and "name the dense model that its student" in result.stderr
    result = run("distill", *glue(world, tmp_path / "chain", "scheme=w1a8,w1a1", *more))
    assert result.exit_code == 2 and "go on with scheme=w1a8" in result.stderr


def test_a_divergence_says_how_to_go_on(run, world, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def broken(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise DivergedError("the loss became NaN")

    monkeypatch.setattr(callbacks.StopAtNonFinite, "on_step_end", broken)
    result = run("distill", *glue(world, out, "scheme=w1a8", "save_every=1", "steps=4",
                                  "teacher.steps=2"))
    assert result.exit_code == 1
    kept = out / "w1a8" / "checkpoints" / "checkpoint-2"
    assert f"here: student={kept} teacher.model={out / 'teacher' / 'model'} scheme=w1a8 lr=LOWER " \
        "out=ANOTHER" in " ".join(result.stderr.split())
    monkeypatch.undo()
    result = run("distill", *glue(world, tmp_path / "on", f"student={kept}", "scheme=w1a8",
                                  f"teacher.model={out / 'teacher' / 'model'}", "lr=1e-5"))
    assert result.exit_code == 0, result.output


def test_the_same_command_again_does_nothing_again(run, world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run("distill", *glue(world, out)).exit_code == 0
    before = read(out / "result.json")
    monkeypatch.setattr(stages, "_train", None)
    result = run("distill", *glue(world, out))
    assert result.exit_code == 0 and "is finished already" in result.stdout
    assert read(out / "result.json") == before
    result = run("distill", *glue(world, out, "lr=0.5"))
    assert result.exit_code == 1
    assert "made with other settings, w1a8.lr was 0.0005 and is 0.5" in result.stderr


def test_an_interrupted_stage_goes_on_from_its_checkpoint(run, world, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    whole, out = tmp_path / "whole", tmp_path / "out"
    more = ["save_every=2", "steps=5"]
    assert run("distill", *glue(world, whole, *more)).exit_code == 0

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and "w1a8" in args.output_dir:
                raise KeyboardInterrupt

    own = stages._callbacks
    monkeypatch.setattr(stages, "_callbacks", lambda *args: [*own(*args), Stop()])
    result = run("distill", *glue(world, out, *more))
    assert result.exit_code == 1
    assert "run the same command again" in result.stderr
    assert (out / "teacher" / "result.json").is_file() and not (out / "result.json").exists()
    monkeypatch.setattr(stages, "_callbacks", own)
    assert run("distill", *glue(world, out, *more)).exit_code == 0
    losses = [[json.loads(line)["loss"] for line in
               (folder / "w1a8" / "log.jsonl").read_text().splitlines() if '"loss"' in line]
              for folder in (whole, out)]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_a_given_teacher_is_not_trained_and_the_best_checkpoint_is_kept(run, world, tmp_path):
    make_bert(tmp_path / "tuned", labels=2, hidden_size=16, intermediate_size=24,
              num_attention_heads=2)
    out = tmp_path / "out"
    result = run("distill", *glue(world, out, f"teacher.model={tmp_path / 'tuned'}",
                                  "eval_every=1", "patience=2", "eval_limit=8", "scheme=w1.58a8"))
    assert result.exit_code == 0, result.output
    found = read(out / "result.json")["stages"]
    assert found["teacher"]["steps"] == 0 and not (out / "teacher" / "model").exists()
    log = (out / "w1.58a8" / "log.jsonl").read_text()
    assert '"eval_accuracy"' in log


def test_a_teacher_alone_and_students_that_share_it(run, world, tmp_path):
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    result = run("distill", *glue(world, teacher, "scheme="))
    assert result.exit_code == 0, result.output
    found = read(teacher / "result.json")
    assert list(found["stages"]) == ["teacher"] and found["packed"] is None
    assert run("distill", *glue(world, teacher, "scheme=")).exit_code == 0
    assert "made with other settings" in run("distill", *glue(world, teacher)).stderr
    own = f"teacher.model={teacher / 'teacher' / 'model'}"
    assert run("distill", *glue(world, out, own)).exit_code == 0
    again = read(out / "result.json")["stages"]["teacher"]
    assert again["metrics"] == found["stages"]["teacher"]["metrics"] and again["steps"] == 0


def test_losses_of_classes_are_refused_for_a_task_that_has_none(run, world, tmp_path):
    rows = [{"sentence1": sentence(n), "sentence2": sentence(n + 1), "label": n % 5}
            for n in range(8)]
    for split in ("train", "dev"):
        lines(tmp_path / "data" / "stsb" / f"{split}.jsonl", rows)
    result = run("distill", *glue(world, tmp_path / "out", f"data={tmp_path / 'data'}",
                                  "task=stsb", 'losses=[["kl", 1.0]]'))
    assert result.exit_code == 1
    assert "stsb predicts a number, which has no classes: use logits_mse in place of kl" \
        in result.stderr
    assert not (tmp_path / "out").exists()


def test_denoising_from_nothing(run, world, tmp_path):
    out = tmp_path / "out"
    result = run("distill", "summarization", "task=denoise", f"data={world / 'stories.jsonl'}",
                 "model=new", "profile=small", "new.vocabulary=280", "new.hidden=16",
                 "new.layers=1", "new.heads=2", "steps=2", "teacher.steps=2", "batch=8",
                 "eval_rows=4", "max_length=8", "beams=1", "scheme=w1a1", f"out={out}",
                 "log_every=1")
    assert result.exit_code == 0, result.output
    found = read(out / "result.json")
    assert "rougeL" in found["packed"]["metrics"]
    log = json.loads((out / "w1a1" / "log.jsonl").read_text().splitlines()[0])
    assert {"task", "soft_cross_entropy", "hidden_mse", "attention_mse", "hidden_mse_2"} <= set(log)
    result = run("evaluate", out / "packed", "--task", "summarization", "--data",
                 out / "valid.jsonl", "--limit", "2", "--max-length", "8")
    assert result.exit_code == 0 and "lead" in result.stdout, result.output


def test_translation_from_nothing_with_ternary_embeddings(run, world, tmp_path):
    out = tmp_path / "out"
    result = run("distill", "translation", f"data={world / 'pairs'}", "config=", "model=new",
                 "profile=small", "new.vocabulary=280", "new.hidden=16", "new.layers=1",
                 "new.heads=2", "steps=2", "teacher.steps=2", "batch=8", "eval_rows=4",
                 "max_length=8", "beams=1", "scheme=w2a2", "embeddings=2", 'skip=["lm_head"]',
                 f"out={out}")
    assert result.exit_code == 0, result.output
    assert "bleu" in read(out / "result.json")["packed"]["metrics"]


def test_a_decoder_on_text(run, world, tmp_path):
    out = tmp_path / "out"
    result = run("distill", "causal_lm", f"data={world / 'stories.jsonl'}",
                 f"model={world / 'llama'}", "profile=small", "length=32", "steps=2", "batch=8",
                 "scheme=w1a8", f"out={out}")
    assert result.exit_code == 0, result.output
    found = read(out / "result.json")
    assert found["packed"]["metrics"]["perplexity"] == pytest.approx(
        found["stages"]["w1a8"]["metrics"]["perplexity"], rel=1e-3)
    result = run("distill", "causal_lm", f"data={world / 'stories.jsonl'}",
                 f"model={world / 'llama'}", "steps=2", "length=32", "bf16=false",
                 f"out={tmp_path / 'salient'}")
    assert result.exit_code == 0, result.output
    assert read(tmp_path / "salient" / "result.json")["settings"]["weights"] == "pb_llm"


def test_masked_language_modelling(run, world, tmp_path):
    make_bert(tmp_path / "bert", vocab_size=264, hidden_size=16, intermediate_size=24,
              num_attention_heads=2)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(tmp_path / "bert")
    BertForMaskedLM.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "bert")
    out = tmp_path / "out"
    result = run("distill", "bert_pretrain", f"data={world / 'stories.jsonl'}",
                 f"model={tmp_path / 'bert'}", "profile=small", "length=32", "steps=2", "batch=4",
                 f"out={out}")
    assert result.exit_code == 0, result.output
    assert 0 <= read(out / "result.json")["packed"]["metrics"]["accuracy"] <= 1


def test_settings_from_a_file_and_shown(run, world, tmp_path):
    (tmp_path / "mine.toml").write_text('recipe = "glue"\nprofile = "small"\nbatch = 5\n'
                                        "[teacher]\nlr = 0.25\n")
    result = run("distill", tmp_path / "mine.toml", "lr=0.125", "--show")
    assert result.exit_code == 0, result.output
    shown = dict(line.split()[:2] for line in result.stdout.splitlines() if len(line.split()) > 1)
    assert (shown["batch"], shown["lr"], shown["teacher.lr"]) == ("5", "0.125", "0.25")
    assert "profile small" in result.stdout
    result = run("distill", "summarization", "scheme=W1A8,W2A2,w1a1+estimators", "--show")
    shown = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()
             if len(line.split()) > 3}
    assert shown["setting"] == ["w1a8", "w1.58a2", "w1a1+estimators"]
    assert shown["lr"] == ["0.00025", "0.00035", "0.0005"]
    result = run("distill", "summarization", "task=cnn_dailymail", "scheme=w2a8", "--show")
    shown = dict(line.split()[:2] for line in result.stdout.splitlines() if len(line.split()) > 1)
    assert (shown["lr"], shown["min_length"]) == ("0.0001", "56")


@pytest.mark.parametrize("changes, code, words", [
    (["bacth=3"], 2, "unknown setting 'bacth', did you mean batch?"),
    (["scheme=w7a8"], 2, "unknown scheme 'w7a8'"),
    (["task=sst"], 2, "unknown task 'sst'"), (["limit=-3"], 2, "limit is -3: use 0 or more"),
    (["estimator=biper", "scheme=w1.58a8"], 2, "estimator biper has binary codes"),
    (["noise=true"], 2, "noise corrects the series of the estimator fda"),
    (["embeddings=12"], 2, "embeddings"), (['skip=["["]'], 1, "is no regular expression"),
    (['losses=[["second_basis", 1.0]]'], 2, "is for weights=two_bases"),
    (["patience=3"], 2, "patience is 3, but nothing is measured in training: set eval_every"),
    (["teacher.steps=0"], 2, "has no head for sst2, and teacher.epochs=0 trains none"),
    (["scheme=w1a8,W1A8"], 2, "comes twice"), (["data=DEV"], 1, "is one file: name its folder"),
    (["task=cola"], 1, "no"),
    (["model=missing/folder/of"], 1, "does not exist"),
    (["data=missing.jsonl"], 1, "no such file or folder"),
    (["losses=[[\"kll\", 1.0]]"], 1, "unknown loss 'kll', did you mean kl?"),
    (["estimator=ste"], 1, "unknown estimator"),
])
def test_bad_settings_are_one_line_and_write_nothing(run, world, tmp_path, changes, code, words):
    out = tmp_path / "out"
    changes = [each.replace("DEV", str(world / "glue" / "sst2" / "dev.jsonl")) for each in changes]
    result = run("distill", *glue(world, out, *changes))
    assert result.exit_code == code
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("break_it, words", [
    (lambda folder: (folder / "dev.jsonl").unlink(),
     "split: it has train; put validation.jsonl beside them"),
    (lambda folder: (folder / "train.jsonl").unlink(),
     "has no split train: it has validation; put train.jsonl beside them"),
    (lambda folder: lines(folder / "train.jsonl", [{"sentence": "x", "label": 2}]),
     "row 1: label 2 is none of 0 negative, 1 positive"),
    (lambda folder: lines(folder / "train.jsonl", [{"text": "x", "label": 1}]),
     "no column sentence"),
    (lambda folder: (folder / "train.jsonl").write_text("{"), "no JSON"),
])
def test_bad_data_is_one_line_and_writes_nothing(run, world, tmp_path, break_it, words):
    folder = tmp_path / "data" / "sst2"
    for split in ("train", "dev"):
        lines(folder / f"{split}.jsonl", [{"sentence": "x", "label": 1}])
    break_it(folder)
    out = tmp_path / "out"
    result = run("distill", *glue(world, out, f"data={folder.parent}"))
    assert result.exit_code == 1
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert not out.exists()


def test_inputs_that_a_model_cannot_read_show_before_the_training(run, world, tmp_path):
    result = run("distill", *glue(world, tmp_path / "out", "length=512"))
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "length is 512 tokens: this BertForSequenceClassification reads at most" \
        in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]
    assert run("distill", *glue(world, tmp_path / "out")).exit_code == 0


def test_a_model_in_training_is_trained_on_and_packed(run, world, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("distill", *glue(world, first, "scheme=w1a1+estimators")).exit_code == 0
    student = first / "w1a1-estimators" / "model"
    given = [each for each in glue(world, second) if not each.startswith("model=")]
    result = run("distill", *given, f"model={student}", "scheme=w1a8")
    assert result.exit_code == 2 and "is in training already" in result.stderr
    result = run("distill", *given, f"model={student}", "scheme=")
    assert result.exit_code == 0, result.output
    found = read(second / "result.json")
    assert found["packed"]["metrics"] == found["stages"]["teacher"]["metrics"]
    assert packed_weights(AutoModelForSequenceClassification.from_pretrained(second / "packed"))
    assert "# second" in (second / "packed" / "README.md").read_text()


def test_empty_references_show_before_the_training(run, world, tmp_path):
    for split in ("train", "dev"):
        lines(tmp_path / "data" / f"{split}.jsonl", [{"document": "a b", "summary": ""}])
    result = run("distill", "summarization", f"data={tmp_path / 'data'}", "model=new",
                 "profile=small", f"out={tmp_path / 'out'}")
    assert result.exit_code == 1 and "is empty" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_kind_is_left_alone(run, world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    result = run("distill", *glue(world, tmp_path / "out"))
    assert result.exit_code == 1 and "no recipe made it" in result.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_students_other_tokenizer_is_noticed(run, world, tmp_path):
    make_bert(tmp_path / "bert", vocab_size=264)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["bitlm"])
    tokenizer.save_pretrained(tmp_path / "bert")
    result = run("distill", *glue(world, tmp_path / "out", f"student={tmp_path / 'bert'}"))
    assert result.exit_code == 1 and "another tokenizer: 'bitlm'" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_a_larger_model_is_noticed(run, world, tmp_path):
    bert = tmp_path / "bert"
    make_bert(bert, hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=40)
    make_tokenizer().save_pretrained(bert)
    given = [each for each in glue(world, tmp_path / "out") if not each.startswith("model=")]
    result = run("distill", *given, f"model={bert}")
    assert result.exit_code == 2 and "so this is another model's tokenizer" in result.stderr


def test_a_student_without_a_head_gets_one(run, world, tmp_path):
    result = run("distill", *glue(world, tmp_path / "out", f"student={world / 'bert'}"))
    assert result.exit_code == 0, result.output


def test_two_processes_run_the_script(world, tmp_path):
    out = tmp_path / "out"
    script = recipe.find("glue")[0]
    shown = run_two(run_script, script, *glue(world, out, "scheme=w1a1")[1:])
    found = read(out / "result.json")
    assert found["packed"]["metrics"] == found["stages"]["w1a1"]["metrics"]
    assert shown.count("packed: ") == 1
