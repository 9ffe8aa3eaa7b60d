"""The quantizers of activations: modules that train with a model, are stored in it, and serve.

One module for each kind of scheme.Quantizer. Whether a packed layer calls it or lets the kernel
round in its place, the result is the same: where there is such a mode, both are ops/rounding.py.
"""

from __future__ import annotations

from math import isfinite, sqrt

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function

from .ops.rounding import finite_else, rounded, signs
from .scheme import Quantizer
from .weight import KeepsDtype

LEAST_STEP = 1e-5
# The levels of elastic quantizers in steps, by bits, signed and ranges (at 1 bit both are alike).
LIMITS = {
    (1, True, "tbt"): (-1, 1), (1, True, "bit"): (-1, 1),
    (1, False, "tbt"): (0, 1), (1, False, "bit"): (0, 1),
    (2, True, "tbt"): (-1, 1), (2, True, "bit"): (-2, 1),
    (2, False, "tbt"): (0, 2), (2, False, "bit"): (0, 3),
}
# The activation modes that round as an elastic quantizer does, by its levels; at 2 bits without a
# minimum. Signed levels of 1 bit have no 0 between them.
MODES = {(1, -1, 1): "int1", (1, 0, 1): "uint1", (2, 0, 3): "uint2"}
# The faster modes that leave levels as they are: multiples of max|x| / 127, or / 32512, which is
# even, whichever of the levels is the largest of a token.
EXACT = {(2, -1, 1): "int8", (2, 0, 2): "int16", (2, -2, 1): "int16"}
MOMENTUM = 0.1  # of the running minimum
# Sums of signs are often 0, but for rounding errors, which differ between kernels: what is this
# near to 0, in steps, has the sign of 0.
TIE = 1e-5
UNSET = 1.0  # a step before it is initialised


