"""`torch.ops.bitlm.*`: one schema and one fake per op; each backend registers its implementation.

The reference (`reference.py`) is registered for every device; `cpu.py` and `cuda.py` take over on
theirs and say why when they hand a form back.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from . import cpu, cuda, reference
from .form import parse

# `activation` is how x is rounded and `step` the step of its levels: see rounding.rounded.
# `offsets` are the ends of the experts' slices of a sorted x: see reference.packed_linear.
SCHEMAS = {
    "packed_linear": "(Tensor x, Tensor[] tensors, str form, Tensor? bias=None, Tensor? "
                     "offsets=None, str activation='float', Tensor? step=None) -> Tensor",
    "packed_linear_dx": "(Tensor grad, Tensor[] tensors, str form, Tensor? offsets=None) -> Tensor",
    "packed_embedding": "(Tensor ids, Tensor[] tensors, str form, ScalarType dtype) -> Tensor",
    "dequantize": "(Tensor[] tensors, str form, ScalarType dtype) -> Tensor",
}
# The same linear layer on a prepared weight (prepare.py), without gradients; `activation` is its
# number in structs.ACTIVATIONS.
PREPARED_LINEAR = ("prepared_linear(Tensor x, Tensor weight, int rows, Tensor? bias=None, Tensor? "
                   "offsets=None, Tensor? step=None, int activation=0) -> Tensor")

_library = Library("bitlm", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")
_library.define(PREPARED_LINEAR, tags=(torch.Tag.pt2_compliant_tag,))
cpu.register(_library, PREPARED_LINEAR)
cuda.register(_library)


@register_fake("bitlm::packed_linear")
def _(x, tensors, form, bias=None, offsets=None, activation="float", step=None):
    layout = parse(form)
    torch._check(x.shape[-1] == layout.columns,
                 lambda: f"the input has {x.shape[-1]} features, the weight {layout.columns}")
    return x.new_empty((*x.shape[:-1], layout.rows))


@register_fake("bitlm::prepared_linear")
def _(x, weight, rows, bias=None, offsets=None, step=None, activation=0):
    return x.new_empty((*x.shape[:-1], rows))


@register_fake("bitlm::packed_linear_dx")
def _(grad, tensors, form, offsets=None):
    return grad.new_empty((*grad.shape[:-1], parse(form).columns))


@register_fake("bitlm::packed_embedding")
def _(ids, tensors, form, dtype):
    return ids.new_empty((*ids.shape, parse(form).columns), dtype=dtype)


@register_fake("bitlm::dequantize")
def _(tensors, form, dtype):
    layout = parse(form)
    lead = (layout.experts,) if layout.experts else ()
    return tensors[0].new_empty((*lead, layout.rows, layout.columns), dtype=dtype)


def _save_for_backward(ctx, inputs, output):
    _, tensors, form, bias, offsets, *_ = inputs
    ctx.form = form
    ctx.has_offsets = offsets is not None
    ctx.has_bias = bias is not None
    ctx.save_for_backward(*tensors, *((offsets,) if ctx.has_offsets else ()))


def _backward(ctx, grad):
    saved = list(ctx.saved_tensors)
    offsets = saved.pop() if ctx.has_offsets else None
    layout = parse(ctx.form)
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.bitlm.packed_linear_dx(grad, saved, ctx.form, offsets)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        dbias = (_bias_gradient(grad, offsets) if layout.experts else
                 grad.reshape(-1, layout.rows).sum(0))
    gradients = (dx, [None] * len(saved), None, dbias, None, None, None)
    # The dispatcher drops trailing arguments that equal their defaults.
    return gradients[:len(ctx.needs_input_grad)]


def _bias_gradient(grad: Tensor, offsets: Tensor) -> Tensor:
    """Sum the rows of each expert's slice: [T, N] -> [E, N]."""
    expert = torch.bucketize(torch.arange(grad.shape[0], device=grad.device), offsets, right=True)
    sums = grad.new_zeros(offsets.numel() + 1, grad.shape[-1])
    return sums.index_add_(0, expert, grad)[:-1]


register_autograd("bitlm::packed_linear", _backward, setup_context=_save_for_backward)

packed_linear = torch.ops.bitlm.packed_linear
packed_embedding = torch.ops.bitlm.packed_embedding
dequantize = torch.ops.bitlm.dequantize
prepared_linear = torch.ops.bitlm.prepared_linear
