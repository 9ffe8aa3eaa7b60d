"""The distillation losses: the worked examples, plain formulas, masks, and what is refused."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitlm.train.losses import (
    Total,
    attention_mse,
    direction_matching,
    hidden_mse,
    kl,
    labelled,
    layer_map,
    low_rank_mimicking,
    pairs_of_tokens,
    plackett_luce,
    principal_directions,
    relations,
    shift,
    soft_cross_entropy,
)

T, S = [[1., 0, -1]], [[.5, .5, -1]]
PLD_S, PLD_T = [[.2, 1, -.5, .3]], [[2, .5, 1, -1]]
A = [[[1, 0], [0, 1], [1, 1]]]
B = [[[.5, 0], [0, 2], [1, -1]]]


def double(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(actual, expected, tolerance=2e-6):
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64).detach(),
                               torch.as_tensor(expected, dtype=torch.float64),
                               atol=tolerance, rtol=tolerance)


# --- worked examples -----------------------------------------------------------------------------

@pytest.mark.parametrize("temperature, expected", [(1, .101566), (2, .098909)])
def test_kl(temperature, expected):
    total = kl(double(S), double(T), temperature=temperature)
    close(total.sum, expected)
    assert total.sum.dtype == torch.float64 and int(total.count) == 1


def test_kl_is_torchs_divergence():
    s, t = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    flat = functional.kl_div((s / 3).log_softmax(-1).view(6, 7), (t / 3).softmax(-1).view(6, 7),
                             reduction="batchmean") * 9
    close(kl(s, t, temperature=3).mean(), flat)


@pytest.mark.parametrize("over, expected", [("positions", .933962), ("classes", .311321)])
def test_soft_cross_entropy(over, expected):
    close(soft_cross_entropy(double(S), double(T), over=over).mean(), expected)


def test_soft_cross_entropy_has_the_gradient_of_kl():
    s = torch.randn(4, 5, requires_grad=True)
    t = torch.randn(4, 5)
    grads = [torch.autograd.grad(loss(s, t).sum, s)[0] for loss in (kl, soft_cross_entropy)]
    close(*grads)


@pytest.mark.parametrize("label, expected, grad", [
    (0, 1.472162, [-.483207, .366233, -.132422, .249396]),
    (1, .950622, None),
])
def test_plackett_luce(label, expected, grad):
    s = double(PLD_S)
    total = plackett_luce(s, double(PLD_T), torch.tensor([label]))
    close(total.sum, expected)
    total.sum.backward()
    if grad:
        close(s.grad[0], grad)
    close(s.grad.sum(), 0, 1e-12)


def test_plackett_luce_terms():
    """The terms of the note, by a loop."""
    p = torch.tensor(PLD_T, dtype=torch.float64)[0].softmax(0)
    s = torch.tensor(PLD_S, dtype=torch.float64)[0]
    for label, order, terms in ((0, [0, 2, 1, 3], [.959465, .457868, .054829, 0]),
                                (1, [1, 0, 2, 3], [.105294, .582758, .262570, 0])):
        found = [p[k] * (s[order[i:]].logsumexp(0) - s[k]) for i, k in enumerate(order)]
        close(torch.stack(found), terms)
        close(plackett_luce(s[None], torch.tensor(PLD_T), torch.tensor([label])).sum, sum(terms))


def test_relation():
    close(relations(double(B), double(A)).mean(), .522295)
    a = torch.tensor(A, dtype=torch.float64)[0]
    close((a @ a.T / 2 ** .5).softmax(-1), [[.401112, .197776, .401112],
                                            [.197776, .401112, .401112],
                                            [.248255, .248255, .503490]])


def test_low_rank_mimicking():
    f = torch.tensor([[2., 0, 1, 0], [0, 1, 0, 1], [-2, 0, -1, 0], [0, -1, 0, -1]],
                     dtype=torch.float64)
    along = principal_directions([f], 1)
    close(along[:, 0], [.894427, 0, .447214, 0])
    student = (f + torch.diag(torch.tensor([.1, .2, .3, .4], dtype=torch.float64)))[None]
    total = low_rank_mimicking([student], [f[None]], [along])
    close(total.mean(), .0065)
    assert int(total.count) == 4


# --- plackett-luce -------------------------------------------------------------------------------

def test_plackett_luce_of_a_sure_teacher_is_the_cross_entropy():
    s = torch.randn(6, 9, dtype=torch.float64)
    labels = torch.arange(6)
    t = torch.full((6, 9), -400.0, dtype=torch.float64).scatter_(1, labels[:, None], 400.0)
    expected = functional.cross_entropy(s, labels, reduction="sum")
    for top in (None, 3):
        close(plackett_luce(s, t, labels, top=top).sum, expected)


def test_plackett_luce_ignores_a_constant_and_is_convex():
    t, labels = torch.randn(5, 8, dtype=torch.float64), torch.randint(8, (5,))
    one, two = torch.randn(2, 5, 8, dtype=torch.float64)

    def loss(s):
        return float(plackett_luce(s, t, labels, temperature=2).sum)

    assert loss(one + 7) == pytest.approx(loss(one))
    assert loss((one + two) / 2) <= (loss(one) + loss(two)) / 2


def test_plackett_luce_of_the_top():
    s = torch.randn(4, 50, dtype=torch.float64, requires_grad=True)
    t, labels = 4 * torch.randn(4, 50, dtype=torch.float64), torch.randint(50, (4,))
    whole = plackett_luce(s, t, labels).sum
    for top in (49, 50, 1000):
        close(plackett_luce(s, t, labels, top=top).sum, whole)
    part = plackett_luce(s, t, labels, top=20).sum
    assert 0 < whole - part < .02 * whole
    grad, = torch.autograd.grad(part, s)
    close(grad.sum(1), torch.zeros(4), 1e-12)
    assert (grad != 0).all()  # classes outside of the top are still pushed down


def test_plackett_luce_without_labels_takes_the_teachers_choice():
    s, t = torch.randn(3, 6), torch.randn(3, 6)
    close(plackett_luce(s, t).sum, plackett_luce(s, t, t.argmax(-1)).sum)


def test_plackett_luce_ties_and_small_labels():
    s, t = torch.randn(2, 4), torch.zeros(2, 4)
    labels = torch.tensor([1, 3], dtype=torch.int32)
    assert torch.isfinite(plackett_luce(s, t, labels).sum)


@pytest.mark.parametrize("labels", [[0, 4], [-1, 2]])
def test_labels_out_of_range(labels):
    with pytest.raises(ValueError, match=rf"labels go from {labels[0]} to {labels[1]}, the logits "
                                         "have classes 0 to 3"):
        plackett_luce(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor(labels))


# --- masks ---------------------------------------------------------------------------------------

LENGTHS = (5, 3)


def padded(*shape, extra, fill, seed):
    """Return [2, 5 + extra, ...] of which the tokens beyond LENGTHS are `fill`."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 5, *shape, generator=random)
    values = torch.cat([values, torch.full((2, extra, *shape), fill)], 1)
    values[1, 3:] = fill
    return values


