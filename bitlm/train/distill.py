"""Trainers that distil a teacher into a student with fake-quant weights, and their checks.

The losses are data, see `terms`. Everything else is transformers' Trainer: gradient accumulation
and checkpointing, bf16, several processes, checkpoints and resuming.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer

from ..attention import NAME
from ..quantizers import ActivationQuantizer
from . import losses, terms
from .callbacks import EstimatorSchedule, StopAtNonFinite, TellEpoch
from .rows import ByLength, Noised, lengths
from .terms import Batch, LossError, Views
from .weights import WeightQuantizer

DIRECTION_BATCHES = 8  # batches of training data that principal directions come from
DIRECTION_FRACTION = 4  # of the hidden size that low-rank mimicking keeps: BinaryDM's K
QUANTIZER_LR = 1e-4  # BiT's, arXiv 2205.13016

Metrics = Callable[[nn.Module], Mapping[str, float]]


class TeacherError(ValueError):
    """A teacher that cannot teach the student: the message says what differs."""


class DistillMixin:
    """What the distilling trainers add to transformers' own.

    teacher: in eval mode, without gradients; None trains on the labels alone. losses: (name,
    weight) or (name, weight, options), see `terms.KINDS` and `terms.REGULARISERS`. quantizer_lr: of
    the steps, moves and scales of quantizers, whose weight decay is 0 (BiT); None for the trainer's
    own. measure: student -> metrics, in place of the Trainer's evaluation loop. teacher_tokenizer:
    to compare with the student's, `processing_class`.

    Each loss is a mean over the entries of the whole accumulated batch and all processes, and is
    logged by its name, unweighted. Evaluation shows the task's loss alone. Raises LossError for
    losses that do not exist, TeacherError for a teacher that does not fit.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel | None = None,
                 losses: Sequence[Sequence[Any]] = (("task", 1.0),),
                 quantizer_lr: float | None = QUANTIZER_LR, measure: Metrics | None = None,
                 teacher_tokenizer: Any = None, **kwargs: Any) -> None:
        self.terms = terms.read(losses)
        self.teacher, self.quantizer_lr, self.measure = teacher, quantizer_lr, measure
        if measure is not None:
            kwargs["eval_dataset"] = []  # Trainer evaluates in training only where it has one
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:  # nn.DataParallel: what its copies learn of steps is lost
            raise ValueError(f"one process has {self.args.n_gpu} GPUs: start one for each, as "
                             f"torchrun --nproc-per-node {self.args.n_gpu}, or show it one by "
                             "CUDA_VISIBLE_DEVICES")
        if self.args.label_smoothing_factor:
            raise LossError("label smoothing is no part of these losses: leave out "
                            "label_smoothing_factor")
        self.loss_is_scaled_for_ga = True
        self._needs = terms.needs(self.terms)
        self._pair, self._causal = self.model.config.is_encoder_decoder, terms.is_causal(self.model)
        self._masks = terms.masks(self.terms, self._pair)
        self._totals: dict[str, float] = {}
        self._micro: list[Mapping[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._directions: dict[str, list[Tensor]] = {}
        if teacher is None and terms.need_teacher(self.terms):
            raise TeacherError("these losses need a teacher: give one, or use the loss task alone")
        if teacher is not None:
            check_teacher(self.model, teacher, self.terms, self.processing_class, teacher_tokenizer)
            self.teacher = teacher.eval().requires_grad_(False)
            self._move_model_to_device(self.teacher, self.args.device)
        if "attentions" in self._needs:
            return_attentions(self.model, teacher)
        # In this order: a broken batch is found before anything steps on it.
        self.add_callback(StopAtNonFinite(self._try_batches, teacher))
        self.add_callback(EstimatorSchedule())
        if isinstance(self.train_dataset, Noised):
            self.train_dataset.epoch = 0  # another training may have left another one
            self.add_callback(TellEpoch(self.train_dataset))

    # Losses -------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._micro, self._steps = batches, self._steps + 1
            counts = torch.stack([
                sum(self._batch(batch).count(mask) for batch in batches).to(device)
                for mask in self._masks]) if self._masks else torch.zeros(0, device=device)
            counts = self.accelerator.reduce(counts, "sum")
            self._totals = dict(zip(self._masks, counts.tolist()))
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs, found = self._loss(model, inputs, self._totals or None)
        for label, value in found.items():
            self._sums[label] = self._sums.get(label, 0) + value.detach()
        return (loss, outputs) if return_outputs else loss

    def _loss(self, model: nn.Module, inputs: Mapping[str, Tensor],
              totals: Mapping[str, float] | None) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """Return the loss to differentiate, the student's outputs, and the values by term."""
        views = self._views(model, inputs)
        # DDP averages the gradients of processes, and these shares add up over them.
        found = {label: value * self.accelerator.num_processes for label, value in
                 terms.values(self.terms, views, totals).items()}
        progress = self.state.global_step / max(self.state.max_steps, 1)
        found |= {label: value / max(len(self._micro), 1) for label, value in
                  terms.regularisers(self.terms, self.model, progress).items()}
        loss = sum(term.weight * found[term.label] for term in self.terms)
        return loss, views.student, found

    def _views(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Views:
        asked = {f"output_{name}": True for name in ("hidden_states", "attentions")
                 if name in self._needs}
        hears = "projections" in self._needs
        with ExitStack() as stack:
            own = stack.enter_context(terms.listening(self.model)) if hears else {}
            student = model(**inputs, **asked)
        views = Views(self._batch(inputs), student, None, own)
        if self.teacher is None:
            return views
        with torch.no_grad(), self.accelerator.autocast(), ExitStack() as stack:
            if hears:
                views.teacher_projections = stack.enter_context(terms.listening(self.teacher))
            views.teacher = self.teacher(**self._for_teacher(inputs), **asked)
        if any(term.name == "low_rank_mimicking" for term in self.terms):
            views.directions = self._principal_directions()
        return views

    def _for_teacher(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs without labels, unless the decoder's inputs are made of them."""
        needed = self._pair and "decoder_input_ids" not in inputs
        given = {name: value for name, value in inputs.items() if name != "labels" or needed}
        # Trainer turns the cache off for the student alone.
        return given | ({"use_cache": False} if hasattr(self.teacher.config, "use_cache") and
                        "use_cache" in signature(self.teacher.forward).parameters else {})

    def _batch(self, inputs: Mapping[str, Tensor]) -> Batch:
        if "labels" not in inputs:
            raise LossError("the batches have no labels: use a collator that makes them (-100 "
                            "where nothing is predicted)")
        return Batch(inputs, self._causal, self._pair)

    @torch.no_grad()
    def _principal_directions(self) -> dict[str, list[Tensor]]:
        """Return BinaryDM's directions of the teacher's blocks, of the first rows of the data.

        Neither shuffled nor drawn, so that every process and a resumed training have the same.
        """
        if self._directions:
            return self._directions
        found: dict[str, list[list[Tensor]]] = {}
        size, data = self.args.per_device_train_batch_size, self.train_dataset
        if isinstance(data, Noised):  # in a later epoch its rows are others
            data = Noised(data.rows, data.noise, data.seed)
        for start in range(0, min(len(data), DIRECTION_BATCHES * size), size):
            rows = [data[i] for i in range(start, min(start + size, len(data)))]
            inputs = self._prepare_inputs(self.data_collator(rows))
            outputs = self.teacher(**self._for_teacher(inputs), output_hidden_states=True)
            batch = self._batch(inputs)
            for name, mask in terms.outputs_of("hidden_states", self._pair):
                blocks = [states[getattr(batch, mask)] for states in getattr(outputs, name)[1:]]
                found.setdefault(name, [[] for _ in blocks])
                for kept, block in zip(found[name], blocks):
                    kept.append(block)
        self._directions = {name: [losses.principal_directions(
            block, max(1, block[0].shape[-1] // DIRECTION_FRACTION)) for block in blocks]
            for name, blocks in found.items()}
        return self._directions

    def _try_batches(self) -> list[Callable[[], Any]]:
        """Return forwards of the student, and of its teacher before, for each micro-batch of the
        step, to look for the first value that is not finite."""
        def of_teacher(batch: dict[str, Any]) -> Any:
            with self.accelerator.autocast():
                return self.teacher(**self._for_teacher(self._prepare_inputs(batch)))

        found: list[Callable[[], Any]] = []
        for batch in self._micro:
            if self.teacher is not None:
                found.append(lambda batch=batch: of_teacher(batch))
            found.append(lambda batch=batch: self.model(**self._prepare_inputs(batch)))
        return found

    # Logs, evaluation, optimizer ----------------------------------------------------------------

    def log(self, logs, start_time=None):
        if "loss" in logs and self._steps:
            labels = list(self._sums)
            sums = torch.stack([self._sums[label] for label in labels])
            means = self.accelerator.reduce(sums, "mean") / self._steps
            logs |= dict(zip(labels, means.tolist()))
            self._sums, self._steps = {}, 0
        super().log(logs, start_time)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", **kwargs):
        if self.measure is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        start = time.perf_counter()
        metrics = {f"{metric_key_prefix}_{name}": value
                   for name, value in self.measure(self.model).items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.perf_counter() - start, 4)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control,
                                                         metrics)
        return metrics

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # Trainer's own draws from the global generator, so that a resumed epoch had another order.
        rows = self.train_dataset if train_dataset is None else train_dataset
        sampler = ByLength(lengths(rows), self.args.per_device_train_batch_size, self.args.seed)
        self.add_callback(TellEpoch(sampler))
        return sampler

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            found = self.model if model is None else model
            kind, options = self.optimizer_cls_and_kwargs or \
                self.get_optimizer_cls_and_kwargs(self.args, found)
            strange = {"params", "model", "optimizer_dict"} & set(options)
            if strange:
                raise ValueError(f"optimizer {self.args.optim} makes its own groups of parameters, "
                                 "and would train quantizers like weights: use another optim")
            decayed = self.get_decay_parameter_names(found)
            self.optimizer = kind(parameter_groups(found, decayed, self.args.weight_decay,
                                                   self.quantizer_lr), **options)
        return self.optimizer


class DistillTrainer(DistillMixin, Trainer):
    """transformers' Trainer with a teacher: classifiers, causal and masked language models."""


class Seq2SeqDistillTrainer(DistillMixin, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer with a teacher: encoder-decoders."""


def parameter_groups(model: nn.Module, decayed: Sequence[str], weight_decay: float,
                     quantizer_lr: float | None) -> list[dict[str, Any]]:
    """Return an optimizer's groups: decayed weights, other parameters, those of quantizers.

    Quantizers' own parameters (steps, moves, scales) have no weight decay and `quantizer_lr`.
    """
    own = {f"{path}.{leaf}".lstrip(".") for path, module in model.named_modules()
           if isinstance(module, ActivationQuantizer | WeightQuantizer)
           for leaf, _ in module.named_parameters(recurse=False)}
    decayed = set(decayed) - own
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if name in decayed],
         "weight_decay": weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed | own],
         "weight_decay": 0.0},
        {"params": [p for name, p in trained.items() if name in own], "weight_decay": 0.0,
         **({} if quantizer_lr is None else {"lr": quantizer_lr})},
    ]
    return [group for group in groups if group["params"]]


# Checks ------------------------------------------------------------------------------------------

def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel,
                  given: Sequence[terms.Term], tokenizer: Any = None,
                  teacher_tokenizer: Any = None) -> None:
    """Raise TeacherError where a teacher does not read what the student reads, or says less."""
    if teacher is student:
        raise TeacherError("teacher and student are one model: load or copy the teacher, the "
                           "student is changed in place")
    if None not in (tokenizer, teacher_tokenizer):
        check_tokenizers(tokenizer, teacher_tokenizer)
    tables = [model.get_input_embeddings() for model in (student, teacher)]
    own, other = (getattr(table, "num_embeddings", None) for table in tables)  # of images: none
    if own != other:
        raise TeacherError(f"the teacher's vocabulary has {other} tokens, the student's {own}: "
                           "both must have the same tokenizer")
    if student.config.is_encoder_decoder != teacher.config.is_encoder_decoder:
        raise TeacherError("one of teacher and student is an encoder-decoder, the other is not")
    matched = {term.name for term in given} & {"kl", "soft_cross_entropy", "logits_mse",
                                               "plackett_luce"}
    if matched and "Classification" in type(student).__name__ and \
            student.config.num_labels != teacher.config.num_labels:
        raise TeacherError(f"the teacher has {teacher.config.num_labels} labels, the student "
                           f"{student.config.num_labels}: fine-tune the teacher on this task")
    names = [{name.lower() for name in (model.config.id2label or {}).values()}
             for model in (student, teacher)]
    order = [[name.lower() for _, name in sorted((model.config.id2label or {}).items())]
             for model in (student, teacher)]
    if matched and names[0] == names[1] and order[0] != order[1]:
        raise TeacherError(f"the teacher's labels are in the order {', '.join(order[1])}, the "
                           f"student's {', '.join(order[0])}: give the student the teacher's "
                           "id2label")


def check_tokenizers(tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Raise TeacherError where two tokenizers do not give a token the same number."""
    own, other = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if own != other:
        token = next(token for token in sorted({*own, *other})
                     if own.get(token) != other.get(token))
        raise TeacherError(f"the teacher has another tokenizer: {token!r} is its "
                           f"{other.get(token, 'unknown')}, and the student's "
                           f"{own.get(token, 'unknown')}: use a teacher with the same tokenizer")


def return_attentions(*models: PreTrainedModel | None) -> None:
    """Let models return attention maps: fused attention computes none."""
    for model in models:
        if model is not None and model.config._attn_implementation not in ("eager", NAME):
            model.set_attn_implementation("eager")
