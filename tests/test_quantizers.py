"""Quantizers of activations: the papers' numbers, their gradients, their state, packed layers."""

from __future__ import annotations

import copy
import socket

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard

from bitlm.methods import encode
from bitlm.modules import PackedLinear
from bitlm.ops.rounding import rounded
from bitlm.quantizers import ElasticQuantizer, build, initialise, quantizers
from bitlm.scheme import Quantizer, Scheme
from bitlm.weight import from_encoded

# The worked examples of the papers' code hold in float32: 0.3 / 0.6 is a tie there.
X = torch.tensor([-1.2, -.5, -.05, 0, .3, .45, .75, 2])
G = torch.arange(1.0, 9.0)
STEP = 0.6
ELASTIC = {
    "signed 1": Quantizer(),
    "signed 2": Quantizer(bits=2),
    "unsigned 1": Quantizer(signed=False),
    "unsigned 2": Quantizer(bits=2, signed=False, minimum=True),
    "signed 2 bit": Quantizer(bits=2, ranges="bit"),
    "unsigned 2 bit": Quantizer(bits=2, signed=False, ranges="bit", minimum=True),
    "unsigned 2 from 0": Quantizer(bits=2, signed=False, ranges="bit"),
}
# For each the first step from X; with STEP the output, the gradient of x and that of the step.
# Of sign(0) the code makes 0 and this +1, which adds 4 / sqrt(8) to 7.071068.
EXAMPLES = {
    "signed 1": (1.3125, [-.6, -.6, -.6, .6, .6, .6, .6, .6], [0, 2, 3, 4, 5, 6, 0, 0],
                 7.071068 + 4 / 8 ** 0.5),
    "signed 2": (1.3125, [-.6, -.6, 0, 0, 0, .6, .6, .6], [0, 2, 3, 4, 5, 6, 0, 0], 4.566731),
    "unsigned 1": (2.625, [0, 0, 0, 0, 0, .6, .6, .6], [0, 0, 0, 4, 5, 6, 0, 0], 4.949747),
    "unsigned 2": (1.515545, [-1.2, -.6, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 0, 0, 0, 0], 12.979166),
    "signed 2 bit": (1.3125, [-1.2, -.6, 0, 0, 0, .6, .6, .6], [1, 2, 3, 4, 5, 6, 0, 0], 4.920285),
    "unsigned 2 bit": (1.515545, [-1.2, -.6, 0, 0, 0, .6, .6, .6], [1, 2, 3, 4, 5, 6, 0, 0],
                       8.964453),
}


def elastic(spec, step=None, features=None):
    """Return a quantizer whose step is set, as if it had been loaded."""
    module = build(spec, features)
    if step is not None:
        with torch.no_grad():
            module.step.fill_(step)
            module.initialised.fill_(1)
    return module


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_worked_examples(name):
    first, output, dx, dstep = EXAMPLES[name]
    module = build(ELASTIC[name])
    module(X)
    assert module.step.item() == pytest.approx(first, abs=1e-6)
    module = elastic(ELASTIC[name], STEP)
    x = X.clone().requires_grad_()
    y = module(x)
    y.backward(G)
    torch.testing.assert_close(y.detach(), torch.tensor(output), atol=1e-6, rtol=0)
    assert x.grad.tolist() == dx
    assert module.step.grad.tolist() == pytest.approx([dstep], rel=1e-6)


@pytest.mark.parametrize("spec, step, expected", [
    (Quantizer(signed=False), 0.5, [0, 0, 0, 0, .5, 0, 0, 0]),
    (Quantizer(bits=2, signed=False), 0.288675, [0, 0, .288675, .288675, .57735, 0, 0, 0])])
