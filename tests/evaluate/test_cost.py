"""What a forward costs: counted products against those that the shapes say."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from bitlm.evaluate.cost import FLOAT, Cost, count
from bitlm.quantize import pack
from bitlm.quantizers import initialise
from bitlm.scheme import Scheme, grid
from bitlm.train import finish, prepare

ROWS, LENGTH, HIDDEN, INNER, LAYERS = 3, 7, 32, 64, 2
TOKENS = ROWS * LENGTH
LINEAR = LAYERS * TOKENS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
ATTENTION = LAYERS * ROWS * 2 * LENGTH * LENGTH * HIDDEN
HEAD = ROWS * (HIDDEN * HIDDEN + HIDDEN * 2)  # pooler and classifier
INPUTS = {"input_ids": torch.arange(TOKENS).view(ROWS, LENGTH) % 50}


def model(**changes):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=50, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_labels=2, **changes))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_dense_model(attention):
    found = count(model(attn_implementation=attention), INPUTS)
    assert found.products == {(FLOAT, FLOAT): LINEAR + ATTENTION + HEAD}
    assert found.ops == found.flops == found.total and found.bops == 0
    with torch.inference_mode():
        assert count(model(attn_implementation=attention), INPUTS) == found


@pytest.mark.parametrize("scheme, bits, planes", [
    (Scheme(), (1, 16), 1), (Scheme(activation="int8"), (1, 8), 1),
    (Scheme("ternary"), (2, 16), 1), (Scheme("ternary", trits=True), (2, 16), 1),
    (Scheme(planes=2), (1, 16), 2), (grid(3), (1, 16), 3)])
def test_packed_layers(scheme, bits, planes):
    found = count(pack(model(), scheme, skip=("pooler",)), INPUTS)
    assert found.products == {bits: LINEAR * planes, (FLOAT, FLOAT): ATTENTION + HEAD}
    assert found.bops == LINEAR * planes * bits[0] * bits[1]
    assert found.ops == ATTENTION + HEAD + found.bops / 64


def test_salient_weights_count_as_what_they_are():
    packed = pack(model(), Scheme("salient", salient=0.25), skip=("pooler",))
    found = count(packed, INPUTS)
    assert found.products[1, 16] == LINEAR
    assert found.products[8, 16] == pytest.approx(LINEAR / 4, rel=0.1)


@pytest.mark.parametrize("bits", [1, 8])
def test_rounded_inputs_and_attention(bits):
    trained = prepare(model(), Scheme(group_size="row"), placement=("bipft", bits),
                      skip=("pooler",))
    initialise(trained, **INPUTS)
    found = count(finish(trained), INPUTS).products
    estimators = LAYERS * (TOKENS * 5 * HIDDEN + 2 * ROWS * LENGTH * LENGTH + TOKENS * HIDDEN // 4)
    attention = {(bits, bits): ATTENTION} if bits > 1 else {}
    assert found == {(1, bits): LINEAR + (ATTENTION if bits == 1 else 0), **attention,
                     (FLOAT, FLOAT): HEAD + estimators}


def test_a_product_is_never_more_than_a_flop():
    cost = Cost({(8, 16): 640, (8, 8): 64, (1, 1): 640, (FLOAT, FLOAT): 5})
    assert (cost.flops, cost.bops, cost.ops) == (5, 704 * 64 + 640, 719.0)
    assert cost.to_dict()["products"] == {"1x1": 640, "8x8": 64, "8x16": 640, "32x32": 5}
