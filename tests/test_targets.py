"""Which weights are found in a model, and the reasons for those that stay dense."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from bitlm.modules import is_conv1d
from bitlm.targets import Target, find
from tests import zoo

LLAMA4 = dict(vocab_size=99, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48,
              num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
              num_local_experts=4, num_experts_per_tok=1, pad_token_id=0)


def meta(name, **changes):
    with torch.device("meta"):
        animal = zoo.ZOO[name]
        config = getattr(transformers, animal.config)(**animal.values | changes)
        return getattr(transformers, animal.model)(config)


def reasons(model, *args, **kwargs):
    return {s.name: s.reason for s in find(model, *args, **kwargs)[1]}


def names(targets):
    return [target.name for target in targets]


def test_a_llama_by_hand():
    targets, skipped = find(meta("llama"))
    layer = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names(targets) == [f"model.layers.{i}.{leaf}.weight" for i in (0, 1) for leaf in layer]
    assert {t.role for t in targets} == {"linear"}
    assert targets[6] == Target("model.layers.0.mlp.down_proj.weight", 32, 48, "linear",
                                torch.float32)
    assert targets[1].numel == 16 * 32
    assert {s.name: s.reason for s in skipped} == {
        "model.embed_tokens.weight": "token embedding (--embeddings packs it)",
        "lm_head.weight": "output head (--embeddings packs it)"}
    assert [s.numel for s in skipped] == [99 * 32] * 2 and not any(s.loud for s in skipped)


def test_embeddings_and_head():
    targets, skipped = find(meta("llama"), embeddings=True)
    assert {t.name: t.role for t in targets if t.role != "linear"} == {
        "model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}
    assert skipped == [] and not any(t.tied for t in targets)


def test_tied_names_say_what_they_are_tied_to():
    for name, source in (("llama_tied", "model.embed_tokens.weight"), ("t5_relu", "shared.weight"),
                         ("bart", "model.shared.weight")):
        targets, _ = find(meta(name), embeddings=True)
        tied = {t.name: t.tied for t in targets if t.tied}
        assert "lm_head.weight" in tied and set(tied.values()) == {source}, name
        assert source in names(targets)


def test_what_is_tied_to_a_dense_weight_stays_dense():
    targets, _ = find(meta("llama_tied"), ("embed_tokens",), embeddings=True)
    assert {t.role for t in targets} == {"linear"}
    assert reasons(meta("llama_tied"), ("embed_tokens",), embeddings=True) == {
        "model.embed_tokens.weight": "skipped by 'embed_tokens'",
        "lm_head.weight": "tied to model.embed_tokens.weight, which stays dense"}


def test_conv1d_is_turned():
    targets, _ = find(meta("gpt2"))
    first = next(t for t in targets if t.name.endswith("0.attn.c_attn.weight"))
    assert (first.rows, first.columns) == (96, 32) and first.transposed
    assert is_conv1d(meta("gpt2").transformer.h[0].attn.c_attn)
    assert not is_conv1d(nn.Conv1d(1, 1, 1))


def test_heads_of_a_task_stay_dense():
    found = reasons(meta("bert"))
    assert found["classifier.weight"] == "task head"
    assert found["bert.embeddings.position_embeddings.weight"] == "position or type embedding"
    assert "bert.pooler.dense.weight" in names(find(meta("bert"))[0])


@pytest.mark.parametrize("name, leaf, rows, columns, parts", [
    ("mixtral", "gate_up_proj", 96, 32, 2), ("mixtral", "down_proj", 32, 48, 1),
    ("gpt_oss", "gate_up_proj", 96, 32, 1), ("gpt_oss", "down_proj", 32, 48, 1)])
def test_fused_experts(name, leaf, rows, columns, parts):
    targets, _ = find(meta(name))
    target = next(t for t in targets if t.name.endswith(leaf))
    assert (target.rows, target.columns, target.experts, target.parts) == (rows, columns, 4, parts)
    assert target.role == "experts" and target.numel == rows * columns * 4
    assert target.transposed == (name == "gpt_oss")


def test_routers_stay_dense():
    found = reasons(meta("mixtral"))
    assert "not a linear layer" in found["model.layers.0.mlp.gate.weight"]


def test_a_linear_that_computes_more_is_left_alone():
    """Llama 4's router is an nn.Linear that returns scores and logits."""
    with torch.device("meta"):
        model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**LLAMA4))
    targets, skipped = find(model)
    routers = [s for s in skipped if s.name.endswith("router.weight")]
    assert routers and all(s.reason == "Llama4Router: not a linear layer" for s in routers)
    assert any(t.name.endswith("q_proj.weight") for t in targets)
    assert any(t.name.endswith("dense.weight") for t in find(meta("falcon"))[0])  # FalconLinear


def test_experts_outside_of_the_interface_are_loud():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.empty(4, 8, 16))

    model = nn.ModuleDict({"up": nn.Linear(8, 8), "mlp": Experts()})
    targets, skipped = find(model)
    assert names(targets) == ["up.weight"]
    assert [(s.name, s.loud) for s in skipped] == [("mlp.gate_up_proj", True)]
    assert "do not go through transformers' experts interface" in skipped[0].reason


def test_tables_that_do_more_than_look_up_stay_dense():
    class Normed(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) / 2

    class Body(nn.Module):
        all_tied_weights_keys: dict = {}

        def __init__(self, table):
            super().__init__()
            self.table = table

        def get_input_embeddings(self):
            return self.table

    assert reasons(Body(Normed(9, 4)), embeddings=True) == {
        "table.weight": "Normed does more than look up rows"}
    assert names(find(Body(nn.Embedding(9, 4)), embeddings=True)[0]) == ["table.weight"]


def test_other_dtypes_and_shapes_have_reasons():
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "conv": nn.Conv2d(1, 2, 3)})
    model["codes"] = nn.Module()
    model["codes"].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert reasons(model) == {"conv.weight": "Conv2d: not a linear layer",
                              "codes.weight": "stored as int8"}


def test_skip_patterns():
    model = meta("llama")
    targets, skipped = find(model, (r"layers\.0\.", "k_proj"))
    assert len(targets) == 6
    assert not any("layers.0" in t.name or "k_proj" in t.name for t in targets)
    found = {s.name: s.reason for s in skipped}
    assert found["model.layers.0.mlp.up_proj.weight"] == r"skipped by 'layers\\.0\\.'"
    assert found["model.layers.0.self_attn.k_proj.weight"] == r"skipped by 'layers\\.0\\.'"
    assert found["model.layers.1.self_attn.k_proj.weight"] == "skipped by 'k_proj'"
    with pytest.raises(ValueError, match="skip pattern 'q_porj' matches no weight"):
        find(model, ("k_proj", "q_porj"))
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        find(model, ("(",))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_matrix_is_a_target_or_has_a_reason(name):
    model = meta(name)
    assert isinstance(model, PreTrainedModel)
    for embeddings in (False, True):
        targets, skipped = find(model, embeddings=embeddings)
        found = [t.name for t in targets] + [s.name for s in skipped]
        matrices = {n for n, p in model.named_parameters() if p.ndim > 1}
        assert len(found) == len(set(found)) and matrices <= set(found)
        assert all(s.reason for s in skipped) and not any(s.loud for s in skipped)
        assert {t.tied for t in targets} <= {"", *names(targets)}