def test_probabilities(spec, step, expected):
    p = torch.tensor([.05, .1, .15, .2, .5, 0, 0, 0])
    module = build(spec)
    y = module(p)
    assert module.step.item() == pytest.approx(step, abs=1e-6)
    torch.testing.assert_close(y.detach(), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("signed, expected", [
    (True, [-2.5, -1.259843, -.019685, 0, .393701, 2.5]),
    (False, [-2.5, -1.245098, -.009804, .009804, .401961, 2.5])])
def test_eight_bits_of_the_whole_tensor(signed, expected):
    module = build(Quantizer("dynamic", 8, signed=signed, per="tensor", clip=2.5))
    x = torch.tensor([-3, -1.25, -.01, 0, .4, 2.5], requires_grad=True)
    y = module(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor(expected), atol=1e-6, rtol=0)
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_eight_bits_of_each_token():
    x = torch.randn(3, 4, 40) * torch.tensor([0.1, 1, 10]).view(3, 1, 1)
    symmetric, asymmetric = (build(Quantizer("dynamic", 8, signed=s)) for s in (True, False))
    assert torch.equal(symmetric(x), rounded(x, "int8"))
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    error = (asymmetric(x) - x).abs()
    assert (error <= (most - least) / 255 / 2 * 1.001).all() and error.max() > 0
    for module in (symmetric, asymmetric):
        torch.testing.assert_close(module(x)[1:2], module(x[1:2]))  # whatever stands beside it
        y = x.clone().requires_grad_()
        module(y).backward(torch.ones_like(y))
        assert torch.equal(y.grad, torch.ones_like(y)) and not dict(module.state_dict())
    whole = build(Quantizer("dynamic", 8, per="tensor"))
    assert not torch.allclose(whole(x)[:1], whole(x[:1]), rtol=1e-3)


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_unsigned_steps_do_not_depend_on_masked_keys(bits):
    module = build(Quantizer("dynamic", bits, signed=False))
    alone = torch.tensor([[.1, .2, .3, .4]])
    masked = torch.cat([alone, torch.zeros(1, 3)], 1)
    assert torch.equal(module(masked)[:, :4], module(alone)) and not module(masked)[:, 4:].any()


@pytest.mark.parametrize("bits, expected", [
    (1, [[-1., -1, 3, 3], [0, 2, 0, 2]]), (2, [[-1, 1 / 3, 5 / 3, 3], [0, 2, 2 / 3, 4 / 3]])])
def test_few_steps_between_the_smallest_and_the_largest(bits, expected):
    module = build(Quantizer("dynamic", bits, signed=False))
    x = torch.tensor([[-1, .9, 1.1, 3], [0, 2, .5, 1.2]], requires_grad=True)
    y = module(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor(expected), atol=1e-6, rtol=0)
    assert torch.equal(x.grad, torch.ones_like(x))


A = torch.tensor([.50, .25, .12, .08, .05])


@pytest.mark.parametrize("rescale, worth", [("none", 1), ("sum", 0.5), ("mean", 0.375)])
def test_the_rows_threshold(rescale, worth):
    module = build(Quantizer("threshold", rescale=rescale))
    rows = torch.stack([A, A.flip(0), torch.full((5,), 0.2), torch.tensor([1.0, 0, 0, 0, 0])])
    y = module(rows)
    assert y[0].tolist() == [worth, worth, 0, 0, 0] and torch.equal(y[1], y[0].flip(0))
    ones = {"none": 1, "sum": 0.2, "mean": 0.2}[rescale]
    torch.testing.assert_close(y[2], torch.full((5,), float(ones)))
    assert y[3].tolist() == [1, 0, 0, 0, 0]


def test_it_is_the_optimum_of_the_worked_example():
    ones, worth = torch.ones(5), 0.2
    for _ in range(5):  # the paper's search: the nearest row of two values
        worth = (A @ ones) / ones.sum()
        ones = (A >= worth / 2).float()
    y = build(Quantizer("threshold", rescale="mean"))(A)
    torch.testing.assert_close(y, worth * ones)
    assert ((A - y) ** 2).sum().item() == pytest.approx(.05455)


def test_its_gradient_goes_through_softmax():
    z = torch.tensor([2, 1.3, .6, .2, -.3], requires_grad=True)
    build(Quantizer("threshold"))(z.softmax(-1)).backward(torch.tensor([1.0, 0, 0, 0, 0]))
    assert z.grad.tolist() == pytest.approx([.249995, -.123068, -.061114, -.040966, -.024847],
                                            abs=1e-6)


def test_the_products_of_rounded_queries_and_keys():
    """The residual polynomials of BiPFT, whose zeros are 0 where here they are +1."""
    q = torch.tensor([[1, -.5, .25, 0], [.5, .75, -1, .25], [-.25, 1, .5, -.75]])
    k = torch.tensor([[.5, .5, -.5, 1], [-1, .25, .75, 0], [.25, -.75, 1, .5]])
    modules = build(Quantizer()), build(Quantizer())
    qb, kb = (module(x).detach() for module, x in zip(modules, (q, k)))
    assert [m.step.item() for m in modules] == pytest.approx([1.125, 1.166667])
    torch.testing.assert_close((qb @ kb.T)[1:, [0, 2]],
                               torch.tensor([[5.25, 0], [-2.625, -2.625]]))
    terms = qb @ kb.T, qb @ (k - kb).T, (q - qb) @ kb.T, (q - qb) @ (k - kb).T
    torch.testing.assert_close(sum(terms), q @ k.T)
    zeros = (qb * (q != 0), kb * (k != 0))
    torch.testing.assert_close(zeros[0] @ zeros[1].T, torch.tensor(
        [[-1.3125, -1.3125, 3.9375], [5.25, -1.3125, 0], [-2.625, 3.9375, -2.625]]))


# --- gradients, against formulas that autograd differentiates ---------------------------------

def plain(x, step, spec, minimum):
    """Return what an elastic quantizer gives, out of operations that autograd knows."""
    low, high = {(1, True): (-1, 1), (1, False): (0, 1)}.get((spec.bits, spec.signed)) or {
        (True, "tbt"): (-1, 1), (False, "tbt"): (0, 2), (True, "bit"): (-2, 1),
        (False, "bit"): (0, 3)}[spec.signed, spec.ranges]
    share = 1 / (x.numel() * high) ** 0.5
    a = step * share + (step - step * share).detach()
    if spec.bits == 1 and spec.signed:
        sign = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
        z = (x / step.detach()).clamp(-1, 1)
        return a * sign + (z - z.detach()) * step.detach()
    z = ((x - minimum) / a).clamp(low, high)
    return (z + (z.round() - z).detach()) * a + minimum


@pytest.mark.parametrize("step", [0.4, 1e-7])
@pytest.mark.parametrize("name", ELASTIC)
def test_gradients(name, step):
    spec = ELASTIC[name]
    module = elastic(spec, step).double()
    module.step.data = module.step.data.double()
    x = torch.randn(3, 4, 20, dtype=torch.float64).requires_grad_()
    own = module.step.detach().clamp(min=1e-5).requires_grad_()  # the least step
    minimum = x.detach().amin().float().double() if spec.minimum else 0.0  # as it is stored
    upstream = torch.randn_like(x)
    y, expected = module(x), plain(x, own, spec, minimum)
    torch.testing.assert_close(y, expected)
    dx, dstep = torch.autograd.grad(y, (x, module.step), upstream)
    wanted = torch.autograd.grad(expected, (x, own), upstream)
    torch.testing.assert_close((dx, dstep), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [*ELASTIC.values(), Quantizer("dynamic", 8),
                                  Quantizer("threshold")], ids=str)
def test_low_precision_inputs(spec, dtype):
    module = build(spec)
    module(X)
    x = torch.randn(3, 40).to(dtype).requires_grad_()
    y = module(x)
    expected = module(x.detach().float())
    assert y.dtype == dtype and torch.equal(y.detach(), expected.to(dtype))
    y.sum().backward()
    assert x.grad.dtype == dtype and x.grad.any()
    for parameter in module.parameters():
        assert parameter.grad.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in module.to(dtype).parameters())