def mask_of(extra):
    return torch.arange(5 + extra)[None] < torch.tensor(LENGTHS)[:, None]


def heads(states):
    return states.unflatten(-1, (2, -1)).transpose(1, 2)


def attention(extra, fill, seed):
    random = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 5, 5, generator=random)
    scores = functional.pad(scores, (0, extra, 0, extra), value=fill)
    return scores.masked_fill(~pairs_of_tokens(mask_of(extra)), fill)


LOGITS = {
    "kl": lambda s, t, m: kl(s, t, m, 2.0),
    "soft": soft_cross_entropy,
    "soft over classes": lambda s, t, m: soft_cross_entropy(s, t, m, "classes"),
    "pld": lambda s, t, m: plackett_luce(s, t, torch.zeros_like(m, dtype=torch.int64), m),
    "pld of the top": lambda s, t, m: plackett_luce(s, t, None, m, top=3),
    "hidden": lambda s, t, m: hidden_mse([s], [t], m),
    "low rank": lambda s, t, m: low_rank_mimicking([s], [t], [torch.eye(8)[:, :3]], m),
    "relations": lambda s, t, m: relations(s, t, m, 4),
    "directions": lambda s, t, m: direction_matching(heads(s), heads(t), m),
    "directions l2": lambda s, t, m: direction_matching(heads(s), heads(t), m, "l2"),
}


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("fill", [0.0, 9.0, math.inf, math.nan])
def test_padding_changes_nothing(name, fill):
    """Neither its length nor what stands in it, in value, count and gradient."""
    results = []
    for extra, what in ((0, 0.0), (4, fill)):
        s = padded(8, extra=extra, fill=what, seed=1).requires_grad_()
        total = LOGITS[name](s, padded(8, extra=extra, fill=what, seed=2), mask_of(extra))
        assert total.sum > 0
        total.sum.backward()
        assert not s.grad[~mask_of(extra)].any()
        results.append((total.sum.detach(), total.count, s.grad[mask_of(extra)]))
    for one, two in zip(*results):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("fill", [-math.inf, -1e9, 5.0, math.nan])
