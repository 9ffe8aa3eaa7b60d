"""`encode`: one dense weight becomes the packed tensors of file format 1.

Without compensation a weight is encoded in chunks of rows, so that little more than the result is
held. With it, the whole transposed weight is walked column by column (`compensation.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import torch
from torch import Tensor

from ..ops.bits import pack_bits, pack_trits
from ..scheme import Scheme
from . import compensation, salience
from .levels import DoesNotFit
from .registry import EncodeError, Fit, Method, method, needs_hessian
from .salience import HALF_RANGE, Salient

# Weights encoded at a time: on a CPU a few float32 temporaries should stay in the cache.
CHUNK = {"cpu": 1 << 17}
CHUNK_ELSEWHERE = 1 << 21
LEVELS_PER_WEIGHT = 4  # the tables of a refit take some 64 bytes per level


@dataclass
class Encoded:
    """The packed tensors of one weight, by their names in the file, and what rounding cost.

    group_size: columns per scale. relative_error: |W - What| / |W|, Frobenius norms. output_error:
    the same for the layer's outputs, sqrt(tr(E H E^T) / tr(W H W^T)), where a Hessian was given.
    """

    tensors: dict[str, Tensor]
    group_size: int
    relative_error: float
    output_error: float | None


@torch.no_grad()
def encode(weight: Tensor, scheme: Scheme, hessian: Tensor | None = None,
           name: str = "weight") -> Encoded:
    """Encode a dense weight [N, K] of any float dtype by a scheme.

    hessian: X^T X [K, K] of the weight's inputs, needed where `statistics_needed(scheme)` says so.
    name: for messages. Raises EncodeError for a weight or Hessian that cannot be used, SchemeError
    for a scheme that makes no sense.
    """
    return encode_with_mask(weight, scheme, hessian, name, None)


def encode_with_mask(weight: Tensor, scheme: Scheme, hessian: Tensor | None, name: str,
                     mask: Tensor | None) -> Encoded:
    """`encode` with the salient entries given, bool [N, K], instead of chosen."""
    found = method(scheme)
    _check_weight(weight, name)
    _check_hessian(weight, scheme, hessian, name)
    if hessian is not None:
        hessian = hessian.to(weight.device, torch.float32)
    factor = compensation.factor(hessian, scheme.damp, name) if needs_hessian(scheme) else None
    salient = _salient(weight, scheme, factor, mask) if scheme.salient > 0 else None
    job = _Job(weight.detach(), scheme, found, getattr(torch, scheme.scale_dtype), salient, hessian)
    try:
        return _run(job, factor)
    except DoesNotFit:
        try:
            return _run(replace(job, dtype=torch.float32), factor)
        except DoesNotFit:
            raise EncodeError(f"{name} has values too large for float32 scales: repair the "
                              "checkpoint or leave it out with --skip") from None


# --- checks --------------------------------------------------------------------------------------

def _check_weight(weight: Tensor, name: str) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise EncodeError(f"{name} is {weight.dtype} {list(weight.shape)}: only a matrix of floats "
                          "can be encoded")
    # A sum is finite unless something in it is not (or it overflows, which the count settles).
    sums = [weight[rows].float().sum() for rows in _chunks(weight)]
    if bool(torch.isfinite(torch.stack(sums)).all()):
        return
    bad = sum(int((~torch.isfinite(weight[rows].double())).sum()) for rows in _chunks(weight))
    if bad:
        raise EncodeError(f"{name} has {bad} NaN or infinite values: repair the checkpoint or "
                          "leave it out with --skip")


def _check_hessian(weight: Tensor, scheme: Scheme, hessian: Tensor | None, name: str) -> None:
    if hessian is None:
        if needs_hessian(scheme):
            raise EncodeError(f"{name} needs the Hessian of its inputs for this scheme: calibrate, "
                              "or use a scheme without compensation and Hessian salience")
        return
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise EncodeError(f"{name}: the Hessian is {list(hessian.shape)}, the weight has {columns} "
                          "columns")
    if not bool(torch.isfinite(hessian.sum())):
        raise EncodeError(f"{name}: the Hessian of its inputs has NaN or infinite values: check "
                          "the calibration text and the model's activations")


# --- parts of the work ---------------------------------------------------------------------------

@dataclass(frozen=True)
class _Job:
    """One weight on its way: what all steps need to know."""

    weight: Tensor
    scheme: Scheme
    method: Method
    dtype: torch.dtype  # of the stored scales
    salient: Salient | None
    hessian: Tensor | None

    @property
    def group_size(self) -> int:
        return self.scheme.columns_per_scale(self.weight.shape[1])

    @property
    def pooled(self) -> bool:
        return self.scheme.group_size == "tensor"

    def counted(self, rows: slice, columns: slice) -> Tensor | None:
        """Return the mask of entries that planes have to represent, or None for all."""
        return None if self.salient is None else ~self.salient.mask[rows, columns]

    @cached_property
    def importance(self) -> Tensor | None:
        """How much each column [K] counts when scales are refitted to calibrated inputs.

        The damped diagonal of the Hessian: the output error, correlations left to compensation.
        """
        if not self.scheme.compensate or not self.scheme.refit:
            return None
        diagonal = self.hessian.diagonal()
        average = diagonal.mean()
        return diagonal / average + self.scheme.damp if average > 0 else torch.ones_like(diagonal)

    def fit(self, weights: Tensor, mask: Tensor | None) -> Fit:
        """Fit rows of weights; raises DoesNotFit when the scales leave the stored dtype's range.

        A group fits float16 when its largest scale or shift is a normal number: the others are
        then off by no more than that one's rounding error, however small they are.
        """
        fit = self.method.fit(weights, mask, self.scheme, self.dtype)
        if self.dtype == torch.float32:
            return fit
        small = _largest(fit) < HALF_RANGE[0]
        if bool(small.any()):
            exact = self.method.fit(weights[small], None if mask is None else mask[small],
                                    self.scheme, torch.float32)
            if bool(_largest(exact).any()):
                raise DoesNotFit("scales are too small for float16")
        return fit

    def fit_columns(self, dense: Tensor, rows: slice, columns: slice) -> Fit:
        """Fit dense [n, c], the given rows and columns of one group (of all groups if pooled)."""
        mask = self.counted(rows, columns)
        importance = self.importance
        if importance is not None:
            mask = (importance[columns].expand_as(dense) if mask is None else
                    importance[columns] * mask)
        if self.pooled:
            dense, mask = dense.reshape(1, -1), None if mask is None else mask.reshape(1, -1)
        return self.fit(dense, mask)


def _largest(fit: Fit) -> Tensor:
    """Return the largest magnitude [R] of scales and shift."""
    largest = fit.scales.abs().amax(1)
    return largest if fit.shift is None else torch.maximum(largest, fit.shift.abs().squeeze(1))


class _Tensors:
    """The packed tensors, filled row range by row range."""

    def __init__(self, job: _Job) -> None:
        rows, columns = job.weight.shape
        scheme, device = job.scheme, job.weight.device
        groups = ceil(columns / job.group_size)
        self.job, self.trits = job, scheme.trits
        self.planes: list[dict[str, Tensor]] = []
        for plane in range(scheme.planes):
            width = ceil(columns / (5 if scheme.trits else 8))
            kinds = (("trits",) if scheme.trits else
                     ("signs", "mask") if job.method.codes == "ternary" else ("signs",))
            own = {kind: torch.empty(rows, width, dtype=torch.uint8, device=device)
                   for kind in kinds}
            if plane == 0 or scheme.plane_ratio == 1:
                own["scales"] = torch.empty(rows, groups, dtype=job.dtype, device=device)
            self.planes.append(own)
        self.shift: Tensor | None = None
        self.salient_values: list[Tensor] = []

    def put_scales(self, rows: slice, groups: slice, fit: Fit) -> None:
        """Store the levels of row-major groups (one fit for all rows if pooled)."""
        for plane, own in enumerate(self.planes):
            if "scales" in own:
                _fill(own["scales"][rows, groups], fit.scales[:, plane])
        if fit.shift is not None:
            if self.shift is None:
                self.shift = torch.empty_like(self.planes[0]["scales"])
            _fill(self.shift[rows, groups], fit.shift)

    def put_codes(self, rows: slice, codes: Tensor) -> None:
        """Pack codes [P, n, K]; sign bits of zeros and of salient entries are 0."""
        counted = self.job.counted(rows, slice(None))
        for own, plane in zip(self.planes, codes, strict=True):
            if self.trits:
                own["trits"][rows] = pack_trits(plane)
                continue
            positive = plane > 0
            own["signs"][rows] = pack_bits(positive if counted is None else positive & counted)
            if "mask" in own:
                own["mask"][rows] = pack_bits(plane != 0)

    def put_salient(self, rows: slice, codes: Tensor) -> None:
        """Keep the 8-bit codes [n, K] of salient entries, in row-major order."""
        salient = self.job.salient
        if salient.columns is None:
            self.salient_values.append(codes[salient.mask[rows]].to(torch.uint8))
        else:
            self.salient_values.append(codes[:, salient.columns].to(torch.uint8))

    def named(self) -> dict[str, Tensor]:
        tensors = {f"plane{number}.{kind}": tensor for number, own in enumerate(self.planes)
                   for kind, tensor in own.items()}
        if self.shift is not None:
            tensors["shift"] = self.shift
        salient = self.job.salient
        if salient is None:
            return tensors
        if salient.columns is None:
            tensors["salient.mask"] = pack_bits(salient.mask)
            tensors["salient.values"] = torch.cat(self.salient_values).unsqueeze(0)
        else:
            tensors["salient.columns"] = salient.columns.to(torch.int32).unsqueeze(0)
            tensors["salient.values"] = torch.cat(self.salient_values)
        tensors["salient.scales"] = salient.scales.squeeze(1).to(salient.dtype)
        tensors["salient.zeros"] = salient.zeros.squeeze(1).to(torch.uint8)
        return tensors


def _fill(target: Tensor, values: Tensor) -> None:
    """Copy one value per row and group, or one for all, into target [n, groups]."""
    target.copy_(values.reshape(target.shape if values.numel() > 1 else (1, 1)))


class _Errors:
    """Sums of squared errors, of the weight and of its outputs."""

    def __init__(self, hessian: Tensor | None) -> None:
        self.hessian = hessian
        self.sums: list[Tensor] = []

    def add(self, dense: Tensor, values: Tensor) -> None:
        """Count rows of the dense weight and what became of them (`values` is overwritten)."""
        error = values.sub_(dense)
        self.sums.append(torch.stack([part for kind in (error, dense) for part in self._of(kind)]))

    def _of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.linalg.vector_norm(rows, dim=1).double().square_().sum()
        if self.hessian is None:
            return weight, torch.zeros_like(weight)
        return weight, (rows @ self.hessian).mul_(rows).sum(dtype=torch.float64)

    def relative(self) -> tuple[float, float | None]:
        error, output_error, size, output_size = torch.stack(self.sums).sum(0).tolist()
        weight = (error / size) ** 0.5 if size > 0 else 0.0
        if self.hessian is None:
            return weight, None
        return weight, (max(output_error, 0) / output_size) ** 0.5 if output_size > 0 else 0.0


def _chunks(weight: Tensor, per_weight: float = 1) -> Iterator[slice]:
    """Yield row ranges of about CHUNK weights, fewer where a weight takes more memory."""
    chunk = CHUNK.get(weight.device.type, CHUNK_ELSEWHERE)
    rows = max(1, int(chunk / per_weight) // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        yield slice(start, min(start + rows, weight.shape[0]))


def _salient(weight: Tensor, scheme: Scheme, factor: Tensor | None,
             mask: Tensor | None) -> Salient:
    """Choose the salient entries of the original weight and its 8-bit range per row."""
    columns = None
    if mask is None:
        diagonal = None if factor is None else factor.diagonal()
        mask, columns = salience.choose(weight, scheme,
                                        scheme.columns_per_scale(weight.shape[1]), diagonal)
    ends = [torch.aminmax(weight[rows].float(), dim=1, keepdim=True) for rows in _chunks(weight)]
    low, high = (torch.cat([end[side] for end in ends]) for side in (0, 1))
    wanted = getattr(torch, scheme.scale_dtype)
    return Salient(mask, columns, *salience.eight_bit(low, high, wanted))


# --- the two ways --------------------------------------------------------------------------------

def _run(job: _Job, factor: Tensor | None) -> Encoded:
    out, errors = _Tensors(job), _Errors(job.hessian)
    if job.scheme.compensate:
        _compensated(job, factor, out, errors)
    else:
        _by_rows(job, out, errors)
    return Encoded(out.named(), job.group_size, *errors.relative())


def _by_rows(job: _Job, out: _Tensors, errors: _Errors) -> None:
    """Round to nearest, a chunk of rows at a time."""
    columns, size = job.weight.shape[1], job.group_size
    full = columns // size * size
    spans = [span for span in (slice(0, full), slice(full, columns)) if span.stop > span.start]
    pooled = None
    if job.pooled:
        pooled = job.fit_columns(job.weight.float(), slice(None), slice(None))
        out.put_scales(slice(None), slice(None), pooled)
    for rows in _chunks(job.weight, _memory(job)):
        dense = job.weight[rows].float()
        codes, values = [], []
        for span in spans:
            width = min(size, span.stop - span.start)
            part = dense[:, span].reshape(1 if job.pooled else -1, -1 if job.pooled else width)
            fit = pooled
            if fit is None:
                mask = job.counted(rows, span)
                fit = job.fit(part, None if mask is None else mask.reshape(-1, width))
                out.put_scales(rows, slice(span.start // size, ceil(span.stop / size)), fit)
            own = fit.assign(part)
            codes.append(own.view(len(own), len(dense), -1))
            values.append(fit.values(own).view(len(dense), -1))
        out.put_codes(rows, codes[0] if len(codes) == 1 else torch.cat(codes, dim=2))
        result = values[0] if len(values) == 1 else torch.cat(values, dim=1)
        if job.salient is not None:
            eight = job.salient.codes(dense, rows)
            out.put_salient(rows, eight)
            result = torch.where(job.salient.mask[rows], job.salient.values(eight, rows), result)
        errors.add(dense, result)


def _memory(job: _Job) -> float:
    """Return how much smaller than usual a chunk must be, for the tables of levels of a refit."""
    scheme = job.scheme
    if not scheme.refit or scheme.plane_ratio != 1:
        return 1
    levels = (2.0 if job.method.codes == "binary" else 3.0) ** scheme.planes
    return max(1, levels / job.group_size / LEVELS_PER_WEIGHT)


def _compensated(job: _Job, factor: Tensor, out: _Tensors, errors: _Errors) -> None:
    """Walk the columns, spreading each one's error over the later ones."""
    count, columns = job.weight.shape
    size, salient = job.group_size, job.salient
    dense = job.weight.float().T.contiguous()
    if dense.data_ptr() == job.weight.data_ptr():
        dense = dense.clone()
    codes = torch.empty(job.scheme.planes, columns, count, dtype=torch.int8, device=dense.device)
    kept = None if salient is None else salient.mask.T.contiguous()
    eight = None if salient is None else torch.empty_like(dense, dtype=torch.uint8)
    shape = (1, count) if job.pooled else (count, 1)
    fit = None

    def quantize(j: int, column: Tensor) -> Tensor:
        nonlocal fit
        if j % size == 0:
            span = slice(j, min(j + size, columns))
            source = (dense[span].T.contiguous() if job.scheme.scales_from == "compensated" else
                      job.weight[:, span].float())
            fit = job.fit_columns(source, slice(None), span)
            out.put_scales(slice(None), slice(j // size, j // size + 1), fit)
        own = fit.assign(column.view(shape))
        codes[:, j] = own.view(len(own), count)
        values = fit.values(own).view(count)
        if salient is None:
            return values
        high = salient.codes(column.view(count, 1))
        eight[j] = high.view(count)
        return torch.where(kept[j], salient.values(high).view(count), values)

    compensation.compensate(dense, factor, size, quantize)
    for rows in _chunks(job.weight):
        # A clone, since packing needs ordinary strides even where N is 1.
        by_row = codes[:, :, rows].transpose(1, 2).clone(memory_format=torch.contiguous_format)
        out.put_codes(rows, by_row)
        if salient is not None:
            out.put_salient(rows, eight[:, rows].T)
        errors.add(job.weight[rows].float(), dense[:, rows].T.contiguous())
