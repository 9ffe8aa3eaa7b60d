"""Error compensation, column by column (GPTQ, arXiv 2210.17323), the same for every method.

With H = X^T X damped and U upper triangular, U^T U = H^-1:

    for each column j:  q = quantize(w_j);  e = (w_j - q) / U_jj;  w_k -= e U_jk for k > j

Updates inside a block of columns are made at once, those of later columns once per block.

A dead column (H_jj = 0: no calibration input reached it) keeps its weights: it gets the damping
alone, so it is rounded to nearest, exchanges no error and scores low in the Hessian metric.
GPTQ zeroes such columns; sign planes cannot hold zeros, and other texts may reach the column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .registry import EncodeError

BLOCK = 128
ATTEMPTS = 3  # damping grows tenfold with each


def factor(hessian: Tensor, damp: float, name: str) -> Tensor:
    """Return U [K, K] float32 of the damped Hessian; raises EncodeError naming the weight."""
    diagonal = hessian.diagonal()
    average = float(diagonal.mean(dtype=torch.float64))
    if average <= 0:
        return torch.eye(len(hessian), device=hessian.device)
    for attempt in range(ATTEMPTS):
        extra = damp * average if attempt == 0 else max(damp, 1e-3) * 10.0 ** attempt * average
        for dtype in (torch.float32, torch.float64):
            found = _inverse_factor(hessian, extra, dtype)
            if found is not None:
                return found
    raise EncodeError(f"{name}: its Hessian has no Cholesky factor even with damping {extra:.3g}: "
                      "use more calibration text, or a scheme without compensation")


def _inverse_factor(hessian: Tensor, extra: float, dtype: torch.dtype) -> Tensor | None:
    """Return U with U^T U = (H + extra I)^-1, or None where that has no Cholesky factor.

    Flipping both axes turns a lower Cholesky factor into R with R R^T = H, R upper; U = R^-1.
    Matrices of wide layers are large, so no more of them are held than a step needs.
    """
    flipped = hessian.to(dtype).flip(0, 1)
    diagonal = flipped.diagonal().add_(extra)
    diagonal[diagonal <= 0] = 1
    del diagonal
    lower, failed = torch.linalg.cholesky_ex(flipped)
    del flipped
    if bool(failed):
        return None
    upper = lower.flip(0, 1)
    del lower
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    found = torch.linalg.solve_triangular(upper, eye, upper=True).to(torch.float32)
    return found if bool(torch.isfinite(found).all()) else None


def blocks(columns: int, group_size: int, width: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of at most `width` columns; a group begins and ends with a block,
    or lies inside one, so that all its columns are up to date where it begins."""
    span = group_size if group_size >= width else width // group_size * group_size
    for first in range(0, columns, span):
        last = min(first + span, columns)
        for start in range(first, last, width):
            yield start, min(start + width, last)


def compensate(dense: Tensor, factor: Tensor, group_size: int,
               quantize: Callable[[int, Tensor], Tensor], width: int = BLOCK) -> None:
    """Quantize a transposed weight [K, N] in place, column by column.

    quantize(j, column [N]) returns what column j becomes. When it is called, all earlier errors
    have reached column j, and also the rest of j's group if j begins a group.
    """
    columns = len(dense)
    scaled = factor / factor.diagonal().unsqueeze(1)  # rows divided by U_jj: e becomes w - q
    for start, stop in blocks(columns, group_size, width):
        errors = torch.empty_like(dense[start:stop])
        for j in range(start, stop):
            column = dense[j]
            quantized = quantize(j, column)
            error = torch.sub(column, quantized, out=errors[j - start])
            column.copy_(quantized)
            dense[j + 1:stop].addr_(scaled[j, j + 1:stop], error, alpha=-1)
        dense[stop:].addmm_(scaled[start:stop, stop:].T, errors, alpha=-1)