def test_padding_in_attention(fill):
    results = []
    for extra, what in ((0, 0.0), (3, fill)):
        s = attention(extra, what, 1).requires_grad_()
        real = pairs_of_tokens(mask_of(extra))
        total = attention_mse([s, s], [attention(extra, what, 2), attention(extra, what, 3)], real)
        total.sum.backward()
        assert int(total.count) == 3 * (25 + 9)
        results.append((total.sum.detach(), s.grad[real.expand(s.shape)]))
    for one, two in zip(*results):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", LOGITS)
def test_sums_and_counts_add_up(name):
    """Two micro-batches of unequal length make the mean of the whole batch."""
    s, t, mask = padded(8, extra=0, fill=0.0, seed=1), padded(8, extra=0, fill=0.0, seed=2), \
        mask_of(0)
    whole = LOGITS[name](s, t, mask)
    parts = [LOGITS[name](s[i:i + 1], t[i:i + 1], mask[i:i + 1]) for i in (0, 1)]
    close(sum(p.sum for p in parts) / sum(p.count for p in parts), whole.mean())
    assert whole.count == sum(p.count for p in parts) and not whole.count.requires_grad


@pytest.mark.parametrize("name", LOGITS)
def test_equal_models_and_no_gradient_to_the_teacher(name):
    s = padded(8, extra=0, fill=0.0, seed=1).requires_grad_()
    t = padded(8, extra=0, fill=0.0, seed=2).requires_grad_()
    LOGITS[name](s, t, mask_of(0)).sum.backward()
    assert s.grad.any() and t.grad is None
    if not name.startswith(("soft", "pld")):
        close(LOGITS[name](s, s.detach(), mask_of(0)).sum, 0, 1e-6)


@pytest.mark.parametrize("name", LOGITS)
def test_half_precision_is_summed_in_float32(name):
    s, t = padded(8, extra=0, fill=0.0, seed=1), padded(8, extra=0, fill=0.0, seed=2)
    s, t = s.bfloat16(), t.bfloat16()
    total = LOGITS[name](s, t, mask_of(0))
    assert total.sum.dtype == torch.float32
    close(total.sum, LOGITS[name](s.double(), t.double(), mask_of(0)).sum, 1e-5)


def test_nothing_counted_is_zero():
    s = torch.randn(1, 2, 3, requires_grad=True)
    nothing = torch.zeros(1, 2, dtype=torch.long)
    for loss in (lambda: kl(s, s, nothing), lambda: hidden_mse([s], [s], nothing),
                 lambda: relations(s, s, nothing), lambda: plackett_luce(s, s, mask=nothing),
                 lambda: direction_matching(s[:, None], s[:, None], nothing)):
        total = loss()
        assert int(total.count) == 0 and float(total.mean().detach()) == 0
        total.mean().backward()
        assert not s.grad.any()


