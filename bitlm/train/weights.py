"""Fake-quant weights: the values that a weight will have once packed, with a gradient.

A quantizer is a function of the dense weight it trains, in two forms that always agree:

    forward(weight)   the dense values, exactly those that dequantizing gives (float32, then the
                      dtype of the weight)
    encode(weight)    the packed tensors, by their names in the file format

since scales are rounded to the dtype that they are stored in before anything is done with them.
Three kinds, all driven by the fields of a Scheme:

    MeasuredScales  scales and shift from the weight's statistics, at every step: any method of
                    `bitlm.methods` that needs no Hessian; TBT, BWN, TWN, BitNet
    LearnedScales   scales that are Parameters, one for each row or group: BinaryDM's two bases
                    with planes 2, BiViT with center "threshold"
    FrozenSalient   method salient: PB-LLM's quantization-aware training

None of them does anything at load time: `initialise(weight)` fills in what depends on the weight,
once, and what it filled in is in the state dict.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..methods import EncodeError, compensation, method, salience, ternary
from ..methods.levels import mean, stored, ternary_code
from ..methods.salience import HALF_RANGE, Salient
from ..ops.bits import pack_bits
from ..scheme import Scheme, SchemeError
from ..weight import TensorHolder
from .coded import DIVERGED, Coded, code, measured, spread
from .estimators import FourierNoise, fda_noise, row_unit, sign, straight_through
from .estimators import estimator as known_estimator


def quantizer(scheme: Scheme, shape: tuple[int, int], *, learned: bool = False,
              estimator: str = "identity", parameter: float | None = None,
              unit: float | None = None, clip: bool = False, noise: bool = False,
              name: str = "weight") -> WeightQuantizer:
    """Return the quantizer of a weight [N, K] = shape, not yet initialised.

    learned: scales that are Parameters, in place of measured ones. clip: measured scales only, let
    no gradient through where |W - mean| >= scale (TBT's paper form). noise: see MeasuredScales. The
    rest: `WeightQuantizer`.
    Raises SchemeError for a scheme that cannot be trained so.
    """
    common = {"estimator": estimator, "parameter": parameter, "unit": unit, "name": name}
    if learned:
        found = LearnedScales(scheme, shape, **common)
    elif scheme.method == "salient":
        found = FrozenSalient(scheme, shape, **common)
    else:
        return MeasuredScales(scheme, clip, shape[1] if noise else 0, **common)
    if clip:
        raise SchemeError("clip is for measured scales: use the estimator clipped")
    if noise:
        raise SchemeError("noise is for measured scales: leave it out, or learned")
    return found


# --- quantizers ----------------------------------------------------------------------------------

class WeightQuantizer(TensorHolder):
    """What the kinds share: the scheme and the gradient of codes.

    scheme: method, planes, group_size, center, levels, scale_dtype and trits count.
    estimator: one of `estimators.ESTIMATORS`. parameter: its parameter; schedules set this
    attribute, None is the estimator's own. unit: what weights are divided by before the factor,
    None for mean|W| of each row (1.0 gives the forms that papers state for images).
    name: of the weight, for messages.
    Raises SchemeError for schemes that need a Hessian at every step, ValueError for an unknown
    estimator. Float tensors keep float32 when the model is cast.
    """

    def __init__(self, scheme: Scheme, estimator: str = "identity",
                 parameter: float | None = None, unit: float | None = None,
                 name: str = "weight") -> None:
        super().__init__()
        method(scheme)
        known_estimator(estimator)
        if scheme.compensate:
            raise SchemeError("compensate spreads rounding errors by a Hessian, which training "
                              "changes at every step: use compensate false")
        self.scheme, self.estimator, self.parameter = scheme, estimator, parameter
        self.unit, self.name = unit, name

    @property
    def by_row(self) -> bool:
        """Whether some rows of the weight can be coded without the others.

        But for the dtype of the scales, which is float32 for all where one row needs it.
        """
        return False

    def initialise(self, weight: Tensor, hessian: Tensor | None = None) -> None:
        """Fill in what depends on the weight [N, K]; hessian: for salience by Hessian alone."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the fake-quant weight, in the shape and dtype of `weight`."""
        raise NotImplementedError

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the packed tensors of the weight, whose dense values are `forward`'s."""
        raise NotImplementedError

    def of_sign(self, weight: Tensor) -> tuple[Tensor, float, Tensor]:
        """Return what the first sign is taken of, with its gradient, the estimator's parameter in
        force and the units: the arguments of `estimators.biper_penalty`."""
        rest = weight
        if self.scheme.center != "none":
            average = measured(weight.detach().float(), self.scheme, lambda part: mean(part, None))
            columns = weight.shape[1]
            rest = weight - spread(average, self.scheme.columns_per_scale(columns), columns)
        return rest, self._strength(), self._units(weight)

    def _units(self, weight: Tensor) -> Tensor:
        if self.unit is None:
            return row_unit(weight)
        return torch.tensor(float(self.unit), device=weight.device)

    def _strength(self) -> float:
        """Return the estimator's parameter in force."""
        known = known_estimator(self.estimator)
        own = known.normalised if self.unit is None else known.parameter
        return own if self.parameter is None else self.parameter

    def _sign(self, rest: Tensor, units: Tensor) -> Tensor:
        return sign(rest, self.estimator, self._strength(), units)

    def extra_repr(self) -> str:
        return f"{self.scheme.to_dict()}, estimator={self.estimator}"


class MeasuredScales(WeightQuantizer):
    """Scales from the weight's own statistics, without gradient, measured at every step.

        W_q = values of method.fit(W),  dL/dW = dL/dW_q * f((W - mean) / unit)

    which is TBT's released form with the estimator identity; its paper form is center "drop" with
    `clip`, dL/dW = 0 where |W - mean| >= scale (arXiv 2306.01841). BWN is center "threshold", TWN
    levels "twn". A ternary code's gradient is that of its two steps (`straight_through`).

    Other estimators than the identity, and clip, are for one plane of method binary or ternary.
    noise: columns of the weight, to train FDA's learned noise beside its series; 0: without.
    Schedules set `amount`, the part of the noise that is still in the gradient.
    """

    def __init__(self, scheme: Scheme, clip: bool = False, noise: int = 0, **common) -> None:
        super().__init__(scheme, **common)
        if scheme.method == "salient":
            raise SchemeError("method salient has frozen weights: use FrozenSalient")
        if (clip or self.estimator != "identity") and (scheme.planes > 1 or scheme.refit):
            raise SchemeError("estimators other than identity, and clip, follow the code of one "
                              "plane: use planes 1 and refit 0")
        if noise and self.estimator != "fda":
            raise SchemeError(f"noise corrects the series of the estimator fda: the estimator is "
                              f"{self.estimator}")
        self.clip = clip
        self.noise, self.amount = FourierNoise(noise) if noise else None, fda_noise(0.0)
        self._wave = known_estimator(self.estimator).wave is not None
        if self._wave and scheme.method != "binary":
            raise SchemeError(f"estimator {self.estimator} has binary codes: use method binary")

    def forward(self, weight: Tensor) -> Tensor:
        coded = self._coded(weight)
        values = coded.values().to(weight.dtype)
        if self.estimator == "identity" and not self.clip:
            return straight_through(weight, values)
        rest = weight - self._offset(weight, coded)
        if self.clip:
            inside = rest.detach().abs() < coded.spread(coded.scales[0])
            rest = torch.where(inside, rest, rest.detach())
        units = self._units(weight)
        values = straight_through(rest, values, self.estimator, self._strength(), units,
                                  self._cut(rest, coded))
        if self.noise is not None and torch.is_grad_enabled():
            values = values + self.noise(rest, self.amount, units)
        return values

    @property
    def by_row(self) -> bool:
        return self.scheme.group_size != "tensor"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        return self._coded(weight).tensors(self.scheme)

    @torch.no_grad()
    def _coded(self, weight: Tensor) -> Coded:
        coded = code(weight.detach().float(), self.scheme, None, self.name)
        if self._wave:
            rest = weight.detach().float() - self._offset(weight, coded)
            coded.codes = self._sign(rest, self._units(weight)).to(torch.int8).unsqueeze(0)
        return coded

    def _offset(self, weight: Tensor, coded: Coded) -> Tensor | float:
        """Return what is taken from a weight before its sign."""
        if self.scheme.center == "none":
            return 0.0
        if coded.shift is not None:
            return coded.spread(coded.shift)
        average = measured(weight.detach().float(), self.scheme, lambda part: mean(part, None))
        return coded.spread(average)

    @torch.no_grad()
    def _cut(self, rest: Tensor, coded: Coded) -> Tensor | None:
        """Return where a ternary code changes, +- this."""
        if self.scheme.method != "ternary":
            return None
        if self.scheme.levels != "twn":
            return coded.spread(coded.scales[0] / 2)
        return coded.spread(measured(rest.float(), self.scheme,
                                      lambda part: ternary.rule(part, None, self.scheme)[1]))


class LearnedScales(WeightQuantizer):
    """Scales that are learned, one for each row or group (or one for all, group_size "tensor").

        binary, 1 plane    s sign(W - offset) [+ shift]        BiViT: center threshold, 2211.07091
        binary, 2 planes   s1 sign(W) + s2 sign(W - s1 sign(W))           BinaryDM, arXiv 2404.05662
        ternary            s T,  T = sign(W - offset) beyond s / 2, else 0

    They start from the statistics that `methods.encode` would store. A scale that would become
    negative counts as 0 and keeps its gradient, so it can come back. Gradients are the chain rule's
    with the estimator for each sign: ds1 = G (B1 - s2 B2' B1), which differs from BinaryDM's
    printed rule. Means (offset, shift) and the ternary cut get no gradient.

    Parameters, float32: scales [N, G] ([1, 1] for "tensor"), and second_scales for two planes.
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], **common) -> None:
        super().__init__(scheme, **common)
        alone = scheme.planes == 1 and scheme.method in ("binary", "ternary")
        two = scheme.planes == 2 and scheme.method == "binary" and scheme.center == "none"
        if not alone and not two:
            raise SchemeError("learned scales are for one plane of method binary or ternary, or "
                              "for two of method binary with center none")
        if known_estimator(self.estimator).wave is not None and scheme.method != "binary":
            raise SchemeError(f"estimator {self.estimator} has binary codes: use method binary")
        size = scheme.columns_per_scale(shape[1])
        lengths = (1, 1) if scheme.group_size == "tensor" else (shape[0], -(-shape[1] // size))
        # NaN, so that a forward without `initialise` or loading fails.
        self.scales = nn.Parameter(torch.full(lengths, torch.nan, dtype=torch.float32))
        second = nn.Parameter(torch.full(lengths, torch.nan, dtype=torch.float32)) if two else None
        self.register_parameter("second_scales", second)

    @torch.no_grad()
    def initialise(self, weight: Tensor, hessian: Tensor | None = None) -> None:
        coded = code(weight.detach().float(), self.scheme, None, self.name)
        first, *second = (nn.Parameter(values[:len(self.scales)].clone())
                          for values in coded.scales)
        self.scales = first
        if second:
            self.second_scales = second[0]

    def drop_second(self) -> None:
        """Go on with the first basis alone, as BinaryDM does for the last part of its training.

        The scheme is then one of one plane. Between two runs of a trainer: a wrapped model (DDP,
        FSDP) and an optimizer would still hold the Parameter.
        """
        self.second_scales = None
        self.scheme = self.scheme.replace(planes=1)

    def forward(self, weight: Tensor) -> Tensor:
        codes, scales, shift, _ = self._planes(weight)
        columns, size = weight.shape[1], self.scheme.columns_per_scale(weight.shape[1])
        terms = [plane * spread(own, size, columns) for plane, own in zip(codes, scales)]
        if shift is not None:
            terms.append(spread(shift, size, columns))
        return sum(terms[1:], terms[0]).to(weight.dtype)

    @torch.no_grad()
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        codes, scales, shift, dtype = self._planes(weight)
        coded = Coded(torch.stack(codes).to(torch.int8),
                      torch.stack([own.expand(len(weight), -1) for own in scales]), shift, dtype,
                      self.scheme.columns_per_scale(weight.shape[1]))
        return coded.tensors(self.scheme)

    def _learned(self) -> list[nn.Parameter]:
        return [s for s in (self.scales, self.second_scales) if s is not None]

    def _planes(self, weight: Tensor
                ) -> tuple[list[Tensor], list[Tensor], Tensor | None, torch.dtype]:
        """Return codes [N, K] and stored scales of each plane, the shift, the stored dtype."""
        size = self.scheme.columns_per_scale(weight.shape[1])
        weight, offset, shift = weight.float(), None, None
        positive = [_not_negative(own.float()) for own in self._learned()]
        if self.scheme.center != "none":
            offset = measured(weight.detach(), self.scheme, lambda part: mean(part, None))
        self._check(weight, positive)
        dtype = self._fitting(positive, offset if self.scheme.center == "shift" else None)
        if self.scheme.center == "shift":
            offset = shift = stored(offset, dtype)
        scales = [straight_through(own, own.detach().to(dtype).float()) for own in positive]
        rest = weight if offset is None else weight - spread(offset, size, weight.shape[1])
        units, codes = self._units(weight), []
        for own in scales:
            each = spread(own, size, weight.shape[1])
            codes.append(self._codes(rest, each.detach() / 2, units))
            if len(codes) < len(scales):
                rest = rest - codes[-1] * each
        return codes, scales, shift, dtype

    def _codes(self, rest: Tensor, cut: Tensor, units: Tensor) -> Tensor:
        if self.scheme.method == "binary":
            return self._sign(rest, units)
        values = ternary_code(rest.detach(), cut).to(rest.dtype)
        return straight_through(rest, values, self.estimator, self._strength(), units, cut)

    @torch.no_grad()
    def _check(self, weight: Tensor, scales: list[Tensor]) -> None:
        """Raise where signs would hide that the weight is not a number."""
        if not bool(torch.isfinite(sum(own.sum() for own in scales))):
            raise EncodeError(f"{self.name} has scales that are NaN or infinite: initialise them "
                              f"from the weight or load them; if they were finite, {DIVERGED}")
        if not bool(torch.isfinite(weight.sum())):
            raise EncodeError(f"{self.name} has NaN or infinite values: {DIVERGED}")

    @torch.no_grad()
    def _fitting(self, scales: list[Tensor], shift: Tensor | None) -> torch.dtype:
        """Return the dtype that scales (and shift) are stored in, by the rule of `code`."""
        largest = torch.stack([s.detach() for s in scales]).amax(0)
        if shift is not None:
            largest = torch.maximum(largest, shift.abs())
        wanted = getattr(torch, self.scheme.scale_dtype)
        used = largest[largest > 0]
        fits = bool(((used >= HALF_RANGE[0]) & (used <= HALF_RANGE[1])).all())
        return wanted if fits else torch.float32


def _not_negative(scales: Tensor) -> Tensor:
    return straight_through(scales, scales.detach().clamp(min=0))


def second_basis(model: nn.Module) -> Tensor:
    """Return the mean over layers of the mean second scale: BinaryDM's EBB regulariser.

    Added to the loss with a factor (0.09 in the paper) it shrinks the second bases, so that
    `drop_second` does little harm. Raises ValueError where no layer has two bases.
    """
    means = [m.second_scales.clamp(min=0).mean() for m in model.modules()
             if isinstance(m, LearnedScales) and m.second_scales is not None]
    if not means:
        raise ValueError("no weight of this model has two learned bases: prepare it with learned "
                         "scales and planes 2, or leave out their regulariser")
    return torch.stack(means).mean()


class FrozenSalient(WeightQuantizer):
    """PB-LLM's training: salient weights are frozen at 8 bits, the rest is binary.

        W_q = 8-bit value where salient, else a sign(W),   a = mean|W| of the rest, detached
        dL/dW = a dL/dW_q f(W / unit), 0 where salient                       arXiv 2310.00034

    Which weights are salient and their 8-bit codes come from the weight that it is initialised
    with, chosen as `methods.encode` chooses them, and never change: not by weight decay either.
    With center "shift" the mean of the rest is taken off, stored, and gets no gradient.

    Buffers: mask bool [N, K], codes uint8 [N, K] (0 where not salient), scales, zeros [N, 1].
    """

    def __init__(self, scheme: Scheme, shape: tuple[int, int], **common) -> None:
        super().__init__(scheme, **common)
        if scheme.method != "salient" or scheme.planes > 1:
            raise SchemeError("frozen salient weights are for method salient with planes 1")
        if known_estimator(self.estimator).wave is not None:
            raise SchemeError(f"estimator {self.estimator} is for binary weights without salient "
                              "ones")
        self.register_buffer("mask", torch.zeros(shape, dtype=torch.bool))
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.uint8))
        for name in ("scales", "zeros"):
            self.register_buffer(name, torch.full((shape[0], 1), torch.nan, dtype=torch.float32))

    @torch.no_grad()
    def initialise(self, weight: Tensor, hessian: Tensor | None = None) -> None:
        scheme, dense = self.scheme, weight.detach().float()
        diagonal = None
        if scheme.salient_metric == "hessian":
            if hessian is None:
                raise EncodeError(f"{self.name} needs the Hessian of its inputs to choose salient "
                                  "weights: calibrate, or use salient_metric magnitude")
            diagonal = compensation.factor(hessian.to(dense), scheme.damp, self.name).diagonal()
        size = scheme.columns_per_scale(dense.shape[1])
        mask, columns = salience.choose(dense, scheme, size, diagonal)
        low, high = torch.aminmax(dense, dim=1, keepdim=True)
        scales, zeros, dtype = salience.eight_bit(low, high, getattr(torch, scheme.scale_dtype))
        chosen = Salient(mask, columns, scales, zeros, dtype)
        self.mask, self.scales, self.zeros = mask.clone(), scales, zeros
        self.codes = torch.where(mask, chosen.codes(dense), 0).to(torch.uint8)

    def forward(self, weight: Tensor) -> Tensor:
        coded = self._coded(weight)
        rest = weight.float()
        if coded.shift is not None:
            rest = rest - coded.spread(coded.shift)
        binary = coded.spread(coded.scales[0]) * self._sign(rest, self._units(weight))
        if coded.shift is not None:
            binary = binary + coded.spread(coded.shift)
        frozen = (self.codes - self.zeros) * self.scales
        return torch.where(self.mask, frozen, binary).to(weight.dtype)

    @torch.no_grad()
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        packed = self._coded(weight).tensors(self.scheme, ~self.mask)
        if self.scheme.salient_layout == "columns":
            columns = self.mask[0].nonzero().squeeze(1)
            packed["salient.columns"] = columns.to(torch.int32).unsqueeze(0)
            packed["salient.values"] = self.codes[:, columns]
        else:
            packed["salient.mask"] = pack_bits(self.mask)
            packed["salient.values"] = self.codes[self.mask].unsqueeze(0)
        packed["salient.scales"] = self.scales.squeeze(1).to(self._dtype())
        packed["salient.zeros"] = self.zeros.squeeze(1).to(torch.uint8)
        return packed

    @torch.no_grad()
    def _coded(self, weight: Tensor) -> Coded:
        if bool(self.scales.isnan().any()):
            raise EncodeError(f"{self.name} has no salient weights yet: initialise them from the "
                              "weight or load them")
        return code(weight.detach().float(), self.scheme, ~self.mask, self.name)

    def _dtype(self) -> torch.dtype:
        """Return the dtype that holds the 8-bit scales as they are."""
        wanted = getattr(torch, self.scheme.scale_dtype)
        return wanted if bool((self.scales.to(wanted) == self.scales).all()) else torch.float32
