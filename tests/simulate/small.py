"""Small models of transformers as setups: quick to trace, with every mechanism of the large ones."""

from __future__ import annotations

import json
from typing import Any

from planner.catalog.resolve import resolve
from planner.model import Model
from planner.spec import Setup, Training

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 256,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "vocab_size": 1000,
}


def model_of(config: dict[str, Any], **changes: Any) -> Model:
    """The model of a config.json, with some values exchanged."""
    changed = {**config, **changes}
    return resolve(f"small-{config['model_type']}", config_text=json.dumps(changed))


def setup_of(config: dict[str, Any], method: Any = None, changes: Any = None, **training: Any) -> Setup:
    """A setup over a small model: 2 sequences of 128 tokens, bf16, unless said otherwise."""
    values: dict[str, Any] = {"micro_batch_size": 2, "seq_len": 128, **training}
    return Setup(model=model_of(config, **(changes or {})), method=method, training=Training(**values))