@pytest.mark.parametrize("spec", [*ELASTIC.values(), Quantizer("dynamic", 8),
                                  Quantizer("dynamic", 8, signed=False), Quantizer("threshold")],
                         ids=str)
def test_what_is_not_finite_is_not_hidden(spec):
    module = elastic(spec, STEP) if spec.kind == "elastic" else build(spec)
    x = torch.randn(3, 8)
    x[1, 2] = float("nan")
    y = module.eval()(x)
    assert y[1].isnan().any() and y[[0, 2]].isfinite().all()
    assert torch.equal(y[[0, 2]], module(x[[0, 2]]))


# --- state ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ELASTIC)
def test_it_is_initialised_once_and_by_training(name):
    module = build(ELASTIC[name], name="layer.input").eval()
    with pytest.raises(RuntimeError, match="layer.input has no step yet: run the model on a batch"):
        module(X)
    module.train()(X)
    step = module.step.item()
    module(10 * X)
    assert module.step.item() == step

    again = build(ELASTIC[name])
    again.load_state_dict(module.state_dict())
    again(10 * X)  # in training
    assert again.step.item() == step
    torch.testing.assert_close(again.eval()(X), copy.deepcopy(module).eval()(X), atol=step,
                               rtol=0)


def test_a_step_of_one_is_as_good_as_any():
    module = build(Quantizer())
    module(torch.tensor([0.5]))
    assert module.step.item() == 1.0
    again = build(Quantizer())
    again.load_state_dict(module.state_dict())
    assert again.eval()(X).abs().tolist() == [1.0] * 8
    fresh = build(Quantizer())
    again.load_state_dict(fresh.state_dict())  # and back to the start
    with pytest.raises(RuntimeError, match="no step yet"):
        again(X)


