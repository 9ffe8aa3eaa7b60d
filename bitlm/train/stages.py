"""A recipe's work in stages: fine-tune the teacher, distil one student after the other, pack.

    out/settings.json          what a resume must agree with
    out/teacher/               model/ (dense), log.jsonl, result.json
    out/w1a8/                  the same; model/ is a checkpoint in training
    out/w1a1/ ...              each student is the next one's teacher and its first weights (BiT)
    out/packed/                the last student, packed
    out/result.json            metrics, settings, seconds
    out/valid.jsonl            the rows to measure on, where the recipe makes them (denoise)

With scheme "" there is a teacher only, for several runs that shall have the same one; a model that
is in training already is so trained on, and packed. A stage is done when its result.json is there;
until then it has checkpoints/, from the newest of which it goes on when the same command is run
again.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    SchedulerType,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_tensorboard_available

from .. import __version__ as version
from .. import source
from ..attention import Estimators, attention_modules
from ..methods import EncodeError
from ..output import publish_modes, whole
from ..quantizers import ActivationQuantizer
from ..scheme import Training, embedding_scheme
from . import terms
from .callbacks import TEACHERS, DivergedError, JsonlLog, newest_checkpoint, seconds_of
from .convert import finish, prepare
from .distill import DistillTrainer, Seq2SeqDistillTrainer, check_tokenizers
from .layers import fake_quant_layers
from .recipe import RecipeError, Settings, plain, scheme_names
from .rows import largest_token
from .schemes import Request, request
from .weights import WeightQuantizer
from .work import LOG, RESULT, is_main, make, on_cpu, result, wait, work, write

VALID = "valid.jsonl"
# Settings that must be 1 at least, and those that may be negative.
COUNTS = ("batch", "accumulate", "log_every", "save_every", "eval_batch", "length",
          "summary_length", "target_length", "beams", "max_length")
SIGNED = ("dropout", "length_penalty")
Say = Callable[[str], None]


@dataclass
class Job:
    """What a recipe gives to `run`.

    load: a folder or hub id -> the model, dense, in training or packed. tokenizer: of all models.
    rows: training data. collate: model -> collator. measure: (model, quick) -> scores by name;
    quick: while it trains. headline: the score that counts. lower: a smaller one is better. valid:
    the rows that are measured, where no file has them; they are kept for `bitlm evaluate`. check:
    raises for a model that cannot be trained or measured so, before it is.
    """

    load: Callable[[str], PreTrainedModel]
    tokenizer: Any
    rows: Sequence[dict[str, Any]]
    collate: Callable[[PreTrainedModel], Callable]
    measure: Callable[[nn.Module, bool], Mapping[str, float]]
    headline: str
    lower: bool = False
    valid: Sequence[dict[str, Any]] = ()
    check: Callable[[nn.Module], None] | None = None


def run(settings: Settings, job: Job, say: Say | None = None) -> dict[str, Any]:
    """Train the teacher and the students of a recipe, pack the last one, return result.json.

    What is done already is not done again. say: gets a line for each stage, and lets Trainer show
    its progress. Several processes share the training; the first one writes, the others return {}.
    Raises RecipeError for settings, JobError for an output folder that stands in the way or was
    made with other settings, LossError, TeacherError and DivergedError as the trainers do.
    """
    top, names = check(settings)
    say = say if say and is_main() else _silent
    out = Path(top.out)
    with work(out, settings, names):
        done = result(out)
        if done is not None:
            say(f"{out} is finished already: {RESULT} has its scores")
            return done
        if job.valid and is_main():
            (out / VALID).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n"
                                             for row in job.valid), "utf-8")
        prepared = not top.teacher.model and in_training(top.model)
        if prepared and names:
            raise RecipeError(f"{top.model} is in training already, with weights as it says: train "
                              "it on with scheme=, or make students of a dense model")
        if in_training(top.student) and len(names) > 1:
            raise RecipeError(f"{top.student} is in training, as one scheme says: go on with "
                              f"scheme={names[0]}, and make the next student of a dense model")
        start, results = time.perf_counter(), {}
        folder, results["teacher"] = _teacher(settings.at(), job, out, say)
        dense = top.student or folder
        for name in names:
            results[name] = _student(settings.at(scheme=name), job, out / _folder(name), dense,
                                     folder, say)
            folder = str(out / _folder(name) / "model")
        if not is_main():
            return {}
        packed = _packed(job, folder, out / "packed", settings.recipe) \
            if names or prepared else None
        done = {"recipe": settings.recipe, "profile": settings.profile, "settings": plain(top),
                "stages": results, "packed": packed,
                "seconds": sum(each["seconds"] for each in results.values()),
                "wall_seconds": time.perf_counter() - start, "versions": _versions()}
        write(out / RESULT, done)
        if packed:
            say(f"packed: {out / 'packed'}, {_shown(packed['metrics'])}")
        return done


def in_training(model: str) -> bool:
    """Tell whether a folder or hub id is a checkpoint of the stage "training"."""
    if not model or not (Path(model) / "config.json").is_file():
        return False
    config = json.loads((Path(model) / "config.json").read_text("utf-8"))
    return (config.get("quantization_config") or {}).get("stage") == "training"


def check(settings: Settings) -> tuple[SimpleNamespace, list[str]]:
    """Return the settings and the schemes of the stages; raises RecipeError and LossError for what
    would fail in any of them."""
    top = settings.at()
    if not top.out:
        raise RecipeError("say where to write: out=FOLDER")
    names = scheme_names(top.scheme)
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated:
        raise RecipeError(f"scheme {repeated!r} comes twice: each stage has a folder of its name")
    for name in names:
        own = settings.at(scheme=name)
        _check_losses(terms.read(own.losses), request(own))
        if not own.epochs and not own.steps:
            raise RecipeError(f"{name} would not train: set epochs or steps")
        _check_numbers(own, "")
    _check_numbers(top, "")
    _check_numbers(top.teacher, "teacher.")
    return top, names


def _check_losses(losses: Sequence[terms.Term], asked: Request) -> None:
    names = {term.name for term in losses}
    if "biper" in names and asked.training.estimator != "biper":
        raise RecipeError("the loss biper is for estimator=biper: leave it out")
    if "second_basis" in names and not (asked.training.learned and asked.scheme.planes == 2):
        raise RecipeError("the loss second_basis is for weights=two_bases: leave it out")


def _check_numbers(settings: SimpleNamespace, prefix: str) -> None:
    for key, value in vars(settings).items():
        least = 1 if key in COUNTS else 0
        if key not in SIGNED and isinstance(value, int | float) and value < least:
            raise RecipeError(f"{prefix}{key} is {value}: use {least} or more")
    if getattr(settings, "patience", 0) and not settings.eval_every:
        raise RecipeError(f"{prefix}patience is {settings.patience}, but nothing is measured in "
                          f"training: set {prefix}eval_every too")
    if getattr(settings, "dropout", 0) >= 1:
        raise RecipeError(f"dropout is {settings.dropout}: use less than 1")
    schedules = [each.value for each in SchedulerType]
    if settings.schedule not in schedules:
        raise RecipeError(f"unknown schedule {settings.schedule!r}: use one of "
                          f"{', '.join(schedules)}")


# --- stages --------------------------------------------------------------------------------------

def _teacher(settings: SimpleNamespace, job: Job, out: Path, say: Say) -> tuple[str, dict]:
    """Return folder or id of the teacher, and its result; it is fine-tuned if it shall train."""
    folder = out / "teacher"
    own = SimpleNamespace(**vars(settings) | vars(settings.teacher))
    trains = not settings.teacher.model and (own.epochs or own.steps)
    source = str(folder / "model") if trains else settings.teacher.model or settings.model
    found = result(folder)
    if found is None and trains:
        say(f"teacher: training {settings.model}")
        set_seed(own.seed)
        found = _train(job.load(settings.model), None, [["task", 1.0]], own, job, folder, say,
                       "model=CHECKPOINT teacher.lr=LOWER")
    elif found is None:
        make(folder)
        found = {"metrics": dict(job.measure(job.load(source), False)), "steps": 0, "seconds": 0.0}
        write(folder / RESULT, found)
        wait()
    say(f"teacher: {_shown(found['metrics'])}")
    return source, found


def _student(settings: SimpleNamespace, job: Job, folder: Path, dense: str, source: str, say: Say
             ) -> dict[str, Any]:
    """Distil one student from the teacher in `source`, whose weights it begins with."""
    found = result(folder)
    if found is None:
        say(f"{settings.scheme}: distilling from {source}")
        set_seed(settings.seed)
        teacher, student = job.load(source), job.load(dense)
        asked = request(settings)
        if fake_quant_layers(student) and dense == source:
            raise RecipeError(f"the teacher {source} is in training itself: name the dense model "
                              "that its student is made from, student=DIR")
        if fake_quant_layers(student):  # a checkpoint
            _check_prepared(student, asked, dense, settings)
        else:
            chained = source != dense and bool(fake_quant_layers(teacher))
            if chained:
                own = teacher.state_dict()
                student.load_state_dict({name: own[name] for name in student.state_dict()})
            prepare(student, asked.scheme, training=asked.training, placement=asked.placement,
                    skip=settings.skip, embeddings=asked.embeddings)
            if chained:
                carry_quantizers(teacher, student)
        _set_dropout(student, settings.dropout)
        if not terms.need_teacher(terms.read(settings.losses)):
            teacher = None
        found = _train(student, teacher, settings.losses, settings, job, folder, say,
                       f"student=CHECKPOINT teacher.model={shlex.quote(source)} "
                       f"scheme={settings.scheme} lr=LOWER")
    say(f"{settings.scheme}: {_shown(found['metrics'])}, {found['seconds']:.0f} s")
    return found


def _check_prepared(student: PreTrainedModel, asked: Request, name: str,
                    settings: SimpleNamespace) -> None:
    """Raise RecipeError for a student in training that is not what a stage asks for."""
    config, placed = student.config.quantization_config, asked.placement
    made, training = config.request, Training.from_dict(config.training or {})
    attention = {"": placed.attention} if placed and attention_modules(student)[0] else {}
    embeddings = asked.embeddings
    if isinstance(embeddings, int):
        embeddings = embedding_scheme(embeddings)
    wanted = {
        "weights or activations": (made.scheme, asked.scheme if placed is None else
                                   asked.scheme.replace(input=placed.inputs)),
        # Schedules move the parameter.
        "estimator": (replace(training, parameter=asked.training.parameter), asked.training),
        "attention": (made.attention, attention), "embeddings": (made.embeddings, embeddings),
        "skip": (set(settings.skip) - set(made.skip), set())}
    other = next((what for what, (own, theirs) in wanted.items() if own != theirs), None)
    if other:
        raise RecipeError(f"{name} is in training with other {other} than {settings.scheme} with "
                          "these settings: use those that it was made with, or a dense student")


@torch.no_grad()
def carry_quantizers(source: nn.Module, target: nn.Module) -> None:
    """Give a prepared model what fits it of another one's quantizers and estimators, in place.

    Activation steps count where both round alike, moves and estimators everywhere, learned scales
    where the codes are of one kind: then BinaryDM's first basis goes on where the second is
    dropped.
    """
    others = dict(source.named_modules())
    for name, module in target.named_modules():
        other = others.get(name)
        if isinstance(module, ActivationQuantizer) and isinstance(other, ActivationQuantizer):
            wanted = None if module.spec == other.spec else ("move",)
        elif isinstance(module, WeightQuantizer) and type(module) is type(other):
            wanted = None if all(getattr(module.scheme, name) == getattr(other.scheme, name)
                                 for name in ("method", "center", "levels", "group_size")) else ()
        elif isinstance(module, Estimators) and isinstance(other, Estimators):
            wanted = None
        else:
            continue
        own, theirs = module.state_dict(), other.state_dict()
        fitting = {leaf: theirs[leaf] for leaf in own
                   if (wanted is None or leaf in wanted) and leaf in theirs
                   and own[leaf].shape == theirs[leaf].shape}
        module.load_state_dict(fitting, strict=False)


def _train(model: PreTrainedModel, teacher: PreTrainedModel | None, losses: Sequence,
           settings: SimpleNamespace, job: Job, folder: Path, say: Say, again: str
           ) -> dict[str, Any]:
    """Train a model in a stage's folder, keep the best of it, and return the stage's result.

    again: the settings that go on from CHECKPOINT with a lower rate.
    """
    if job.check:
        job.check(model)
    _check_vocabulary(job, model)
    make(folder)
    checkpoints, pair = folder / "checkpoints", model.config.is_encoder_decoder
    caches = getattr(model.config, "use_cache", None)
    trainer = (Seq2SeqDistillTrainer if pair else DistillTrainer)(
        model=model, teacher=teacher, losses=losses, quantizer_lr=settings.quantizer_lr or None,
        args=arguments(settings, job, checkpoints, pair, say is not _silent),
        train_dataset=job.rows, data_collator=job.collate(model), processing_class=job.tokenizer,
        measure=(lambda own: job.measure(own, True)) if settings.eval_every else None,
        callbacks=_callbacks(settings, folder))
    trainer.remove_callback(PrinterCallback)
    newest = newest_checkpoint(checkpoints)
    if trainer.is_fsdp_enabled:
        raise RecipeError("recipes run in one process or with DDP: launch without FSDP, or shard "
                          "in Python, with DistillTrainer")
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    except (DivergedError, EncodeError) as error:
        kept = newest_checkpoint(checkpoints)
        way = ""
        if kept and TEACHERS not in str(error):
            named = again.replace("CHECKPOINT", shlex.quote(str(kept)), 1)
            way = f"; here: {named} out=ANOTHER"
        raise DivergedError(f"{error}{way}") from error
    finally:
        _close_bars(trainer)
    if caches is not None:
        model.config.use_cache = caches  # Trainer turns it off
    if is_main() and not (folder / "model").exists():  # before what else may fail
        with whole(folder / "model") as part:
            model.save_pretrained(part)
            job.tokenizer.save_pretrained(part)
            publish_modes(part)
    found = {"metrics": dict(job.measure(model, False)), "steps": trainer.state.global_step,
             "seconds": seconds_of(folder / LOG), "settings": plain(settings)}
    if is_main():
        write(folder / RESULT, found)
        shutil.rmtree(checkpoints, ignore_errors=True)
    wait()
    return found


def _check_vocabulary(job: Job, model: PreTrainedModel) -> None:
    """Raise RecipeError for rows with tokens that a model does not have."""
    table = model.get_input_embeddings()
    if table is None:
        return
    names = ("input_ids", "labels") if model.config.is_encoder_decoder else ("input_ids",)
    largest, size = largest_token(job.rows, names), table.weight.shape[0]
    if largest >= size:
        token = job.tokenizer.convert_ids_to_tokens(largest)
        raise RecipeError(f"the data has token {largest} ({token!r}), the model only {size} "
                          "embeddings, so this is another model's tokenizer: use the model's own "
                          "tokenizer files")


def _close_bars(trainer: Any) -> None:
    """Close the progress bars that a training left, so that an error has its own line."""
    for callback in trainer.callback_handler.callbacks:
        bar = getattr(callback, "training_bar", None)
        if bar is not None:
            bar.close()


def arguments(settings: SimpleNamespace, job: Job, folder: Path, pair: bool, show: bool
              ) -> TrainingArguments:
    """Return the Trainer's arguments for one stage."""
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in {
        each.name for each in fields(TrainingArguments)} else "gradient_checkpointing"
    options: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulate, "learning_rate": settings.lr,
        "num_train_epochs": settings.epochs, "max_steps": settings.steps or -1,
        "lr_scheduler_type": settings.schedule, "warmup_steps": settings.warmup,
        "weight_decay": settings.weight_decay, "seed": settings.seed, "bf16": settings.bf16,
        "logging_steps": settings.log_every, "save_strategy": "steps",
        "save_steps": settings.eval_every or settings.save_every, "save_total_limit": 1,
        "train_sampling_strategy": "group_by_length" if settings.grouped else "random",
        "use_cpu": on_cpu(), "dataloader_pin_memory": not on_cpu(), "report_to": [],
        "disable_tqdm": not show, "remove_unused_columns": False}
    if settings.checkpointing:
        options |= {checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": False}}
    if settings.eval_every:
        options |= {"eval_strategy": "steps", "eval_steps": settings.eval_every,
                    "load_best_model_at_end": True, "metric_for_best_model": job.headline,
                    "greater_is_better": not job.lower}
    return (Seq2SeqTrainingArguments if pair else TrainingArguments)(**options)


def _callbacks(settings: SimpleNamespace, folder: Path) -> list:
    found: list = [JsonlLog(folder / LOG)]
    if settings.eval_every and settings.patience:
        found.append(EarlyStoppingCallback(settings.patience))
    if is_tensorboard_available() and is_main():
        with suppress(ImportError):  # tensorboardX alone does not do
            from torch.utils.tensorboard import SummaryWriter
            from transformers.integrations import TensorBoardCallback
            found.append(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"))))
    return found


def tokenizer(settings: SimpleNamespace) -> Any:
    """Return the tokenizer of a recipe's models.

    Raises RecipeError where there is none, TeacherError where student and teacher have other ones.
    """
    named = settings.teacher.model or settings.model
    if not named:
        raise RecipeError("say which model to begin with: model=FOLDER or a hub id")
    found = source.tokenizer(source.resolve(named))
    if found is None:
        raise RecipeError(f"{named} has no tokenizer: put its files into the folder")
    if settings.student:
        own = source.tokenizer(source.resolve(settings.student))
        if own is not None:
            check_tokenizers(own, found)
    return found


def _set_dropout(model: nn.Module, dropout: float) -> None:
    """Set every dropout of a model; a negative one leaves them as they are."""
    if dropout < 0:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, dropout)


def _packed(job: Job, source: str, folder: Path, recipe: str) -> dict[str, Any]:
    """Pack the student in `source`, unless an earlier run did; return what is to know of it."""
    if not folder.exists():
        model = finish(job.load(source))
        with whole(folder) as part:
            model.save_pretrained(part)
            job.tokenizer.save_pretrained(part)
            (part / "README.md").write_text(_card(folder, recipe), "utf-8")
            publish_modes(part)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"folder": folder.name, "bytes": size,
            "metrics": dict(job.measure(job.load(str(folder)), False))}


def _card(folder: Path, recipe: str) -> str:
    """Return the model card of a packed model; `bitlm evaluate` adds what it measures."""
    return "\n".join([
        "---", "library_name: transformers", "tags:", "- bitlm", "- 1-bit", "---", "",
        f"# {folder.parent.name or folder.name}", "",
        f"Distilled by bitlm {version}, recipe {recipe}.", "",
        "```python", "import bitlm  # pip install bitlm",
        "from transformers import AutoModel  # or the class for your task", "",
        f'model = AutoModel.from_pretrained("{folder.name}")', "```", ""])


def _silent(line: str) -> None:
    """Show nothing."""


def _folder(scheme: str) -> str:
    return scheme.lower().replace("+", "-")


def _shown(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _versions() -> dict[str, str]:
    return {name: import_module(name).__version__ for name in ("bitlm", "torch", "transformers")}