class ActivationQuantizer(KeepsDtype):
    """What all quantizers have in common.

    spec: what it was built from. mode: the activation mode that rounds like it, "" if there is
    none. exact: the mode that leaves what it gave unchanged, None if only "float" does. forward(x)
    rounds x, of any shape, in its dtype; forward(x, levels=False) returns x and the step with which
    the mode rounds it.
    """

    exact: str | None = None

    def __init__(self, spec: Quantizer, mode: str = "", name: str = "") -> None:
        super().__init__()
        self.spec, self.mode, self.name = spec, mode, name

    def forward(self, x: Tensor, levels: bool = True) -> Tensor | tuple[Tensor, Tensor | None]:
        return self.round(x) if levels else (x, None)

    def round(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        fields = self.spec.to_dict()
        return ", ".join(str(fields.pop(n)) for n in ("kind", "bits")) + "".join(
            f", {name}={value}" for name, value in fields.items())


class ElasticQuantizer(ActivationQuantizer):
    """Levels times one learned step a: a * clamp(round(x / a), low, high), {-a, a} at 1 bit signed.

    features: channels of `move`, which is added first. Tensors: `step` [1]; `move` [features];
    `minimum` [1], where the levels begin: the batch's in training, else the mean of the last ones
    (a running one, momentum 0.1); `initialised` uint8 [1].

    The first forward in training sets the step, from all processes' batches where there are
    several: 2 mean|x|, unsigned 4 mean|x| / sqrt(2^bits - 1). What was loaded is not set again.
    Raises RuntimeError in evaluation before that, ValueError for a batch that is not finite. Under
    `fully_shard`, and for a graph without breaks, it must be done before: see `initialise`.

    Source: TBT (arXiv 2306.01841), BiT (arXiv 2205.13016); methods of LSQ (arXiv 1902.08153). The
    gradient reaches x where low <= x / a <= high; that of the step is divided by
    sqrt(numel * high).
    """

    def __init__(self, spec: Quantizer, features: int | None = None, name: str = "") -> None:
        limits = LIMITS[spec.bits, spec.signed, spec.ranges]
        modes, exact = ({}, {}) if spec.minimum else (MODES, EXACT)
        super().__init__(spec, modes.get((spec.bits, *limits), ""), name)
        self.exact = exact.get((spec.bits, *limits))
        self.low, self.high = limits
        self.step = nn.Parameter(torch.full((1,), UNSET, dtype=torch.float32))
        if spec.move:
            if features is None:
                raise ValueError(f"{name or 'a quantizer'} shall move each channel, but how many "
                                 "there are is not known")
            self.move = nn.Parameter(torch.zeros(features, dtype=torch.float32))
        if spec.minimum:
            self.register_buffer("minimum", torch.zeros(1, dtype=torch.float32))
        self.register_buffer("initialised", torch.zeros(1, dtype=torch.uint8))
        self.ready = False  # `initialised` where it costs no look at a tensor
        self._written: float | None = None

    def forward(self, x: Tensor, levels: bool = True) -> Tensor | tuple[Tensor, Tensor | None]:
        if self.spec.move:  # added in float32, or a small sum could change its sign
            x = (x + self._moves(x.shape[-1])).to(x.dtype)
        first = not self.ready
        if first:
            self._initialise(x)
        elif self._written is not None:
            self._check_written()
        signs = self.spec.signed and self.spec.bits == 1
        if not levels:
            step = self.step.clamp(min=LEAST_STEP)
            return (x + (TIE * step).to(x.dtype) if signs else x), step
        return _Elastic.apply(x, self.step, self._begin(x, first), self.mode, self.low, self.high,
                              signs)

    def _moves(self, width: int) -> Tensor:
        """Return `move` as it is added to [..., features] or to heads [..., H, L, features / H]."""
        return self.move if len(self.move) == width else self.move.reshape(-1, 1, width)

    def _begin(self, x: Tensor, first: bool) -> Tensor | None:
        """Return where the levels begin, and in training keep its running mean."""
        if not self.spec.minimum:
            return None
        if not self.training:
            return self.minimum
        with torch.no_grad():
            lowest = x.amin().to(self.minimum.dtype).reshape(1)
            if not first:
                self.minimum.lerp_(lowest, MOMENTUM)
        return lowest

    @torch.compiler.disable
    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        if self.update_ready():
            return
        name = self.name or "a quantizer"
        if not self.training:
            raise RuntimeError(
                f"{name} has no step yet: run the model on a batch in training mode first "
                "(bitlm.quantizers.initialise), or load one that was trained")
        total = torch.stack([x.abs().sum(dtype=torch.float32),
                             torch.tensor(x.numel(), dtype=torch.float32, device=x.device)])
        several = distributed.is_available() and distributed.is_initialized()
        if several:
            distributed.all_reduce(total)
        mean = float(total[0] / total[1])
        if not isfinite(mean):
            raise ValueError(f"{name} cannot be initialised: its first batch has values that are "
                             "not finite, or is empty: look at the layers before it, and at "
                             "the data")
        step = 2 * mean if self.spec.signed else 4 * mean / sqrt(2 ** self.spec.bits - 1)
        self.step.fill_(step)
        if self.spec.minimum:
            self.minimum.copy_(x.amin())
            if several:
                distributed.all_reduce(self.minimum, distributed.ReduceOp.MIN)
        self.initialised.fill_(1)
        self.ready, self._written = True, step if several else None

    @torch.compiler.disable
    def _check_written(self) -> None:
        """Raise at the second forward when the step that the first one set is gone.

        `fully_shard` shows a forward only copies of the parameters.
        """
        written, self._written = self._written, None
        now = float(self.step.detach())
        if abs(written - UNSET) > 0.05 and abs(now - UNSET) < abs(now - written):
            raise RuntimeError(
                f"{self.name or 'a quantizer'} was set to {written:.4g} in its first forward and "
                f"is {now:.4g} again: the parameters are sharded; call "
                "bitlm.quantizers.initialise(model, **batch) before fully_shard")

    def update_ready(self) -> bool:
        """Look whether the quantizer is initialised, after its tensors were changed or loaded."""
        self.ready = not self.initialised.is_meta and bool(self.initialised)
        return self.ready

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.update_ready()
        self._written = None


class DynamicQuantizer(ActivationQuantizer):
    """Equal steps over the range that the values have, of each token (the last axis) or the tensor.

    signed, 8 bits: round(127 x / max|x|) max|x| / 127, what kernels do. Unsigned, with n steps,
    255 at 8 bits, 3 and 1 at 2 and 1, and r = max - min + 1e-8: round(n (x - min) / r) r / n + min,
    min at most 0, so that padding and masked keys, of which attention makes 0, change nothing.
    `clip` cuts values off first.

    The gradient passes unchanged, with `clip` only where |x| < clip. Source: TBT's code (range of
    the tensor, clip 2.5); one range for each token makes a row independent of its neighbours.
    """

    def __init__(self, spec: Quantizer, name: str = "") -> None:
        plain = spec.signed and spec.per == "token" and not spec.clip
        super().__init__(spec, "int8" if plain else "", name)

    def round(self, x: Tensor) -> Tensor:
        steps = 0 if self.spec.signed else 2 ** self.spec.bits - 1
        return _Dynamic.apply(x, steps, self.spec.per == "tensor", self.spec.clip)


class AttentionBinarizer(ActivationQuantizer):
    """1 where a value is at least `threshold` times the largest of its row, else 0.

    For attention probabilities [..., L]; the rows' largest ones adapt to softmax's long tails.
    rescale: a 1 becomes 1 / (number of ones in the row), or the mean of the values that are 1,
    which minimises ||a - v b||. The gradient passes unchanged. Source: BiViT (arXiv 2211.07091).
    """

    def __init__(self, spec: Quantizer, name: str = "") -> None:
        super().__init__(spec, "", name)

    def round(self, x: Tensor) -> Tensor:
        return _Threshold.apply(x, self.spec.threshold, self.spec.rescale)


KINDS = {"elastic": ElasticQuantizer, "dynamic": DynamicQuantizer, "threshold": AttentionBinarizer}


def build(quantizer: Quantizer, features: int | None = None, name: str = "") -> ActivationQuantizer:
    """Return the module of a quantizer.

    features: channels of what it rounds, needed for `move`. name: for messages. Raises ValueError
    when features are needed and None.
    """
    if quantizer.kind == "elastic":
        return ElasticQuantizer(quantizer, features, name)
    return KINDS[quantizer.kind](quantizer, name)


def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the quantizers of a model by their names."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, ActivationQuantizer)}


@torch.no_grad()
def initialise(model: nn.Module, *args, **kwargs) -> None:
    """Run a model on one batch in training mode, so that every quantizer on its way has its step.

    The first training step does it too, except under `fully_shard`, which gives a forward only
    copies of the parameters, and under `torch.compile(fullgraph=True)`. Raises RuntimeError naming
    the quantizers that the batch did not reach.
    """
    training = {module: module.training for module in model.modules()}
    model.train()
    try:
        model(*args, **kwargs)
    finally:
        for module, was in training.items():
            module.training = was
    missed = [name for name, module in quantizers(model).items()
              if isinstance(module, ElasticQuantizer) and not module.ready]
    if missed:
        raise RuntimeError(f"the batch did not reach {', '.join(missed[:5])}: give one that uses "
                           "the whole model")


# Rounding, with straight-through gradients --------------------------------------------------------


class _Elastic(Function):
    """Statistics and steps are in float32, float64 for float64 inputs."""

    @staticmethod
    def forward(x: Tensor, step: Tensor, minimum: Tensor | None, mode: str, low: int, high: int,
                signs: bool) -> Tensor:
        values, a = _computed(x), step.clamp(min=LEAST_STEP).reshape(())
        if mode:
            return rounded(values + TIE * a if signs else values, mode, a).to(x.dtype)
        begin = 0 if minimum is None else minimum
        result = ((values - begin) / a).round().clamp(low, high) * a + begin
        return finite_else(_largest(values), result, values).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, step, minimum, _, ctx.low, ctx.high, ctx.signs = inputs
        ctx.save_for_backward(x, step, minimum)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, step, minimum = ctx.saved_tensors
        values, a = _computed(x), step.clamp(min=LEAST_STEP).reshape(())
        # 1 where the gradient passes, else 0, as floats: a CPU computes with masks far slower.
        inside = values.new_empty(values.shape)
        if ctx.signs:
            torch.le(values.abs(), a, out=inside)
            slope = signs(values)
        else:
            z = (values if minimum is None else values - minimum) / a
            clamped = z.clamp(ctx.low, ctx.high)
            torch.eq(z, clamped, out=inside)
            slope = clamped.round().sub_(clamped.mul_(inside))  # round(z) - z, outside the limit
        dx = dstep = None
        if ctx.needs_input_grad[0]:
            dx = grad * inside.to(grad.dtype)
        if ctx.needs_input_grad[1]:
            dstep = slope.mul_(grad).sum() / sqrt(max(x.numel(), 1) * ctx.high)
            dstep = dstep.reshape(1).to(step.dtype)
        return dx, dstep, None, None, None, None, None


class _Dynamic(Function):
    @staticmethod
    def forward(x: Tensor, steps: int, whole: bool, clip: float) -> Tensor:
        values = _computed(x)
        if clip:
            values = values.clamp(-clip, clip)
        rows = values.reshape(1, -1) if whole else values
        if not steps:
            result = rounded(rows, "int8")
        else:
            # From 0 at most: a masked key's probability is 0, and how many there are is no matter.
            least = rows.amin(-1, keepdim=True).clamp(max=0)
            reach = rows.amax(-1, keepdim=True) - least + 1e-8
            result = ((rows - least) / reach * steps).round() / steps * reach + least
            result = finite_else(reach, result, rows)  # NaN where there is one
        return result.reshape(x.shape).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, _, _, ctx.clip = inputs
        ctx.save_for_backward(*[x] * bool(ctx.clip))

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx = grad * (ctx.saved_tensors[0].abs() < ctx.clip) if ctx.clip else grad
        return dx, None, None, None


class _Threshold(Function):
    @staticmethod
    def forward(x: Tensor, threshold: float, rescale: str) -> Tensor:
        values = _computed(x)
        largest = values.amax(-1, keepdim=True)
        ones = (values >= threshold * largest).to(values.dtype)
        result = ones
        if rescale != "none":
            worth = 1 if rescale == "sum" else (values * ones).sum(-1, keepdim=True)
            result = ones * (worth / ones.sum(-1, keepdim=True))
        return finite_else(largest, result, values).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None, None


def _largest(values: Tensor) -> Tensor:
    """Return max|x| of each token, [..., 1]: infinite or NaN where one of its values is."""
    return values.abs().amax(-1, keepdim=True)


def _computed(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