@pytest.mark.parametrize("x", [torch.tensor([1.0, float("inf")]), torch.zeros(0, 4)])
def test_a_bad_first_batch(x):
    module = build(Quantizer(), name="a.input")
    with pytest.raises(ValueError, match="a.input cannot be initialised: its first batch"):
        module(x)
    assert not module.ready and module.step.isfinite().all()


def test_the_minimum_is_frozen_for_serving():
    module = build(ELASTIC["unsigned 2"])
    batches = [torch.randn(5, 8) for _ in range(4)]
    expected = batches[0].amin()
    for batch in batches:
        module(batch)
        expected = expected + 0.1 * (batch.amin() - expected)
    assert module.minimum.item() == pytest.approx(expected.item())
    module.eval()
    rows = torch.cat(batches)
    assert torch.equal(module(rows)[:3], module(rows[:3]))  # whatever stands beside them
    assert module.minimum.item() == pytest.approx(expected.item())
    levels = (module(rows) - module.minimum) / module.step.detach()
    assert set(levels.round().unique().tolist()) == {0, 1, 2}
    assert "minimum" not in build(ELASTIC["unsigned 2 from 0"]).state_dict()


def test_channels_are_moved_first():
    module = elastic(Quantizer(move=True), STEP, features=6)
    with torch.no_grad():
        module.move.copy_(torch.linspace(-1, 1, 6))
    x = torch.randn(4, 6, requires_grad=True)
    y = module(x)
    assert torch.equal(y.sign(), torch.where(x + module.move >= 0, 1.0, -1.0))
    y.backward(torch.ones_like(y))
    assert torch.equal(module.move.grad, x.grad.sum(0))
    heads = x.view(2, 2, 3, 2).transpose(1, 2)  # [B, L, heads, head] as attention has it
    expected = y.detach().view(2, 2, 3, 2).transpose(1, 2)
    assert torch.equal(module(heads), expected)
    with pytest.raises(ValueError, match="k.quantizer shall move each channel, but how many"):
        build(Quantizer(move=True), name="k.quantizer")


