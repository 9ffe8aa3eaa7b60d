"""Decoding with a random Llama of 8 billion parameters: packed at 1 bit, and dense in bf16."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from harness.gpu import Graph
from harness.llama import make_model

SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
         "max_position_embeddings": 8192, "tie_word_embeddings": False}
CACHE = 1024


def decode(tokens: int, rounds: int, shape: dict = SHAPE) -> dict:
    """Return the microseconds of a token of both models, each step one CUDA graph."""
    group = {"name": "Llama 8B, one token", "engines": []}
    for name, make in (("bitlm", packed), ("dense bf16", dense)):
        step = Step(make(shape), "cuda")
        graph = Graph([step])
        times = []
        for _ in range(rounds):
            step.restart()
            times.append(sum(graph.microseconds() for _ in range(tokens)) / tokens)
        group["engines"].append({"engine": name, "batch": 1, "us": [round(us, 1) for us in times]})
        del step, graph
        gc.collect()
        torch.cuda.empty_cache()
    return group


class Step:
    """A call that decodes one token after the one before; all that changes is on the device."""

    def __init__(self, model: LlamaForCausalLM, device: str) -> None:
        self.model = model.to(device)
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        self.token = torch.ones(1, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)

    @torch.inference_mode()
    def restart(self) -> None:
        """Go back to the start: the cache counts its tokens on the device as well."""
        self.position.zero_()
        for layer in self.cache.layers:
            layer.cumulative_length.zero_()

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True,
                            position_ids=self.position.unsqueeze(0),
                            cache_position=self.position).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        self.position.add_(1)
        return self.token


def packed(shape: dict) -> LlamaForCausalLM:
    return make_model(shape, torch.bfloat16)


def dense(shape: dict) -> LlamaForCausalLM:
    """Return a model of small random weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).eval().to(torch.bfloat16)
    model = model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model