def test_equal_logits():
    s = torch.randn(4, 11)
    assert float(kl(s, s.clone()).sum) == 0
    close(kl(s, s + 3).sum, 0, 1e-5)


def test_total_is_a_pair():
    value, count = Total(torch.tensor(6.0), torch.tensor(4))
    assert float(Total(value, count).mean()) == 1.5


def test_shift_and_labelled():
    labels = torch.tensor([[5, 6, -100, 8]])
    logits = torch.arange(8.).view(1, 4, 2)
    now, s, t = shift(labels, logits, logits + 1)
    assert now.tolist() == [[6, -100, 8]]
    assert torch.equal(s, logits[:, :3]) and torch.equal(t, logits[:, :3] + 1)
    assert labelled(now).tolist() == [[True, False, True]]
    assert labelled(now, torch.tensor([[1, 1, 0]])).tolist() == [[True, False, False]]


def test_causal_distillation_is_that_of_next_tokens():
    """Shift first: the last logits predict nothing, a position counts if its label does."""
    s, t = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    labels, s_, t_ = shift(torch.tensor([[1, 2, -100, 3]]), s, t)
    expected = (kl(s[:, 0], t[:, 0]).sum + kl(s[:, 2], t[:, 2]).sum) / 2
    close(kl(s_, t_, labelled(labels)).mean(), expected)


def test_pairs_of_tokens():
    mask = torch.tensor([[1, 1, 0]])
    assert pairs_of_tokens(mask)[0, 0].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert pairs_of_tokens(mask, causal=True)[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    cross = pairs_of_tokens(mask, torch.tensor([[1, 0]]))
    assert cross.shape == (1, 1, 3, 2) and cross[0, 0].tolist() == [[1, 0], [1, 0], [0, 0]]


# --- layers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("student, teacher, expected", [
    (4, 4, [0, 1, 2, 3]), (3, 5, [0, 2, 4]), (5, 13, [0, 3, 6, 9, 12]), (1, 7, [6]),
    (4, 2, [0, 0, 1, 1]), (7, 13, [0, 2, 4, 6, 8, 10, 12]), (3, 6, [0, 3, 5]),
])
def test_layer_map(student, teacher, expected):
    assert layer_map(student, teacher) == list(enumerate(expected))


def states(layers, width, seed):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, width, generator=random) for _ in range(layers)]


def test_hidden_mse():
    s, t = states(3, 4, 1), states(5, 4, 2)
    mse = [functional.mse_loss(s[i], t[j]) for i, j in ((0, 0), (1, 2), (2, 4))]
    close(hidden_mse(s, t).mean(), sum(mse))
    close(hidden_mse(s, t, over="mean").mean(), sum(mse) / 3)
    assert int(hidden_mse(s, t).count) == 6
    close(hidden_mse(s, t, pairs=[[2, 1]]).mean(), functional.mse_loss(s[2], t[1]))


def test_hidden_mse_with_a_projection():
    s, t = states(2, 4, 1), states(2, 6, 2)
    projection = nn.Linear(4, 6, bias=False)
    total = hidden_mse(s, t, projection=projection)
    close(total.mean(), sum(functional.mse_loss(projection(a), b) for a, b in zip(s, t)))
    total.sum.backward()
    assert projection.weight.grad.any()


def test_padding_does_not_reach_a_projection():
    projection = nn.Linear(8, 8)
    s = padded(8, extra=2, fill=math.nan, seed=1)
    hidden_mse([s], [s], mask_of(2), projection=projection).sum.backward()
    assert torch.isfinite(projection.weight.grad).all() and projection.weight.grad.any()


def test_attention_mse_is_torchs():
    s, t = attention(0, 0.0, 1).softmax(-1), attention(0, 0.0, 2).softmax(-1)
    close(attention_mse([s], [t]).mean(), functional.mse_loss(s, t))


def test_low_rank_mimicking_averages_blocks():
    s, t = states(2, 6, 1), states(2, 6, 2)
    along = [principal_directions([x], 2) for x in t]
    expected = [((a - b) @ p).square().mean() for a, b, p in zip(s, t, along)]
    close(low_rank_mimicking(s, t, along).mean(), sum(expected) / 2)


