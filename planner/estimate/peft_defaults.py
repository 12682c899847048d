"""Which modules peft takes where an adapter_config.json names none; a test holds every entry against peft.

Source: peft 0.21, utils/constants.py, TRANSFORMERS_MODELS_TO_*_MODULES_MAPPING, by model_type.
"""

from __future__ import annotations

__all__ = ["FEEDFORWARD", "IA3", "LN_TUNING", "LORA"]

_QV = ("q_proj", "v_proj")
_LLAMA_IA3 = ("k_proj", "v_proj", "down_proj")
_QWEN_IA3 = ("q_proj", "v_proj", "down_proj")
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_GEMMA_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"),
)

LORA: dict[str, tuple[str, ...]] = {
    "bert": ("query", "value"),
    "bloom": ("query_key_value",),
    "falcon": ("query_key_value",),
    "gemma": _QV,
    "gemma2": _QV,
    "gemma3_text": _QV,
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "llama": _QV,
    "mistral": _QV,
    "mixtral": _QV,
    "opt": _QV,
    "phi": (*_QV, "fc1", "fc2"),
    "qwen2": _QV,
    "qwen3": _QV,
    "roberta": ("query", "value"),
    "stablelm": _QV,
    "t5": ("q", "v"),
}
IA3: dict[str, tuple[str, ...]] = {
    "bert": ("key", "value", "output.dense"),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"),
    "falcon": ("query_key_value", "dense_4h_to_h"),
    "gemma": _QWEN_IA3,
    "gemma2": _QWEN_IA3,
    "gemma3_text": _QWEN_IA3,
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "llama": _LLAMA_IA3,
    "mistral": _LLAMA_IA3,
    "mixtral": ("k_proj", "v_proj", "w2"),
    "opt": ("q_proj", "k_proj", "fc2"),
    "phi": ("q_proj", "v_proj", "fc2"),
    "qwen2": _QWEN_IA3,
    "qwen3": _QWEN_IA3,
    "roberta": ("key", "value", "output.dense"),
    "t5": ("k", "v", "wo"),
}
FEEDFORWARD: dict[str, tuple[str, ...]] = {
    "bert": ("output.dense",),
    "bloom": ("mlp.dense_4h_to_h",),
    "falcon": ("dense_4h_to_h",),
    "gemma": ("down_proj",),
    "gemma2": ("down_proj",),
    "gemma3_text": ("down_proj",),
    "gpt2": ("mlp.c_proj",),
    "gpt_neox": ("dense_4h_to_h",),
    "llama": ("down_proj",),
    "mistral": ("down_proj",),
    "mixtral": ("w2",),
    "opt": ("fc2",),
    "phi": ("fc2",),
    "qwen2": ("down_proj",),
    "qwen3": ("down_proj",),
    "roberta": ("output.dense",),
    "t5": ("wo",),
}
LN_TUNING: dict[str, tuple[str, ...]] = {
    "bloom": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "falcon": ("input_layernorm", "post_attention_layernorm", "ln_f"),
    "gemma": _LLAMA_NORMS,
    "gemma2": _GEMMA_NORMS,
    "gemma3_text": _GEMMA_NORMS,
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "llama": _LLAMA_NORMS,
    "mistral": _LLAMA_NORMS,
    "phi": ("input_layernorm", "final_layernorm"),
    "qwen2": ("post_attention_layernorm",),
    "qwen3": ("post_attention_layernorm",),
    "t5": ("layer_norm", "final_layer_norm"),
}