def test_a_whole_model_is_initialised():
    model = nn.Sequential(nn.Linear(8, 8), build(Quantizer()), nn.Dropout(), build(Quantizer()))
    model[0].eval()
    initialise(model, torch.randn(4, 8))
    assert all(module.ready for module in quantizers(model).values()) and len(list(model)) == 4
    assert model.training and not model[0].training
    model.append(nn.ModuleList([build(Quantizer())]))
    model[4].forward = lambda x: x
    with pytest.raises(RuntimeError, match="did not reach 4.0: give one"):
        initialise(model, torch.randn(4, 8))
    assert "elastic, 1, move=True" in repr(build(Quantizer(move=True), 3))


# --- in a packed layer ----------------------------------------------------------------------------

def layer(spec, scheme=None, columns=160, rows=24, dtype=torch.float32):
    scheme = scheme or Scheme(group_size="row")
    found = encode(torch.randn(rows, columns), scheme)
    weight = from_encoded(found.tensors, (rows, columns), found.group_size, scheme.plane_ratio,
                          dtype)
    quantizer = build(spec, columns)
    quantizer(torch.randn(4, columns))
    if spec.move:
        nn.init.normal_(quantizer.move, std=0.3)
    packed = PackedLinear(weight, torch.randn(rows), input=quantizer).to(dtype).eval()
    return packed.requires_grad_(False)


def mode_of_call(packed, x):
    """Return the activation mode with which the weight is called."""
    modes = []
    hook = packed.weight.register_forward_pre_hook(
        lambda module, args: modes.append(args[3] if len(args) > 3 else None))
    packed(x)
    hook.remove()
    return modes[0]


NATIVE = {"int1": Quantizer(), "int1 moved": Quantizer(move=True), "uint1": Quantizer(signed=False),
          "uint2": ELASTIC["unsigned 2 from 0"], "int8": Quantizer("dynamic", 8)}
OTHER = {  # the mode that leaves what they give as it is
    ELASTIC["signed 2"]: "int8", Quantizer(bits=2, signed=False): "int16",
    ELASTIC["signed 2 bit"]: "int16", ELASTIC["unsigned 2"]: None, ELASTIC["unsigned 2 bit"]: None,
    Quantizer("dynamic", 8, signed=False): None, Quantizer("dynamic", 8, per="tensor"): None,
    Quantizer("dynamic", 8, clip=1.0): None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", [Scheme(group_size="row"), Scheme(method="ternary", planes=2),
                                    Scheme(method="salient", salient=0.1, center="shift")],
                         ids=["binary", "ternary", "salient"])
@pytest.mark.parametrize("name", NATIVE)
def test_the_kernel_rounds_alike(name, scheme, dtype):
    packed = layer(NATIVE[name], scheme, dtype=dtype)
    x = torch.randn(3, 5, 160, dtype=dtype)
    x[0, 0, :4] = torch.tensor([0.0, -0.0, 1e-3, -1e-3])
    assert mode_of_call(packed, x) == name.split()[0]
    expected = packed.weight.dequantize(torch.float32)
    expected = nn.functional.linear(packed.input(x.float() if dtype != torch.float64 else x).to(
        torch.float32), expected, packed.bias.float())
    y = packed(x)
    assert y.dtype == dtype
    low = dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=0.1 if low else 1e-4,
                               rtol=0.02 if low else 1e-5)


