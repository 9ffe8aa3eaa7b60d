"""Schedules, the guard against values that are not finite, the log, and rows of training data."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bitlm import Scheme, Training
from bitlm.train import callbacks, prepare, rows
from bitlm.train.callbacks import (
    DivergedError,
    EstimatorSchedule,
    JsonlLog,
    first_nonfinite,
    newest_checkpoint,
    read_log,
    seconds_of,
)
from bitlm.train.estimators import ESTIMATORS, fda_noise
from tests.train.test_distill import bert, collate, trainer
from tests.train.test_distill import rows as data


@pytest.mark.parametrize("name", [name for name, own in ESTIMATORS.items() if own.schedule])
def test_estimators_follow_their_schedule(name):
    model = prepare(bert(), Scheme(group_size="row"), training=Training(estimator=name))
    schedule = ESTIMATORS[name].schedule
    for step in (0, 5, 10):
        state = TrainerState(global_step=step, max_steps=10)
        EstimatorSchedule().on_step_begin(None, state, TrainerControl(), model=model)
        own = model.bert.encoder.layer[0].output.dense.weight_quantizer
        assert own.parameter == pytest.approx(schedule(step / 10))
        assert own.amount == pytest.approx(fda_noise(step / 10))
        assert model.config.quantization_config.training["parameter"] == pytest.approx(
            schedule(step / 10))


def test_models_without_a_schedule_are_left_alone():
    for model in (bert(), prepare(bert(), Scheme(group_size="row"))):
        EstimatorSchedule().on_step_begin(None, TrainerState(max_steps=1), TrainerControl(),
                                          model=model)
        assert callbacks.schedule_of(model) is None


def test_a_scheduled_estimator_trains_and_resumes(tmp_path):
    def student():
        return prepare(bert(), Scheme(group_size="row"), training=Training(estimator="ede"))

    options = dict(max_steps=4, save_strategy="steps", save_steps=2, losses=[["task", 1.0]])
    whole = trainer("bert", tmp_path, student=student(), **options)
    whole.train()
    again = trainer("bert", tmp_path, student=student(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.log_history[3]["loss"] == whole.state.log_history[3]["loss"]


def test_a_value_that_is_not_finite_stops_before_the_step(tmp_path):
    made = trainer("bert", tmp_path, [["task", 1.0]], max_steps=4, save_strategy="steps",
                   save_steps=1)
    layer = made.model.bert.encoder.layer[1].attention.output.dense
    calls = []

    def break_third(module, args, output):
        calls.append(1)
        return output * float("nan") if len(calls) >= 3 else output

    layer.register_forward_hook(break_third)
    with pytest.raises(DivergedError) as error:
        made.train()
    text = str(error.value)
    assert "in step 3" in text and "\n" not in text
    assert "came out of bert.encoder.layer.1.attention.output.dense (Linear)" in text
    assert f"the last good checkpoint is {tmp_path / 'checkpoint-2'}" in text
    assert all(bool(p.isfinite().all()) for p in made.model.parameters())


@pytest.mark.parametrize("saved", [dict(save_strategy="steps", save_steps=1),
                                   dict(save_strategy="epoch"), dict(save_strategy="no")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, saved):
    made = trainer("bert", tmp_path, [["task", 1.0]], max_steps=-1, num_train_epochs=2, **saved)
    last = 2 * len(made.get_train_dataloader())

    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == last - 1:
                made.model.classifier.weight.data[0, 0] = float("inf")

    made.add_callback(Overflow())
    kept = {"steps": last - 1, "epoch": last // 2, "no": None}[saved["save_strategy"]]
    after = f"the last good checkpoint is .*checkpoint-{kept}: go on" if kept else \
        "there is no checkpoint yet: start again"
    with pytest.raises(DivergedError, match=f"step {last} was too large: classifier.weight itself "
                                            f"has values that are not finite; {after}"):
        made.train()
    assert not (tmp_path / f"checkpoint-{last}").exists()


def test_a_teacher_that_is_not_finite_is_named(tmp_path):
    made = trainer("bert", tmp_path, [["kl", 1.0]])
    with torch.no_grad():
        made.teacher.classifier.bias.fill_(float("nan"))
    with pytest.raises(DivergedError, match="the teacher's classifier.bias itself has values that "
                                            "are not finite; use another teacher"):
        made.train()


def test_it_says_when_there_is_no_checkpoint_yet(tmp_path):
    made = trainer("bert", tmp_path, [["task", 1.0]])
    with torch.no_grad():
        made.model.classifier.weight.fill_(float("inf"))
    with pytest.raises(DivergedError, match="classifier.weight itself has values that are not "
                                            "finite; there is no checkpoint yet: start again"):
        made.train()


def test_the_first_module_is_named():
    model, batch = bert(), collate(data("bert")[:2])
    assert first_nonfinite(model, [lambda: model(**batch)]) is None
    model.bert.embeddings.register_forward_hook(lambda *args: args[-1] * float("inf"))
    assert "came out of bert.embeddings" in first_nonfinite(model, [lambda: model(**batch)])


def test_a_gradient_alone_is_named(tmp_path):
    made = trainer("bert", tmp_path, [["task", 1.0]])
    made.model.classifier.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(DivergedError, match="every layer's output is finite, but the gradients"):
        made.train()


def test_the_log_goes_on_where_a_checkpoint_was(tmp_path):
    log, control = JsonlLog(tmp_path / "log.jsonl"), TrainerControl()
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)

    def run(first, *steps):
        log.on_train_begin(arguments, TrainerState(global_step=first), control)
        for step in steps:
            log.on_log(arguments, TrainerState(global_step=step), control, logs={"loss": step / 10})

    run(0, 1, 2, 3)
    assert [line["loss"] for line in read_log(log.path)] == [0.1, 0.2, 0.3]
    spent = read_log(log.path)[1]["seconds"]
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')  # a crash
    run(2, 3, 4)
    assert [line["step"] for line in read_log(log.path)] == [1, 2, 3, 4]
    assert read_log(log.path)[2]["seconds"] >= spent
    assert seconds_of(log.path) == read_log(log.path)[-1]["seconds"]
    run(0, 1)
    assert [line["step"] for line in read_log(log.path)] == [1]
    log.on_log(arguments, TrainerState(is_world_process_zero=False), control, logs={})
    assert len(read_log(log.path)) == 1
    assert seconds_of(tmp_path / "none.jsonl") == 0.0


def test_an_unfinished_checkpoint_does_not_count(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    for step in (9, 10, 11):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        text = json.dumps({"global_step": step})
        (folder / "trainer_state.json").write_text(text if step < 11 else text[:5])
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# Rows ---------------------------------------------------------------------------------------------

def test_batches_by_length_are_shuffled_anew_and_alike_for_a_seed():
    lengths = [5 + (7 * number) % 40 for number in range(1000)]
    sampler = rows.ByLength(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(1000)) and first == list(sampler)
    sampler.epoch = 1
    assert list(sampler) != first and sorted(sampler) == list(range(1000))
    batches = [[lengths[row] for row in first[start:start + 8]] for start in range(0, 1000, 8)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    means = torch.tensor([sum(batch) / len(batch) for batch in batches])
    assert abs(float(torch.corrcoef(torch.stack([means, torch.arange(125.0)]))[0, 1])) < 0.3


def test_a_resumed_epoch_has_the_same_order(tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3, losses=[["task", 1.0]],
                   train_sampling_strategy="group_by_length", per_device_train_batch_size=4)
    whole = trainer("bert", tmp_path, **options)  # 4 steps an epoch
    whole.train()
    again = trainer("bert", tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    losses = [[log["loss"] for log in each.state.log_history[:6]] for each in (whole, again)]
    assert losses[0] == losses[1]


def test_noise_is_new_in_each_epoch_and_the_same_after_resuming(tmp_path):
    def made():
        noise = lambda row, random: row | {  # noqa: E731
            "input_ids": [int(each) for each in torch.randint(3, 50, (6,), generator=random)]}
        return trainer("bert", tmp_path, [["task", 1.0]], max_steps=6, save_strategy="steps",
                       save_steps=3, data=rows.Noised(data("bert"), noise, seed=1))

    whole, again = made(), made()
    seen = whole.train_dataset[0]["input_ids"]
    assert whole.train_dataset[0]["input_ids"] == seen
    whole.train()
    assert whole.train_dataset.epoch == 2 and whole.train_dataset[0]["input_ids"] != seen
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    losses = [[log["loss"] for log in each.state.log_history[:6]] for each in (whole, again)]
    assert losses[0] == losses[1]


def test_masked_tokens():
    ids = [1, *range(10, 210), 2]
    made = rows.mask_tokens(ids, rows.generator(0), mask=5, vocabulary=300, special=(1, 2, 5))
    shown, labels = made["input_ids"], made["labels"]
    chosen = [place for place, label in enumerate(labels) if label != -100]
    assert 15 <= len(chosen) <= 45 and all(labels[p] == ids[p] for p in chosen)
    assert all(shown[p] == ids[p] for p in range(len(ids)) if p not in chosen)
    assert shown[0] == 1 and shown[-1] == 2
    masked = sum(shown[p] == 5 for p in chosen)
    assert 0.6 * len(chosen) <= masked < len(chosen)
    made = rows.mask_tokens([1, 10, 2], rows.generator(0), mask=5, vocabulary=300, special=(1, 2))
    assert made["labels"] == [-100, 10, -100]
    assert rows.mask_tokens([1, 2], rows.generator(0), mask=5, vocabulary=9, special=(1, 2)) == {
        "input_ids": [1, 2], "labels": [-100, -100]}


def test_infilling_masks_spans_and_keeps_the_rest_in_order():
    ids, covered, spans = list(range(100, 200)), 0, []
    for seed in range(50):
        shown = rows.infill(ids, rows.generator(seed), mask=7)
        kept = [token for token in shown if token != 7]
        assert kept == sorted(kept) and 60 <= len(kept) <= 100
        assert (7, 7) not in zip(shown, shown[1:])
        covered += len(ids) - len(kept)
        spans.append(shown.count(7))
    assert 0.2 < covered / (50 * 100) < 0.31
    assert 6 < sum(spans) / 50 < 12
    assert rows.infill([], rows.generator(0), mask=7) == []
    assert rows.permute([[1, 2], [3], [4, 5, 6]], rows.generator(1)) != [1, 2, 3, 4, 5, 6] or \
        rows.permute([[1, 2], [3], [4, 5, 6]], rows.generator(2)) != [1, 2, 3, 4, 5, 6]


def test_pairs_are_cut():
    tokenizer = SimpleNamespace()
    from tests.tiny import make_tokenizer
    tokenizer = make_tokenizer()
    [row] = rows.pairs(tokenizer, ["abcdefgh"], ["xyz"], 5, 3, prefix="p ")
    assert len(row["input_ids"]) == len(row["attention_mask"]) == 5 and len(row["labels"]) == 3
    assert row["input_ids"][:2] == tokenizer("p ")["input_ids"][:2]


def test_rows_are_kept_as_numbers_of_32_bits(monkeypatch):
    lists = [[1, 2, 3], [], [70000, 5]]
    held = rows.Encoded(input_ids=iter(lists), labels=[[9], [8, 7], []])
    assert [row["input_ids"] for row in held] == lists and len(held) == 3
    assert held[2] == {"input_ids": [70000, 5], "labels": [], "attention_mask": [1, 1]}
    assert held.tokens["input_ids"].itemsize == 4 and rows.lengths(held) == [3, 0, 2]
    assert rows.largest_token(held, ["input_ids"]) == 70000
    assert rows.largest_token(held, ["labels"]) == 9
    windows = rows.Windows(torch.tensor([[1, 2], [3, 4]]))
    assert list(windows[1].values()) == [[3, 4], [3, 4]] and rows.lengths(windows) == [2, 2]
    assert rows.largest_token(windows, ["input_ids"]) == 4
    from tests.tiny import make_tokenizer
    texts = [f"text {number}" for number in range(7)]
    whole = list(rows.pairs(make_tokenizer(), texts, texts[::-1], 9, 9))
    monkeypatch.setattr(rows, "TOGETHER", 3)
    assert list(rows.pairs(make_tokenizer(), texts, texts[::-1], 9, 9)) == whole
    with pytest.raises(ValueError, match="7 sources have 6 targets"):
        rows.pairs(make_tokenizer(), texts, texts[1:], 9, 9)


def test_lengths_of_rows():
    assert rows.lengths([{"input_ids": [1, 2]}, {"input_ids": [3]}]) == [2, 1]
    assert rows.lengths(rows.Noised(["ab", "c"], None, seed=0)) == [2, 1]
