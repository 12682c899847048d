"""Tiny models of many families, built from transformers' own classes: two layers, a vocabulary of 48."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

VOCAB_SIZE = 48
_TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "head_dim": 4,
}
_EXPERTS = {"moe_intermediate_size": 12, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "embedding_size": 16,
}
_BLOOM = {"hidden_size": 16, "n_layer": 2, "num_hidden_layers": 2, "num_attention_heads": 4, "n_head": 4}

# model type: (config, names a user would give to LoRA)
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "llama": (_LLAMA, ("q_proj", "v_proj")),
    "mistral": (_LLAMA, ("q_proj", "down_proj")),
    "mixtral": (_LLAMA | _EXPERTS, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "qwen2": (_LLAMA, ("q_proj", "layers.1.self_attn.v_proj")),
    "qwen3": (_LLAMA, ("q_proj", "lm_head")),
    "qwen3_moe": (_LLAMA | _EXPERTS, ("q_proj", "v_proj")),
    "gpt_oss": (_LLAMA | _EXPERTS, ("q_proj", "v_proj")),
    "gemma": (_LLAMA, ("q_proj", "embed_tokens")),
    "gemma2": (_LLAMA, ("q_proj", "v_proj")),
    "gemma3_text": (_LLAMA, ("q_proj", "embed_tokens")),
    "phi": (_LLAMA | {"num_key_value_heads": 4}, ("q_proj", "v_proj", "fc1", "fc2")),
    "phi3": (_LLAMA, ("qkv_proj", "gate_up_proj")),
    "smollm3": (_LLAMA, ("q_proj",)),
    "olmo2": (_LLAMA, ("q_proj", "v_proj")),
    "gpt2": (
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        | {"attn_pdrop": 0.0},
        ("c_attn", "wte"),
    ),
    "gpt_neox": (_BERT | {"hidden_dropout": 0.0, "attention_dropout": 0.0}, ("query_key_value",)),
    "opt": (
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "dropout": 0.0}
        | {"word_embed_proj_dim": 16, "max_position_embeddings": 64},
        ("q_proj", "v_proj"),
    ),
    "bloom": (_BLOOM, ("query_key_value",)),
    "falcon": (_BLOOM, ("query_key_value", "dense")),
    "bert": (_BERT, ("query", "value")),
    "roberta": (_BERT, ("query", "value")),
    "t5": (
        {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        | {"decoder_start_token_id": 0},
        ("q", "v"),
    ),
}
WITHOUT_BIAS = ("llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text")
MASKED = ("bert", "roberta")


def tiny_model(model_type: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A small random model of the family on the CPU, in eval mode, the same for the same seed."""
    torch.manual_seed(seed)
    values = _TOKENS | FAMILIES[model_type][0] | changes
    config = CONFIG_MAPPING[model_type](**values)
    if model_type == "t5":
        return AutoModelForSeq2SeqLM.from_config(config).eval()
    auto = AutoModelForMaskedLM if model_type in MASKED else AutoModelForCausalLM
    return auto.from_config(config).eval()


def batch(model: nn.Module, *, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two sequences of eight tokens with their labels; one token is the padding token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 8), generator=generator)
    tokens[0, 2] = 0
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def logits(model: nn.Module) -> torch.Tensor:
    """The model's answer to `batch`, without gradients."""
    with torch.no_grad():
        answer: torch.Tensor = model(**batch(model)).logits
    return answer
