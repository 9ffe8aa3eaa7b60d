"""What happens beside the steps of a training: schedules, the guard against NaN, a log as jsonl."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from .convert import set_parameter
from .estimators import estimator, fda_noise
from .layers import fake_quant_layers
from .rows import ByLength, Noised
from .weights import MeasuredScales

TEACHERS = "the teacher's "  # before the name of a layer of the teacher


class DivergedError(ValueError):
    """A training that met a value that is not finite: the message says where, and what to do."""


class EstimatorSchedule(TrainerCallback):
    """Gives a prepared model's estimators the parameter that their schedule says, at each step.

    Progress is steps done of all steps, so that a resumed training goes on where it was.
    """

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        schedule = schedule_of(model)
        if schedule is None:
            return
        progress = state.global_step / max(state.max_steps, 1)
        set_parameter(model, schedule(progress))
        for layer in fake_quant_layers(model).values():
            if isinstance(layer.weight_quantizer, MeasuredScales):
                layer.weight_quantizer.amount = fda_noise(progress)


def schedule_of(model: nn.Module) -> Callable[[float], float] | None:
    """Return the schedule of the estimator that a model's weights are trained with, if it has one.

    All weights but those of embeddings, which have the identity, have the same estimator.
    """
    schedules = (estimator(layer.weight_quantizer.estimator).schedule
                 for layer in fake_quant_layers(model).values())
    return next((schedule for schedule in schedules if schedule is not None), None)


class TellEpoch(TrainerCallback):
    """Tells rows or their sampler which epoch begins, also after resuming in the middle of one."""

    def __init__(self, told: ByLength | Noised) -> None:
        self.told = told

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.told.epoch = int((state.epoch or 0) + 1e-6)


class StopAtNonFinite(TrainerCallback):
    """Raises DivergedError before an optimizer step on gradients that are not finite, and before
    weights that are not finite are saved: every checkpoint is a good one.

    Gradients are those of all processes, so all of them stop. batches: returns a forward of the
    model, and of its teacher, for each micro-batch of the step, which are run again to name the
    first layer that gave a value that is not finite.
    """

    def __init__(self, batches: Callable[[], list[Callable[[], Any]]],
                 teacher: nn.Module | None = None) -> None:
        self.batches, self.teacher = batches, teacher

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if args.fp16:  # its gradient scaler meets infinities, skips such steps and scales down
            return
        sums = [_whole(parameter.grad.sum(dtype=torch.float32))
                for parameter in model.parameters() if parameter.grad is not None]
        if not sums or bool(torch.isfinite(torch.stack(sums)).all()):
            return
        # Which gradient it was cannot be seen: clipping has spread it over all of them.
        where = first_nonfinite(model, self.batches(), self.teacher) or \
            "every layer's output is finite, but the gradients are not"
        raise DivergedError(f"the loss became NaN or infinite in step {state.global_step + 1}: "
                            f"{where}; {_after(args.output_dir, where)}")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        # After it, "best" may save what was measured, and the user what was trained.
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self._check_weights(args, state, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if control.should_save or control.should_evaluate:
            self._check_weights(args, state, model)

    def _check_weights(self, args, state, model) -> None:
        sums = [_whole(parameter.detach().sum(dtype=torch.float32))
                for parameter in model.parameters() if parameter.requires_grad]
        if sums and not bool(torch.isfinite(torch.stack(sums)).all()):
            where = first_nonfinite(model, []) or "the sum of a weight's values is infinite"
            raise DivergedError(f"step {state.global_step} was too large: {where}; "
                                f"{_after(args.output_dir, where)}")


def _after(folder: str, where: str) -> str:
    if TEACHERS in where:
        return "use another teacher"
    kept = newest_checkpoint(folder)
    after = f"the last good checkpoint is {kept}: go on from it" if kept else \
        "there is no checkpoint yet: start again"
    return f"{after} with a lower learning rate"


@torch.no_grad()
def first_nonfinite(model: nn.Module, forwards: list[Callable[[], Any]],
                    teacher: nn.Module | None = None) -> str | None:
    """Return in words which module of a model, or of its teacher, first gives a value that is not
    finite.

    None where all of them are finite. The modules without children come first, so that the name is
    that of the smallest one. Parameters are looked at before.
    """
    models = {"": model} | ({TEACHERS: teacher} if teacher is not None else {})
    for whose, own in models.items():
        for name, parameter in own.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                return f"{whose}{name} itself has values that are not finite"
    found: list[str] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if not found and any(not bool(torch.isfinite(each).all()) for each in _floats(output)):
            found.append(f"the first value that is not finite came out of {name} "
                         f"({type(module).__name__})")

    handles = [module.register_forward_hook(
        lambda module, _, output, name=f"{whose}{name}": look(name, module, output))
        for whose, own in models.items() for name, module in own.named_modules() if name]
    try:
        for forward in forwards:
            try:
                forward()
            except ValueError as error:  # a quantizer that refuses what it was given
                found.append(str(error))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None  # after all forwards, which processes make together


def _whole(total: Tensor) -> Tensor:
    """Return a sum over all processes where parameters are sharded."""
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def _floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [each for part in output for each in _floats(part)] \
        if isinstance(output, list | tuple) else []


class JsonlLog(TrainerCallback):
    """Appends every log event to a file, a JSON object a line with step, seconds trained and epoch.

    A resumed training first removes the lines behind the step that it goes on from, and goes on
    with their seconds.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.start = Path(path), 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_log(self.path)
                if state.global_step and line["step"] <= state.global_step]
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        os.replace(part, self.path)
        self.start = time.perf_counter() - (kept[-1]["seconds"] if kept else 0.0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            seconds = round(time.perf_counter() - self.start, 3)
            line = {"step": state.global_step, "seconds": seconds} | (logs or {})
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; one that a crash left unfinished does not count."""
    lines = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def seconds_of(path: Path) -> float:
    """Return how long a training with a log has trained, all of its runs together."""
    lines = read_log(path)
    return lines[-1]["seconds"] if lines else 0.0


def newest_checkpoint(folder: str | Path) -> Path | None:
    """Return the checkpoint of a training with the most steps, None where there is none.

    One that a crash left unfinished does not count: Trainer writes trainer_state.json last.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        try:
            found.append((json.loads((path / "trainer_state.json").read_text())["global_step"],
                          path))
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None