def test_principal_directions_of_several_batches():
    random = torch.Generator().manual_seed(0)
    whole = torch.randn(60, 5, generator=random) @ torch.diag(torch.tensor([9., 4, 2, 1, .5])) + 3
    along = principal_directions([whole[:10].view(2, 5, 5), whole[10:]], 2)
    assert torch.equal(along, principal_directions([whole[:10], whole[10:]], 2))
    _, _, expected = torch.linalg.svd(whole - whole.mean(0))
    close((along * expected[:2].T).sum(0).abs(), [1, 1], 1e-5)
    close(along.T @ along, torch.eye(2), 1e-6)
    assert (along.gather(0, along.abs().argmax(0, keepdim=True)) > 0).all()


# --- relations -----------------------------------------------------------------------------------

def test_relations_between_unlike_models():
    s, t = states(1, 12, 1)[0], states(1, 8, 2)[0]
    total = relations(s, t, heads=4)
    expected = []
    for batch in range(2):
        for head in range(4):
            a, b = s[batch, :, head * 3:head * 3 + 3], t[batch, :, head * 2:head * 2 + 2]
            q, p = (a @ a.T / 3 ** .5).softmax(-1), (b @ b.T / 2 ** .5).softmax(-1)
            expected.append((p * (p / q).log()).sum(-1))
    close(total.mean(), torch.cat(expected).mean())
    assert int(total.count) == 2 * 3 * 4


@pytest.mark.parametrize("norm", ["mse", "l2"])
def test_direction_matching(norm):
    s, t = heads(states(1, 8, 1)[0]), heads(states(1, 6, 2)[0])
    expected = []
    for own, other in zip(s.flatten(0, 1), t.flatten(0, 1)):
        p, q = own @ own.T, other @ other.T
        difference = p / p.norm() - q / q.norm()
        expected.append(difference.square().mean() if norm == "mse" else difference.norm())
    total = direction_matching(s, t, norm=norm)
    close(total.mean(), torch.stack(expected).mean())
    assert int(total.count) == 4
    close(direction_matching(3 * s, t, norm=norm).sum, total.sum)  # only directions count


# --- refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, words", [
    (lambda: kl(torch.zeros(2, 3), torch.zeros(2, 4)), r"are \[2, 3\] and \[2, 4\]"),
    (lambda: kl(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(3)), r"a mask of shape \[3\]"),
    (lambda: soft_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 3), over="all"), "over is 'all'"),
    (lambda: hidden_mse(states(1, 4, 0), states(1, 5, 0)), "whose widths may differ"),
    (lambda: hidden_mse(states(1, 4, 0), states(1, 4, 0), pairs=[(0, 1)]), "layers 0 and 1 are"),
    (lambda: hidden_mse(states(1, 4, 0), states(1, 4, 0), pairs=[]), "no layers to compare"),
    (lambda: hidden_mse(states(1, 4, 0), states(1, 4, 0), over="max"), "over is 'max'"),
    (lambda: hidden_mse([], states(1, 4, 0)), "0 student and 1 teacher layers"),
    (lambda: attention_mse([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 4, 3, 3)]), "use relations"),
    (lambda: relations(torch.zeros(1, 2, 6), torch.zeros(1, 3, 6)), "the same tokens"),
    (lambda: relations(torch.zeros(1, 2, 6), torch.zeros(1, 2, 6), heads=4), "no 4 relation heads"),
    (lambda: direction_matching(torch.zeros(1, 2, 3, 4), torch.zeros(1, 4, 3, 4)), "use relations"),
    (lambda: direction_matching(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), norm="l1"),
     "norm is 'l1'"),
    (lambda: low_rank_mimicking(states(1, 4, 0), states(1, 4, 0), []), "0 sets of directions"),
    (lambda: principal_directions([torch.zeros(0, 4)], 1), "of no rows"),
    (lambda: principal_directions([torch.zeros(3, 4)], 5), "5 principal directions of 4"),
])
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
