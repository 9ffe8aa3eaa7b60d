"""Attention with rounded operands: the formulas, estimators, and which modules can have them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitlm.attention import Estimators, attention_forward, install_attention, uninstall_attention
from bitlm.quantizers import quantizers
from bitlm.scheme import Attention, Quantizer

HEADS, HEAD, WIDTH = 4, 6, 24
EIGHT = Quantizer("dynamic", 8)
ALL_ATTENTION_FUNCTIONS = {}  # the name by which a module that calls the interface is known


class Layer(nn.Module):
    """An attention module as transformers has them, with its states from elsewhere or not."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="eager")
        self.head_dim, self.is_causal = HEAD, False
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH // groups) for _ in range(2))

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, hidden_states, attention_mask=None, key_value_states=None, **kwargs):
        other = hidden_states if key_value_states is None else key_value_states
        operands = (self.heads(layer(x)) for layer, x in (
            (self.q_proj, hidden_states), (self.k_proj, other), (self.v_proj, other)))
        return ALL_ATTENTION_FUNCTIONS["here"](self, *operands, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS["here"] = attention_forward


def made(attention: Attention, groups: int = 1, trained: bool = True) -> Layer:
    """Return a module with that attention; its estimators estimate something."""
    model = nn.ModuleList([Layer(groups)])
    install_attention(model, {"": attention})
    if trained and model[0].estimators is not None:
        for parameter in model[0].estimators.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model[0]


def plain(layer: Layer, h, other=None, mask=0.0, scaling=HEAD ** -0.5, rounding=None):
    """Return context and probabilities from the formulas, with functions that round operands."""
    rounding = rounding or {}
    other = h if other is None else other
    q, k, v = (layer.heads(f(x)) for f, x in ((layer.q_proj, h), (layer.k_proj, other),
                                              (layer.v_proj, other)))
    q, k, v = (rounding.get(n, lambda x: x)(x) for n, x in (("query", q), ("key", k), ("value", v)))
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    correction, missing = 0.0, 0.0
    if layer.estimators is not None:
        e = layer.estimators
        qp, qm = (functional.linear(h, m.weight, m.bias) for m in (e.q_p, e.q_m))
        kp, km, vp = (functional.linear(other, m.weight, m.bias) for m in (e.k_p, e.k_m, e.v_p))
        correction = sum(a @ b.mT for a, b in ((qm, kp), (qp, km), (qp, kp))).unsqueeze(1)
        missing = (vp @ e.v_out).unsqueeze(1)
    p = ((q @ k.mT + correction) * scaling + mask).softmax(-1)
    rounded = rounding.get("probabilities", lambda x: x)(p)
    return (rounded @ v + rounded @ missing.expand_as(v) if layer.estimators is not None else
            rounded @ v).transpose(1, 2), p


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("cross", [False, True])
def test_the_formulas(cross, groups, rank):
    layer = made(Attention(estimators=rank), groups)
    h, other = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH) if cross else None
    for actual, expected in zip(layer(h, key_value_states=other, scaling=HEAD ** -0.5),
                                plain(layer, h, other)):
        torch.testing.assert_close(actual, expected)
        assert actual.is_contiguous()
    mask = torch.randn(2, 1, 5, 7 if cross else 5)
    bias = torch.randn(1, HEADS, 5, mask.shape[-1])
    torch.testing.assert_close(
        layer(h, mask, other, scaling=1.0, position_bias=bias, output_attentions=True),
        plain(layer, h, other, mask + bias, 1.0))


