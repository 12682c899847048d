"""Where attention and the MLP end in each architecture: the modules that get a bottleneck adapter.

Read off transformers 5.23 by building every model type listed here on the `meta` device; a test
builds them again and finds each name once in every layer.
"""

from __future__ import annotations

from planner.targets import module_matches

__all__ = ["OUTPUTS", "takes_adapter"]

# (attention, MLP, model types). The module's output is what the residual connection adds (before a
# dropout or a norm of its own). In a mixture of experts it is the whole block, dense layers included.
_ROWS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        ("self_attn.o_proj",),
        ("mlp.down_proj",),
        "llama mistral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text gemma4_text phi3 olmo olmo2 olmo3 "
        "smollm3 granite stablelm cohere cohere2 glm glm4 helium nemotron arcee apertus ernie4_5 exaone4 "
        "seed_oss bitnet vaultgemma diffllama nomic_bert",
    ),
    (
        ("self_attn.o_proj",),
        ("mlp",),
        "mixtral qwen2_moe qwen3_moe olmoe phimoe gpt_oss deepseek_v2 deepseek_v3 glm4_moe ernie4_5_moe "
        "minimax_m2",
    ),
    (("self_attn.o_proj",), ("block_sparse_moe",), "granitemoe"),
    (("self_attn.o_proj",), ("feed_forward",), "llama4_text"),
    (("self_attn.o_proj",), ("mlp.c_proj",), "starcoder2"),
    (("self_attn.o_proj",), ("mlp.fc2",), "nanochat"),
    (("self_attn.o_proj", "linear_attn.out_proj"), ("mlp",), "qwen3_next"),
    (("self_attn.o_proj", "linear_attn.out_proj"), ("mlp.down_proj",), "qwen3_5_text"),
    (("self_attn.o_proj", "self_attn.out_proj"), ("mlp",), "minimax"),
    (("self_attn.dense",), ("mlp.fc2",), "phi"),
    (("self_attn.dense",), ("mlp.dense_4h_to_h",), "persimmon"),
    (("attention.dense",), ("mlp.dense_4h_to_h",), "gpt_neox"),
    (("self_attention.dense",), ("mlp.dense_4h_to_h",), "bloom falcon"),
    (("attn.c_proj",), ("mlp.c_proj",), "gpt2 gpt_bigcode openai-gpt"),
    (("attn.out_proj",), ("mlp.fc_out",), "gptj codegen"),
    (("attn.attention.out_proj",), ("mlp.c_proj",), "gpt_neo"),
    (("attn.out_proj",), ("ffn.down_proj",), "mpt"),
    (("self_attn.out_proj",), ("fc2",), "opt xglm biogpt bart mbart pegasus marian blenderbot m2m_100"),
    (
        ("attention.output.dense",),
        ("output.dense",),
        "bert roberta xlm-roberta camembert electra deberta deberta-v2 ernie megatron-bert "
        "roberta-prelayernorm",
    ),
    (("attention.attn.o",), ("output.dense",), "mpnet"),
    (("attention.out_lin",), ("ffn.lin2",), "distilbert"),
    (("attention.dense",), ("ffn_output",), "albert"),
    (("attn.Wo",), ("mlp.Wo",), "modernbert"),
    # Self-attention only: Houlsby's two adapters a layer, none after cross-attention.
    (("SelfAttention.o",), ("DenseReluDense.wo",), "t5 mt5 umt5"),
    (("SelfAttention.o",), ("mlp",), "switch_transformers"),
)

OUTPUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    model_type: (attention, mlp) for attention, mlp, types in _ROWS for model_type in types.split()
}
"""`{model_type: (names after which attention ends, names after which the MLP ends)}`, dotted suffixes."""


def takes_adapter(
    name: str, kind: str, attention_outputs: tuple[str, ...], mlp_outputs: tuple[str, ...]
) -> bool:
    """Whether the module of this dotted name gets an adapter of `kind` (`houlsby` or `pfeiffer`).

    Houlsby et al. 2019, figure 2: after attention and after the MLP. Pfeiffer et al. 2020: after the
    MLP only. An attention name is never an MLP's: BERT's `attention.output.dense` ends with `output.dense`.
    """
    if any(module_matches(name, suffix) for suffix in attention_outputs):
        return kind == "houlsby"
    return any(module_matches(name, suffix) for suffix in mlp_outputs)