@pytest.mark.parametrize("spec", OTHER, ids=str)
def test_other_quantizers_come_before(spec):
    packed = layer(spec)
    x = torch.randn(6, 5, 160) * torch.tensor([0, 0.3, 0.6, 1, 2, 9]).view(6, 1, 1)
    assert mode_of_call(packed, x) == OTHER[spec]
    expected = nn.functional.linear(packed.input(x), packed.weight.dequantize(), packed.bias)
    torch.testing.assert_close(packed(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [0.5, 0.25, 1.5])
@pytest.mark.parametrize("name", NATIVE)
def test_ties_fall_alike(name, value):
    """At the thresholds themselves, in steps that make them exact."""
    packed = layer(NATIVE[name])
    if hasattr(packed.input, "step"):
        packed.input.step.fill_(0.5)
    if hasattr(packed.input, "move"):
        packed.input.move.zero_()
    x = torch.full((2, 160), value) * torch.tensor([1.0, 0.5]).unsqueeze(-1)
    torch.testing.assert_close(packed(x), packed.weight(packed.input(x), packed.bias), atol=1e-4,
                               rtol=1e-5)


def test_what_the_kernel_would_round_otherwise_comes_before():
    packed = layer(Quantizer())
    x = torch.randn(3, 160)
    assert mode_of_call(packed, x) == "int1"
    packed.weight.activation = "int8"
    assert mode_of_call(packed, x) is None
    packed.weight.activation, packed.weight.reads_x = "float", False
    assert mode_of_call(packed, x) is None
    packed.weight.reads_x = True
    assert mode_of_call(packed, x.requires_grad_()) is None
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert mode_of_call(packed, x) is None
        assert packed(x).dtype == torch.bfloat16
    columns = layer(Quantizer(), Scheme(method="salient", salient=0.1, salient_layout="columns"))
    assert not columns.weight.reads_x and mode_of_call(columns, x.detach()) is None


def test_gradients_go_through_a_packed_layer():
    packed = layer(Quantizer(move=True))
    packed.input.requires_grad_(True)
    x = torch.randn(3, 160, requires_grad=True)
    y = packed(x)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), y, atol=1e-4, rtol=1e-5)
    y.sum().backward()
    inside = (x + packed.input.move).abs() <= packed.input.step
    torch.testing.assert_close(x.grad, packed.weight.dequantize().sum(0) * inside)
    assert packed.input.step.grad.any() and packed.input.move.grad.any()


@pytest.mark.parametrize("name", ["int1 moved", "uint1", "signed 2", "unsigned 2"])
def test_compiled_and_exported(name):
    torch.compiler.reset()
    packed = layer((NATIVE | ELASTIC)[name])
    x = torch.randn(3, 160)
    with torch.no_grad():
        compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), packed(x), atol=1e-5, rtol=1e-5)
    program = torch.export.export(packed, (x,))
    torch.testing.assert_close(program.module()(x), packed(x), atol=1e-5, rtol=1e-5)
    packed.input.requires_grad_(True)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    compiled_gradient, packed.input.step.grad = packed.input.step.grad, None
    packed(x).sum().backward()
    torch.testing.assert_close(compiled_gradient, packed.input.step.grad)


# --- several processes ----------------------------------------------------------------------------

def test_several_processes_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first["step"], second["step"])
    assert torch.equal(first["minimum"], second["minimum"])
    batches = [first["x"], second["x"]]
    mean = torch.cat([x.flatten() for x in batches]).abs().mean()
    torch.testing.assert_close(first["step"], (4 * mean / 3 ** 0.5).reshape(1))
    assert first["minimum"].item() == min(x.amin() for x in batches)
    for result in (first, second):
        assert "before fully_shard" in result["sharded"] and result["trained"] == ""


def _process(rank, port, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                                   world_size=2)
    torch.manual_seed(rank)
    x = torch.randn(4 + rank, 8) * (rank + 1)
    module = build(ELASTIC["unsigned 2"])
    module(x)
    result = {"x": x, "step": module.step.detach(), "minimum": module.minimum.clone()}

    def train(early):
        """Return what is said of two steps of a sharded model."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), build(Quantizer(), name="1"), nn.Linear(8, 8))
        if early:
            initialise(model, x)
        mesh = distributed.device_mesh.init_device_mesh("cpu", (2,))
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        try:
            for _ in range(2):
                model(x).square().mean().backward()
                optimizer.step()
        except RuntimeError as error:
            return str(error)
        assert isinstance(model[1], ElasticQuantizer)
        return ""

    result |= {"sharded": train(False), "trained": train(True)}
    torch.save(result, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
