"""A Llama of 1.1 billion random 1-bit weights, made packed, and the engines that decode with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from bitlm import hf
from bitlm.activations import set_activation
from bitlm.modules import install
from bitlm.plan import make_plan
from bitlm.weight import PackedWeight

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
         "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
         "max_position_embeddings": 2048, "tie_word_embeddings": False}
PROMPT, PEER_TOKENS = 16, 16


def make_model(shape: dict = SHAPE, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return the model with linear layers, head and embeddings at 1 bit, groups of 128."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    config = hf.BitlmConfig("binary", embeddings="binary")
    for entry in make_plan(model, config.request).entries:
        tensors = {name: _random(dtype, shape) for name, (dtype, shape) in entry.tensors().items()}
        install(model, entry.name, PackedWeight(tensors, entry.form, dtype))
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(shape["hidden_size"], dtype=dtype),
                                         requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    hf.attach(model, config)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.do_sample = None, 0, False
    return model


def _random(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(256, shape, dtype=torch.uint8)
    return torch.full(shape, 0.02, dtype=dtype)


class Clock(BaseStreamer):
    """Notes when the first and the last token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...

    @property
    def microseconds(self) -> float:
        """Time of a token after the first one, which comes with the prompt."""
        _, first, *_, last = self.times
        return (last - first) / (len(self.times) - 2) * 1e6


class Generate:
    """An engine: transformers' generate(), greedy; a turn is `tokens` tokens, in us a token.

    Compiled, attention is transformers' "eager" one: inductor makes better code of it for one
    token than torch's own kernel is.
    """

    batch = 1

    def __init__(self, model: LlamaForCausalLM, activation: str, compiled: bool, tokens: int
                 ) -> None:
        self.name = f"bitlm {activation}, {'static cache, compiled' if compiled else 'eager'}"
        self._model, self._activation, self._tokens = model, activation, tokens
        self._forward = torch.compile(model.forward, fullgraph=True) if compiled else None
        self._ids = torch.randint(SHAPE["vocab_size"], (1, PROMPT))

    def turn(self, seconds: float = 0) -> float:
        set_activation(self._model, self._activation)
        clock = Clock()
        more = {}
        if self._forward is not None:
            self._model.set_attn_implementation("eager")
            self._model.forward = self._forward
            more["cache_implementation"] = "static"
        try:
            with torch.inference_mode():
                self._model.generate(self._ids, max_new_tokens=self._tokens, streamer=clock, **more)
        finally:
            self._model.set_attn_implementation("sdpa")
            self._model.__dict__.pop("forward", None)
        return clock.microseconds


class LlamaBench:
    """An engine: llama.cpp's own benchmark of decoding, on a file of make_models."""

    batch = 1

    def __init__(self, programs: Path, file: Path, threads: int) -> None:
        self.name = f"llama.cpp {file.stem}"
        self._command = [programs / "llama-bench", "-m", file, "-t", str(threads), "-n",
                         str(PEER_TOKENS), "-p", "0", "-r", "1", "-o", "json"]

    def turn(self, seconds: float = 0) -> float:
        done = subprocess.run(self._command, capture_output=True, text=True, env=dict(os.environ))
        if done.returncode:
            sys.exit(f"llama-bench failed:\n{done.stderr[-2000:]}")
        return 1e6 / json.loads(done.stdout)[0]["avg_ts"]
