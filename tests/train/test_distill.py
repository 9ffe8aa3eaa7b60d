"""The distilling trainers: what a loss is, on however many batches and processes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from bitlm import Scheme
from bitlm.quantizers import initialise
from bitlm.train import losses as L
from bitlm.train import prepare, terms
from bitlm.train.distill import (
    DistillTrainer,
    Seq2SeqDistillTrainer,
    TeacherError,
    parameter_groups,
)
from bitlm.train.estimators import ESTIMATORS, biper_penalty, row_unit
from bitlm.train.layers import fake_quant_layers
from bitlm.train.terms import KINDS, REGULARISERS, Batch, LossError, Views, read
from bitlm.train.weights import second_basis
from tests.processes import run_two

CHECK = ("task", "kl", "soft_cross_entropy", "plackett_luce", "hidden_mse", "attention_mse",
         "low_rank_mimicking", "relations", "direction_matching")
ALL = [[name, weight] for name, weight in zip(CHECK, (1, .5, .4, .3, .2, 10, .1, 2, 3))]


def bert(seed: int = 0, **changes) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                 num_attention_heads=2, max_position_embeddings=32, num_labels=3,
                 hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3)
    return BertForSequenceClassification(BertConfig(**(sizes | changes)))


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        initializer_range=0.3, attn_implementation="eager"))


def bart(seed: int = 0) -> BartForConditionalGeneration:
    torch.manual_seed(seed)
    return BartForConditionalGeneration(BartConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0,
        max_position_embeddings=32, init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2))


def rows(kind: str, count: int = 16) -> list[dict]:
    """Rows of unequal length: 3 to 9 tokens."""
    random = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        ids = torch.randint(3, 50, (3 + (5 * number) % 7,), generator=random).tolist()
        targets = torch.randint(3, 50, (2 + (3 * number) % 5,), generator=random).tolist()
        labels = {"bert": number % 3, "llama": ids, "gpt2": ids, "bart": targets}[kind]
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(batch: list[dict]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in batch)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"]))
                        for row in batch])
    labels = [row["labels"] for row in batch]
    if not isinstance(labels[0], int):
        wide = max(map(len, labels))
        labels = [each + [-100] * (wide - len(each)) for each in labels]
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor(labels)}


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=50, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.3, attn_implementation="eager"))


MODELS = {"bert": bert, "llama": llama, "bart": bart}


def trainer(kind: str, folder, losses=ALL, student=None, teacher=None, data=None, measure=None,
            **options):
    steps = dict(max_steps=2, per_device_train_batch_size=8, learning_rate=0.05, optim="sgd",
                 max_grad_norm=0.0, lr_scheduler_type="constant", logging_steps=1,
                 save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
                 train_sampling_strategy="sequential", weight_decay=0.0)
    arguments = TrainingArguments(str(folder), **(steps | options))
    made = Seq2SeqDistillTrainer if kind == "bart" else DistillTrainer
    if kind == "bart":
        from transformers import Seq2SeqTrainingArguments
        arguments = Seq2SeqTrainingArguments(str(folder), **(steps | options))
    return made(model=student or MODELS[kind](0), args=arguments, data_collator=collate,
                train_dataset=data or rows(kind), losses=losses, measure=measure,
                teacher=teacher or MODELS[kind](1))


def trained(*args, **options) -> tuple[dict[str, Tensor], list[dict]]:
    done = trainer(*args, **options)
    done.train()
    return done.model.state_dict(), [log for log in done.state.log_history if "loss" in log]


def equal(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=tolerance, atol=tolerance,
                                   msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", MODELS)
def test_losses_do_not_depend_on_how_a_batch_is_cut(kind, tmp_path):
    whole, logs = trained(kind, tmp_path)
    cut, cut_logs = trained(kind, tmp_path, per_device_train_batch_size=2,
                            gradient_accumulation_steps=4)
    equal(whole, cut)
    assert len(logs) == len(cut_logs) == 2
    for log, other in zip(logs, cut_logs):
        for name in ("loss", *CHECK):
            assert log[name] == pytest.approx(other[name], rel=1e-4), name
    assert any((whole[name] != value).any() for name, value in MODELS[kind](0).state_dict().items())


def test_a_class_without_a_loss_type_shifts_its_labels_too(tmp_path):
    losses = [["task", 1.0], ["kl", 1.0], ["plackett_luce", 1.0], ["attention_mse", 1.0]]
    found = []
    for size in (8, 2):
        made = trainer("gpt2", tmp_path, losses, gpt2(0), gpt2(1), per_device_train_batch_size=size,
                       gradient_accumulation_steps=8 // size)
        made.train()
        found.append([log for log in made.state.log_history if "loss" in log])
    assert terms.is_causal(gpt2()) and not terms.is_causal(bart())
    for log, other in zip(*found, strict=True):
        for name in ("loss", *(name for name, _ in losses)):
            assert log[name] == pytest.approx(other[name], rel=1e-4), name


def test_an_image_classifier_learns_from_a_teacher(tmp_path):
    def vit(seed):
        torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(
            image_size=8, patch_size=4, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_labels=3, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0))

    random = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 8, 8, generator=random), "labels": n % 3}
            for n in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", logging_steps=1, remove_unused_columns=False)
    student = prepare(vit(0), Scheme(group_size="row"), placement=("tbt", 1))
    made = DistillTrainer(model=student, teacher=vit(1), args=arguments, train_dataset=data,
                          losses=[["kl", 1.0]])
    made.train()
    assert made.state.log_history[0]["kl"] > 0
    made = DistillTrainer(model=vit(0), teacher=vit(1), args=arguments, train_dataset=data,
                          losses=[["hidden_mse", 1.0]])
    with pytest.raises(LossError, match="have no tokens"):
        made.train()


def test_an_optimizer_that_is_given_is_the_one(tmp_path):
    made = DistillTrainer(model=llama(), args=TrainingArguments(str(tmp_path), report_to=[],
                                                                use_cpu=True),
                          optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.5}))
    made.create_optimizer()
    assert type(made.optimizer) is torch.optim.SGD and made.optimizer.defaults["lr"] == 0.5


def test_each_value_is_that_of_the_losses_on_the_whole_batch(tmp_path):
    _, logs = trained("bert", tmp_path, max_steps=1, per_device_train_batch_size=2,
                      gradient_accumulation_steps=4)
    batch = collate(rows("bert")[:8])
    student, teacher = bert(0), bert(1)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        s, t = student(**batch, **asked), teacher(**batch, **asked)
    tokens = batch["attention_mask"]
    expected = {
        "task": cross_entropy(s.logits, batch["labels"]),
        "kl": L.kl(s.logits, t.logits).mean(),
        "soft_cross_entropy": L.soft_cross_entropy(s.logits, t.logits).mean(),
        "plackett_luce": L.plackett_luce(s.logits, t.logits, batch["labels"]).mean(),
        "hidden_mse": L.hidden_mse(s.hidden_states, t.hidden_states, tokens).mean(),
        "attention_mse": L.attention_mse(s.attentions, t.attentions,
                                         L.pairs_of_tokens(tokens)).mean(),
    }
    for name, value in expected.items():
        assert logs[0][name] == pytest.approx(float(value), rel=1e-4), name
    weights = {name: weight for name, weight in ALL}
    assert logs[0]["loss"] == pytest.approx(sum(weights[n] * logs[0][n] for n in CHECK), rel=1e-4)


def test_an_encoder_decoder_counts_its_sides_apart(tmp_path):
    _, logs = trained("bart", tmp_path, [["hidden_mse", 1.0], ["attention_mse", 1.0],
                                         ["hidden_mse", 1.0, {"side": "encoder",
                                                              "layers": "last"}]], max_steps=1)
    batch = collate(rows("bart")[:8])
    student, teacher = bart(0), bart(1)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        s, t = student(**batch, **asked), teacher(**batch, **asked)
    tokens, targets = batch["attention_mask"], batch["labels"] != -100
    encoder = L.hidden_mse(s.encoder_hidden_states, t.encoder_hidden_states, tokens).mean()
    decoder = L.hidden_mse(s.decoder_hidden_states, t.decoder_hidden_states, targets).mean()
    last = L.hidden_mse(s.encoder_hidden_states[-1:], t.encoder_hidden_states[-1:], tokens).mean()
    maps = (L.attention_mse(s.encoder_attentions, t.encoder_attentions,
                            L.pairs_of_tokens(tokens)).mean()
            + L.attention_mse(s.decoder_attentions, t.decoder_attentions,
                              L.pairs_of_tokens(targets, causal=True)).mean()
            + L.attention_mse(s.cross_attentions, t.cross_attentions,
                              L.pairs_of_tokens(targets, tokens)).mean())
    assert logs[0]["hidden_mse"] == pytest.approx(float(encoder + decoder), rel=1e-4)
    assert logs[0]["hidden_mse_2"] == pytest.approx(float(last), rel=1e-4)
    assert logs[0]["attention_mse"] == pytest.approx(float(maps), rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, _ = trained("bert", tmp_path)
    kept, _ = trained("bert", tmp_path, gradient_checkpointing=True,
                      gradient_checkpointing_kwargs={"use_reentrant": False})
    equal(plain, kept)


def test_bf16_is_near_float32(tmp_path):
    plain, logs = trained("bert", tmp_path)
    half, half_logs = trained("bert", tmp_path, bf16=True)
    assert logs[0]["loss"] == pytest.approx(half_logs[0]["loss"], rel=0.1)
    assert half["classifier.weight"].dtype == torch.float32


def test_a_resumed_training_has_the_same_losses(tmp_path):
    options = dict(max_steps=6, save_strategy="steps", save_steps=3, optim="adamw_torch",
                   learning_rate=1e-3, train_sampling_strategy="random",
                   student=bert(0, hidden_dropout_prob=0.1))
    _, logs = trained("bert", tmp_path, **options)
    again = trainer("bert", tmp_path, **options | {"student": bert(2, hidden_dropout_prob=0.1)})
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    after = [log for log in again.state.log_history if "loss" in log]
    assert [log["step"] for log in after] == [1, 2, 3, 4, 5, 6]
    for log, other in zip(logs[3:], after[3:]):
        for name in ("loss", *CHECK):
            assert log[name] == pytest.approx(other[name], rel=1e-6), name


def test_a_binary_student_learns_from_its_teacher(tmp_path):
    student = prepare(bert(1), Scheme(group_size="row"), placement=("bipft", 1))
    _, logs = trained("bert", tmp_path, [["kl", 1.0], ["hidden_mse", 0.1]], student=student,
                      teacher=bert(1), max_steps=60, optim="adamw_torch", learning_rate=3e-3)
    first, last = (sum(log["kl"] for log in part) for part in (logs[:5], logs[-5:]))
    assert last < first / 2


def test_the_teacher_does_not_change(tmp_path):
    teacher = bert(1, hidden_dropout_prob=0.5)
    before = copy.deepcopy(teacher.state_dict())
    _, one = trained("bert", tmp_path, teacher=teacher)
    _, two = trained("bert", tmp_path, teacher=bert(1))
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    equal(before, teacher.state_dict(), 0)
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], rel=1e-6)  # no dropout in the teacher


def test_evaluation_shows_what_is_measured(tmp_path):
    scores = iter([0.2, 0.9, 0.4])
    made = trainer("bert", tmp_path, eval_strategy="steps", eval_steps=1, save_strategy="steps",
                   save_steps=1, metric_for_best_model="agreement", greater_is_better=True,
                   load_best_model_at_end=True, max_steps=3,
                   measure=lambda model: {"agreement": next(scores)})
    made.train()
    found = [log["eval_agreement"] for log in made.state.log_history if "eval_agreement" in log]
    assert found == [0.2, 0.9, 0.4]
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")


def test_the_evaluation_loss_is_the_tasks(tmp_path):
    made = trainer("bert", tmp_path)
    made.eval_dataset = rows("bert")
    with torch.no_grad():
        batch = collate(rows("bert"))
        expected = cross_entropy(made.model.eval()(batch["input_ids"],
                                                   batch["attention_mask"]).logits,
                                 batch["labels"])
    assert made.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_parameters_of_quantizers_have_a_group_of_their_own():
    from bitlm.quantizers import build
    from bitlm.scheme import Quantizer

    model = bert()
    model.bert.pooler.dense.input = build(Quantizer(move=True), 16, "input")
    groups = parameter_groups(model, ["classifier.weight", "bert.pooler.dense.input.move"], 0.01,
                              1e-4)
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    assert sizes == [3 * 16, sum(p.numel() for p in model.parameters()) - 3 * 16 - 17, 17]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0, 0.0]
    assert [group.get("lr") for group in groups] == [None, None, 1e-4]


@pytest.mark.parametrize("losses, words", [
    ([["kl2", 1.0]], "unknown loss 'kl2', did you mean kl?"),
    ([["kl", "much"]], "the weight of kl is 'much'"),
    ([["kl", 1.0, {"temp": 2}]], "kl has no option 'temp': it has temperature"),
    ([], "there is no loss"),
    (["kl"], "'kl' is no loss"),
    ([["task", 1.0, {"over": "sum"}]], "task has no option 'over': it has none"),
])
def test_losses_that_do_not_exist(losses, words):
    with pytest.raises(LossError, match="(?i)" + words.replace("?", r"\?")):
        read(losses)


def test_terms_have_labels_of_their_own():
    terms = read([["kl", 1], ["kl", 0.5, {"temperature": 2.0}], ["second_basis", 0.09]])
    assert [term.label for term in terms] == ["kl", "kl_2", "second_basis"]
    assert set(CHECK) | {"logits_mse"} == set(KINDS) and set(REGULARISERS) == {"biper",
                                                                             "second_basis"}


@pytest.mark.parametrize("teacher, words", [
    (lambda: bert(1, vocab_size=60), "the teacher's vocabulary has 60 tokens, the student's 50"),
    (lambda: bert(1, num_labels=2), "the teacher has 2 labels, the student 3"),
    (lambda: bert(1, id2label={0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2"}), "in the order"),
    (bart, "one of teacher and student is an encoder-decoder"),
])
def test_teachers_that_do_not_fit(teacher, words, tmp_path):
    with pytest.raises(TeacherError, match=words):
        trainer("bert", tmp_path, teacher=teacher())


def test_a_student_is_not_its_own_teacher(tmp_path):
    model = bert()
    with pytest.raises(TeacherError, match="are one model"):
        trainer("bert", tmp_path, student=model, teacher=model)
    with pytest.raises(TeacherError, match="need a teacher"):
        DistillTrainer(model=model, args=TrainingArguments(str(tmp_path), report_to=[],
                                                           use_cpu=True), losses=ALL)


def test_another_tokenizer_is_named(tmp_path):
    from bitlm.train.distill import check_tokenizers
    from tests.tiny import make_tokenizer

    one, two = make_tokenizer(), make_tokenizer()
    check_tokenizers(one, two)
    two.add_tokens(["bitlm"])
    with pytest.raises(TeacherError, match="another tokenizer: 'bitlm' is its 259"):
        check_tokenizers(one, two)


def test_one_output_needs_the_difference_of_logits(tmp_path):
    data = [row | {"labels": float(row["labels"])} for row in rows("bert")]

    def floats(batch):
        made = collate([row | {"labels": 0} for row in batch])
        return made | {"labels": torch.tensor([row["labels"] for row in batch])}

    made = trainer("bert", tmp_path, [["kl", 1.0]], bert(num_labels=1), bert(1, num_labels=1))
    made.data_collator, made.train_dataset = floats, data
    with pytest.raises(LossError, match="logits_mse"):
        made.train()
    made = trainer("bert", tmp_path, [["task", 1.0], ["logits_mse", 1.0]], bert(num_labels=1),
                   bert(1, num_labels=1), max_steps=1)
    made.data_collator, made.train_dataset = floats, data
    made.train()
    batch = floats(data[:8])
    with torch.no_grad():
        s, t = (model(batch["input_ids"], batch["attention_mask"]).logits
                for model in (bert(num_labels=1), bert(1, num_labels=1)))
    log = made.state.log_history[0]
    assert log["logits_mse"] == pytest.approx(float((s - t).square().mean()), rel=1e-4)
    assert log["task"] == pytest.approx(float((s[:, 0] - batch["labels"]).square().mean()),
                                        rel=1e-4)


@pytest.mark.parametrize("training, planes, loss, first", [
    ({"learned": True}, 2, ["second_basis", 0.5], None),
    ({"estimator": "biper"}, 1, ["biper", 0.5, {"first": 2.0, "last": 4.0}], 2.0),
])
def test_regularisers_count_once_a_step(training, planes, loss, first, tmp_path):
    def student():
        return prepare(bert(), Scheme(group_size="row", planes=planes), training=training)

    terms = [["task", 1.0], loss]
    whole, logs = trained("bert", tmp_path, terms, student=student())
    cut, cut_logs = trained("bert", tmp_path, terms, student=student(),
                            per_device_train_batch_size=2, gradient_accumulation_steps=4)
    equal(whole, cut)
    assert logs[0][loss[0]] == pytest.approx(cut_logs[0][loss[0]], rel=1e-5)
    assert logs[0]["loss"] == pytest.approx(logs[0]["task"] + 0.5 * logs[0][loss[0]], rel=1e-5)
    if first is None:
        assert logs[0][loss[0]] == pytest.approx(second_basis(student()).item(), rel=1e-5)
    else:
        penalties = [biper_penalty(layer.weight, ESTIMATORS["biper"].normalised,
                                   row_unit(layer.weight))
                     for layer in fake_quant_layers(student()).values()]
        expected = first * torch.stack(penalties).mean().item()
        assert logs[0][loss[0]] == pytest.approx(expected, rel=1e-5)
        assert logs[1][loss[0]] > 0.5 * logs[0][loss[0]]


def test_regularisers_need_such_weights(tmp_path):
    for name in ("biper", "second_basis"):
        with pytest.raises(ValueError, match="no weight"):
            trainer("bert", tmp_path, [[name, 1.0]]).train()


def test_a_micro_batch_without_labels_counts_nothing(tmp_path):
    data = rows("llama", 4)
    data[0]["labels"] = [-100] * len(data[0]["labels"])
    whole, logs = trained("llama", tmp_path, [["task", 1.0], ["kl", 1.0]], data=data, max_steps=1,
                          per_device_train_batch_size=4)
    cut, cut_logs = trained("llama", tmp_path, [["task", 1.0], ["kl", 1.0]], data=data,
                            max_steps=1, per_device_train_batch_size=1,
                            gradient_accumulation_steps=4)
    equal(whole, cut)
    assert logs[0]["loss"] == pytest.approx(cut_logs[0]["loss"], rel=1e-5)


def train_in_two(folder: str) -> None:
    state, logs = trained("bart", folder, per_device_train_batch_size=2,
                          gradient_accumulation_steps=2)
    if torch.distributed.get_rank() == 0:
        torch.save((state, logs), f"{folder}/done.pt")


def test_two_processes_give_what_one_gives(tmp_path):
    run_two(train_in_two, str(tmp_path))
    state, logs = torch.load(tmp_path / "done.pt", weights_only=True)
    whole, whole_logs = trained("bart", tmp_path)
    equal(whole, state)
    for log, other in zip(whole_logs, logs):
        for name in ("loss", *CHECK):
            assert log[name] == pytest.approx(other[name], rel=1e-4), name


# Parameters sharded over processes, by fully_shard itself: on CPUs accelerate's FSDP is DDP.

def student_and_teacher():
    student = prepare(bert(0), Scheme(group_size="row"), placement=("bipft", 1))
    initialise(student, **collate(rows("bert")))
    return student.train(), bert(1).eval().requires_grad_(False)


def steps(student, teacher, optimizer, numbers, rank=0, processes=1) -> list[float]:
    """Train on 8 rows a step, shared by the processes; return the losses."""
    wanted, found = read([["task", 1.0], ["kl", 0.5], ["hidden_mse", 0.2]]), []
    for number in numbers:
        own = rows("bert")[8 * (number % 2):][:8][rank::processes]
        batch = Batch(collate(own))
        asked = {"output_hidden_states": True}
        with torch.no_grad():
            taught = teacher(**batch.inputs, **asked)
        views = Views(batch, student(**batch.inputs, **asked), taught)
        counts = torch.stack([batch.count(mask) for mask in terms.masks(wanted, False)])
        if processes > 1:
            torch.distributed.all_reduce(counts)
        totals = dict(zip(terms.masks(wanted, False), counts.tolist()))
        values = terms.values(wanted, views, totals)
        loss = sum(term.weight * values[term.label] for term in wanted)
        (loss * processes).backward()  # gradients of processes are averaged
        optimizer.step()
        optimizer.zero_grad()
        shown = loss.detach().clone()
        if processes > 1:
            torch.distributed.all_reduce(shown)
        found.append(float(shown))
    return found


def train_sharded(folder: str) -> None:
    """Train 5 steps, and the last 2 of them again from what was saved before."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo")
    rank, mesh = torch.distributed.get_rank(), init_device_mesh("cpu", (2,))

    def made():
        models = student_and_teacher()
        for model in models:
            for layer in (*model.bert.encoder.layer, model):
                fully_shard(layer, mesh=mesh)
            assert all(isinstance(p, DTensor) for p in model.parameters())
        return *models, torch.optim.SGD(models[0].parameters(), lr=0.05, momentum=0.9)

    student, teacher, optimizer = made()
    first = steps(student, teacher, optimizer, range(3), rank, 2)
    saved = dict(zip(("model", "optimizer"), states.get_state_dict(student, optimizer)))
    checkpoint.save(saved, checkpoint_id=f"{folder}/checkpoint")
    rest = steps(student, teacher, optimizer, range(3, 5), rank, 2)
    whole = states.get_model_state_dict(student, options=states.StateDictOptions(
        full_state_dict=True))

    student, teacher, optimizer = made()
    saved = dict(zip(("model", "optimizer"), states.get_state_dict(student, optimizer)))
    checkpoint.load(saved, checkpoint_id=f"{folder}/checkpoint")
    states.set_state_dict(student, optimizer, model_state_dict=saved["model"],
                          optim_state_dict=saved["optimizer"])
    again = steps(student, teacher, optimizer, range(3, 5), rank, 2)
    if rank == 0:
        torch.save((first, rest, again, whole), f"{folder}/done.pt")


def test_a_sharded_student_trains_saves_and_resumes_as_a_whole_one(tmp_path):
    run_two(train_sharded, str(tmp_path))
    first, rest, again, state = torch.load(tmp_path / "done.pt", weights_only=True)
    assert rest == again
    student, teacher = student_and_teacher()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    whole = steps(student, teacher, optimizer, range(5))
    assert whole[:3] == pytest.approx(first, rel=1e-4)
    assert len({round(loss, 4) for loss in whole}) > 3
    assert set(state) == set(student.state_dict())
