"""What one stage of a chain hands on to the next."""

from __future__ import annotations

import torch
from torch import nn

from bitlm import Scheme, Training
from bitlm.quantizers import initialise
from bitlm.train import prepare
from bitlm.train.stages import _set_dropout, carry_quantizers
from tests.train.test_distill import bart, bert, collate, rows

ROWS = Scheme(group_size="row")


def student(scheme: Scheme = ROWS, bits: int = 1, seed: int = 0, **options):
    model = prepare(bert(0), scheme, placement=("bipft", bits), **options)
    initialise(model, **collate(rows("bert")))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".quantizer" in name or ".input." in name or ".estimators." in name:
                parameter.add_(torch.rand_like(parameter))
    return model


def changed(source, target) -> dict[str, torch.Tensor]:
    """Return the tensors that differ after carrying, by name, and check where they come from."""
    before = {name: value.clone() for name, value in target.state_dict().items()}
    carry_quantizers(source, target)
    own, theirs = target.state_dict(), source.state_dict()
    found = {name for name, value in own.items() if not torch.equal(value, before[name])}
    assert all(torch.equal(own[name], theirs[name]) for name in found)
    return found


def test_equal_quantizers_are_carried_whole():
    found = changed(student(seed=1), student(seed=2))
    assert {name.rpartition(".")[2] for name in found} >= {"step", "move", "bias", "weight"}
    assert all(".input." in name or ".quantizers." in name or ".estimators." in name
               for name in found)


def test_steps_of_other_bits_are_not_carried_but_moves_are():
    found = changed(student(bits=2, seed=1), student(bits=1, seed=2))
    assert any(name.endswith(".move") for name in found)
    assert any(".estimators." in name for name in found)
    assert not any(name.endswith(".step") for name in found)


def test_the_first_of_two_bases_goes_on_alone():
    learned = Training(learned=True)
    two = student(Scheme(group_size="row", planes=2), training=learned, seed=1)
    one = student(training=learned, seed=2)
    found = changed(two, one)
    assert any(name.endswith("query.quantizer.scales") for name in found)
    ternary = student(Scheme(method="ternary", group_size="row"), training=learned, seed=3)
    assert not any(name.endswith(".scales") for name in changed(two, ternary))


def test_dropout_is_set_everywhere_or_left():
    for model in (bert(hidden_dropout_prob=0.3), bart()):
        _set_dropout(model, -1.0)
        before = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
        assert not before or max(before) == 0.3
        _set_dropout(model, 0.2)
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} <= {0.2}
    assert model.model.encoder.layers[0].dropout == 0.2