def test_masks():
    layer = made(Attention())
    h = torch.randn(2, 5, WIDTH)
    seen = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    added = torch.zeros(2, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    context, probabilities = layer(h, seen)
    torch.testing.assert_close((context, probabilities), layer(h, added))
    assert not probabilities.triu(1).any()
    capped = layer(h, seen, softcap=0.1)[1]
    assert (capped[:, :, 1, 0] - 0.5).abs().max() < (probabilities[:, :, 1, 0] - 0.5).abs().max()


def test_each_operand_is_rounded():
    attention = Attention(Quantizer(bits=2), Quantizer(), EIGHT, Quantizer(signed=False),
                          estimators=2)
    layer = made(attention)
    h = torch.randn(2, 5, WIDTH)
    layer(h)  # sets the steps
    rounding = {name: layer.quantizers._modules[name]
                for name in ("query", "key", "value", "probabilities")}
    torch.testing.assert_close(layer(h), plain(layer, h, rounding=rounding))
    assert sorted(layer.state_dict())[:1] == ["estimators.k_m.bias"]
    assert {n for n in layer.state_dict() if n.startswith("quantizers")} == {
        f"quantizers.{operand}.{tensor}" for operand in ("query", "key", "probabilities")
        for tensor in ("step", "initialised")}
    layer.eval()
    expected = layer(h)
    layer.train()
    torch.manual_seed(1)
    context, probabilities = layer(h, dropout=0.5)
    assert torch.equal(probabilities, expected[1])  # those of softmax
    assert not torch.allclose(context, expected[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_the_query_is_scaled_before_it_is_rounded_or_after(rank):
    h = torch.randn(2, 5, WIDTH)
    before = made(Attention(query=Quantizer(bits=2), scale_query=True, estimators=rank))
    after = made(Attention(query=Quantizer(bits=2), estimators=rank))
    after.load_state_dict(before.state_dict())
    before(h), after(h)
    steps = [layer.quantizers.query.step.item() for layer in (before, after)]
    assert steps[0] == pytest.approx(steps[1] * HEAD ** -0.5)
    torch.testing.assert_close(before(h), after(h))  # steps follow the scaling
    with torch.no_grad():
        before.quantizers.query.step.copy_(after.quantizers.query.step)
    assert not torch.allclose(before(h)[1], after(h)[1], atol=1e-3)


def test_channels_of_heads_are_moved():
    moved = Quantizer(move=True)
    layer = made(Attention(moved, moved, moved), groups=2)
    h = torch.randn(2, 5, WIDTH)
    layer(h)
    expected = layer(h)[0]
    with torch.no_grad():  # a shift of the projection's bias, but behind it
        for operand, linear in (("query", layer.q_proj), ("key", layer.k_proj),
                                ("value", layer.v_proj)):
            shift = torch.randn(linear.out_features)
            layer.quantizers._modules[operand].move += shift
            linear.bias -= shift
    torch.testing.assert_close(layer(h)[0], expected)


def test_the_rows_of_bivit():
    layer = made(Attention(probabilities=Quantizer("threshold", rescale="sum")))
    h = torch.randn(2, 5, WIDTH)
    context, p = layer(3 * h)
    ones = (p >= 0.25 * p.amax(-1, keepdim=True)).float()
    values = layer.heads(layer.v_proj(3 * h))
    torch.testing.assert_close(context, (ones / ones.sum(-1, keepdim=True) @ values
                                         ).transpose(1, 2))
    assert 1 < ones.sum(-1).mean() < 5


# --- estimators -----------------------------------------------------------------------------------

def test_the_worked_example_of_rank_one():
    h = torch.tensor([[[1.0, 2], [0, 1], [-1, 1]]])
    estimators = Estimators(1, 2, 2, 3)
    for name, row in (("q_p", [.5, .1]), ("q_m", [.2, -.1]), ("k_p", [.3, .3]), ("k_m", [-.2, .4]),
                      ("v_p", [1.0, 10.0])):
        getattr(estimators, name).weight.data = torch.tensor([row])
        getattr(estimators, name).bias.data.zero_()
    correction, missing = estimators((h, h), 3)
    torch.testing.assert_close(correction, torch.tensor(
        [[[[1.05, .49, .42], [.06, .04, .06], [-.87, -.37, -.24]]]]))
    assert torch.linalg.matrix_rank(correction[0, 0]) == 2
    assert missing.tolist() == [[[[21.0] * 3, [10.0] * 3, [9.0] * 3]]]  # the same for a head


@pytest.mark.parametrize("rank", [1, 4])
def test_they_begin_without_effect_and_learn(rank):
    layer = made(Attention(estimators=rank), trained=False)
    h = torch.randn(2, 5, WIDTH)
    bare = made(Attention())
    bare.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(h), bare(h), atol=0, rtol=0)
    # All errors come from a wrong value and wrong scores, which they can learn.
    target = torch.randn(2, 5, HEADS, HEAD)
    optimizer = torch.optim.Adam(layer.estimators.parameters(), 0.05)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append((layer(h)[0] - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    assert all(p.grad.any() for p in layer.estimators.parameters())
    basis = Estimators(rank, 8, 8, HEAD).v_out
    assert basis[0].tolist() == [1.0] * HEAD and torch.linalg.matrix_rank(basis) == rank


def test_they_need_the_states_of_all_positions():
    layer = made(Attention(estimators=1))
    h = torch.randn(2, 5, WIDTH)
    q, k = (torch.randn(2, HEADS, 5, HEAD) for _ in range(2))
    with pytest.raises(RuntimeError, match="got no hidden states"):
        attention_forward(layer, q, k, k)
    longer = torch.randn(2, HEADS, 8, HEAD)
    with pytest.raises(RuntimeError, match="of all 8 positions, and got those of 5.*use_cache=Fal"):
        attention_forward(layer, q, longer, longer, bitlm_states=(h, h))


def test_they_keep_their_precision():
    layer = made(Attention(EIGHT, estimators=1)).to(torch.bfloat16)
    assert layer.estimators.q_p.weight.dtype == torch.float32
    context, probabilities = layer(torch.randn(2, 5, WIDTH).bfloat16())
    assert context.dtype == probabilities.dtype == torch.bfloat16


# --- installing -----------------------------------------------------------------------------------

class Own(nn.Module):
    """Attention that does not go through the interface."""

    def forward(self, hidden_states):
        return hidden_states


class OwnAttention(Own):
    pass


class Closed(Layer):
    """A module that hands nothing on."""

    def forward(self, hidden_states):
        return ALL_ATTENTION_FUNCTIONS["here"](self, hidden_states)


def test_patterns_choose_and_later_ones_win():
    model = nn.ModuleDict({"a": Layer(), "b": Layer(), "c": Layer(), "d": OwnAttention()})
    found = install_attention(model, {"": Attention(EIGHT), "^b": None,
                                      "c": Attention(Quantizer(bits=2))})
    assert found.installed == ("a", "c")
    assert found.dense == {"b": "not asked for", "d": "OwnAttention does not go through "
                           "transformers' attention interface"}
    assert {n: q.spec.bits for n, q in quantizers(model).items()} == {
        "a.quantizers.query": 8, "c.quantizers.query": 2}
    step = model["c"].quantizers.query.step
    again = install_attention(model, {"": Attention(EIGHT)})  # what is there stays
    assert again.installed == ("a", "b", "c") and model["c"].quantizers.query.step is step
    assert all(model[n].config._attn_implementation_internal == "bitlm" for n in "abc")


def test_what_cannot_be_installed():
    model = nn.ModuleDict({"a": Layer(), "d": OwnAttention()})
    with pytest.raises(ValueError, match=r"attention pattern 'self' matches no attention module of "
                       r"this ModuleDict that can round \(d: OwnAttention does not go"):
        install_attention(model, {"self": Attention(EIGHT)})
    assert install_attention(model, {"self": Attention(EIGHT)}, strict=False).installed == ()
    for layer in (Closed(), Layer()):
        if type(layer) is Layer:
            del layer.q_proj
        with pytest.raises(ValueError, match="a is a .*, whose projections are not known: leave"):
            install_attention(nn.ModuleDict({"a": layer}), {"": Attention(estimators=1)})
    with pytest.raises(ValueError, match="a.quantizers.query shall move each channel"):
        install_attention(nn.ModuleDict({"a": layer}), {"": Attention(Quantizer(move=True))})
    layer.sinks = nn.Parameter(torch.zeros(HEADS))
    found = install_attention(nn.ModuleDict({"a": layer}), {"": Attention(EIGHT)}, strict=False)
    assert found.dense == {"a": "the softmax of Layer has sinks"}


def test_taken_out_again():
    model = nn.ModuleDict({"a": Layer()})
    names = set(model.state_dict())
    install_attention(model, {"": Attention(EIGHT, estimators=1)})
    model["a"].config._attn_implementation = "bitlm"  # which a real configuration would have
    uninstall_attention(model)
    assert set(model.state_dict()) == names and not model["a"]._forward_pre_hooks
    assert model["a"].config._attn_implementation_internal == "eager"
