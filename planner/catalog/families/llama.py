"""Dense decoders built like LLaMA (arXiv:2302.13971): what each family does differently.

Modules, defaults and names: transformers 5.23, models/<family>/configuration_*.py and modeling_*.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.catalog.families.decoder import (
    FamilyModel,
    Layout,
    all_but_every,
    architecture,
    decoder,
    with_sliding,
)
from planner.catalog.families.fields import Fields
from planner.model import Architecture

__all__ = ["FAMILIES"]

_LAYERNORM = ("weight", "bias")
_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def llama(fields: Fields) -> FamilyModel:
    """LLaMA 1 to 3, and every checkpoint published in its form (Yi, Vicuna, TinyLlama, SmolLM2)."""
    return _llama_like(fields, "LlamaDecoderLayer", hidden_is_a_multiple=True)


def granite(fields: Fields) -> FamilyModel:
    """IBM Granite 3: LLaMA with four scalar multipliers, which are no parameters."""
    shaped = _llama_like(fields, "GraniteDecoderLayer")
    return replace(shaped, architecture=replace(shaped.architecture, embedding_scale=True))


def smollm3(fields: Fields) -> FamilyModel:
    """SmolLM3: LLaMA without rotary positions in every fourth layer; those take the window, if any."""
    bias = fields.flag("attention_bias")
    shape = architecture(fields, layer_class="SmolLM3DecoderLayer", tied=True, key_value_heads=4)
    shape = replace(shape, attention_bias=bias, mlp_bias=fields.flag("mlp_bias"))
    if fields.flag("use_sliding_window"):
        rotary = fields.value("no_rope_layers")  # 1: the layer has rotary positions
        every = fields.size("no_rope_layer_interval", default=4)
        if rotary is None:
            rotary = [(layer + 1) % every for layer in range(shape.num_layers)]
        if not isinstance(rotary, list) or len(rotary) < shape.num_layers:
            raise fields.error(f"no_rope_layers must be a list of {shape.num_layers} zeros and ones.")
        layers = [layer for layer in range(shape.num_layers) if not rotary[layer]]
        shape = with_sliding(fields, shape, window=None, layers=layers)
    return decoder(fields, shape, Layout(output_bias=bias), max_positions=32768)


def _llama_like(fields: Fields, layer_class: str, *, hidden_is_a_multiple: bool = False) -> FamilyModel:
    shape = architecture(fields, layer_class=layer_class, hidden_is_a_multiple=hidden_is_a_multiple)
    bias = fields.flag("attention_bias")
    shape = replace(shape, attention_bias=bias, mlp_bias=fields.flag("mlp_bias"))
    return decoder(fields, shape, Layout(output_bias=bias), max_positions=2048)


def mistral(fields: Fields) -> FamilyModel:
    """Mistral 7B (arXiv:2310.06825), Nemo, Small; the window holds for all layers."""
    shape = architecture(fields, layer_class="MistralDecoderLayer", key_value_heads=8)
    shape = with_sliding(fields, shape, window=4096)
    return decoder(fields, shape, Layout(), max_positions=131072)


def qwen2(fields: Fields) -> FamilyModel:
    """Qwen 1.5, 2 and 2.5 (arXiv:2412.15115): biases on q, k and v."""
    shape = architecture(fields, layer_class="Qwen2DecoderLayer", key_value_heads=32)
    shape = _qwen_sliding(fields, replace(shape, attention_bias=True))
    return decoder(fields, shape, Layout(), max_positions=32768)


def qwen3(fields: Fields) -> FamilyModel:
    """Qwen3 (arXiv:2505.09388): q and k normalized by head."""
    shape = architecture(fields, layer_class="Qwen3DecoderLayer", key_value_heads=32, head_dim=128)
    bias = fields.flag("attention_bias")
    shape = _qwen_sliding(fields, replace(shape, attention_bias=bias, qk_norm="head"))
    return decoder(fields, shape, Layout(output_bias=bias), max_positions=32768)


def _qwen_sliding(fields: Fields, shape: Architecture) -> Architecture:
    """Qwen's window: off unless `use_sliding_window`, then from layer `max_window_layers` on."""
    if not fields.flag("use_sliding_window"):
        return shape
    first = fields.size("max_window_layers", default=28, least=0)
    return with_sliding(fields, shape, window=4096, layers=range(first, shape.num_layers))


def gemma(fields: Fields) -> FamilyModel:
    """Gemma (arXiv:2403.08295): scaled embeddings, tied head, GELU; `gelu` in its config means tanh."""
    shape = architecture(
        fields,
        layer_class="GemmaDecoderLayer",
        tied=True,
        key_value_heads=16,
        head_dim=256,
        activation="gelu_pytorch_tanh",
    )
    bias = fields.flag("attention_bias")
    activation = "gelu_pytorch_tanh" if shape.activation == "gelu" else shape.activation
    shape = replace(shape, embedding_scale=True, attention_bias=bias, activation=activation)
    return decoder(fields, shape, Layout(output_bias=bias), max_positions=8192)


def gemma2(fields: Fields) -> FamilyModel:
    """Gemma 2 (arXiv:2408.00118): four norms a layer, soft caps, every other layer with a window."""
    return _sandwich(
        fields, "Gemma2DecoderLayer", every=2, logit_cap=30.0, attention_cap=50.0, max_positions=8192
    )


def gemma3_text(fields: Fields) -> FamilyModel:
    """Gemma 3, the text model (arXiv:2503.19786): q and k norms, one layer in six without a window."""
    every = fields.size("sliding_window_pattern", default=6)
    return _sandwich(fields, "Gemma3DecoderLayer", every=every, qk_norm=True, max_positions=131072)


def _sandwich(
    fields: Fields,
    layer_class: str,
    *,
    every: int,
    max_positions: int,
    qk_norm: bool = False,
    logit_cap: float | None = None,
    attention_cap: float | None = None,
) -> FamilyModel:
    shape = architecture(
        fields,
        layer_class=layer_class,
        tied=True,
        key_value_heads=4,
        head_dim=256,
        activation="gelu_pytorch_tanh",
        activation_key="hidden_activation",
        hidden_is_a_multiple=True,
    )
    bias = fields.flag("attention_bias")
    shape = replace(
        with_sliding(fields, shape, window=4096, layers=all_but_every(every, shape.num_layers)),
        attention_bias=bias,
        embedding_scale=True,
        norm_placement="sandwich",
        qk_norm="head" if qk_norm else "none",
        logit_softcap=fields.positive("final_logit_softcapping", default=logit_cap),
        attention_softcap=fields.positive("attn_logit_softcapping", default=attention_cap),
    )
    layout = Layout(output_bias=bias, block_norms=_SANDWICH)
    return decoder(fields, shape, layout, max_positions=max_positions)


def olmo(fields: Fields) -> FamilyModel:
    """OLMo 1 (arXiv:2402.00838): layer norms without parameters."""
    shape = architecture(fields, layer_class="OlmoDecoderLayer", norm="layernorm")
    bias = fields.flag("attention_bias")
    layout = Layout(output_bias=bias, norm_leaves=())
    return decoder(fields, replace(shape, attention_bias=bias), layout, max_positions=2048)


def olmo2(fields: Fields) -> FamilyModel:
    """OLMo 2 (arXiv:2501.00656): norms after attention and MLP, q and k normalized over all heads."""
    shape = architecture(fields, layer_class="Olmo2DecoderLayer")
    bias = fields.flag("attention_bias")
    shape = replace(shape, attention_bias=bias, qk_norm="full", norm_placement="post")
    layout = Layout(output_bias=bias, block_norms=("post_attention_layernorm", "post_feedforward_layernorm"))
    return decoder(fields, shape, layout, max_positions=2048)


def phi(fields: Fields) -> FamilyModel:
    """Phi 1 to 2 (arXiv:2309.05463): parallel attention and MLP, biases everywhere, partial rotary."""
    shape = architecture(fields, layer_class="PhiDecoderLayer", norm="layernorm", activation="gelu_new")
    shape = replace(
        _partial_rotary(fields, shape, default=0.5),
        attention_bias=True,
        mlp="plain",
        mlp_bias=True,
        parallel_residual=True,
        qk_norm="head" if fields.flag("qk_layernorm") else "none",
        hidden_dropout=fields.share("resid_pdrop"),
        embedding_dropout=fields.share("embd_pdrop"),
        attention_output="self_attn.dense",
        mlp_output="mlp.fc2",
    )
    layout = Layout(
        output_bias=True,
        block_norms=("input_layernorm",),
        norm_leaves=_LAYERNORM,
        qk_norms=("q_layernorm", "k_layernorm"),
        final_norm="final_layernorm",
        mlp_inputs=("fc1",),
        head_bias=True,
    )
    return decoder(fields, shape, layout, max_positions=2048)


def phi3(fields: Fields) -> FamilyModel:
    """Phi-3, 3.5 and 4 (arXiv:2404.14219): one linear layer for q, k and v, one for gate and up."""
    shape = architecture(fields, layer_class="Phi3DecoderLayer")
    shape = replace(
        with_sliding(fields, _partial_rotary(fields, shape, default=1.0), window=None),
        fused_qkv=True,
        fused_gate_up=True,
        hidden_dropout=fields.share("resid_pdrop"),  # embd_pdrop is read by no module
    )
    return decoder(fields, shape, Layout(mlp_inputs=("gate_up_proj",)), max_positions=4096)


def stablelm(fields: Fields) -> FamilyModel:
    """StableLM 2 and 3B (arXiv:2402.17834): layer norms with bias, partial rotary."""
    shape = architecture(
        fields,
        layer_class="StableLmDecoderLayer",
        norm="layernorm",
        key_value_heads=32,
        hidden_is_a_multiple=True,
    )
    shape = replace(shape, head_dim=shape.hidden_size // shape.num_attention_heads)  # head_dim is not read
    if fields.flag("qk_layernorm"):
        raise fields.unknown("has one norm for each head (qk_layernorm)")
    parallel = fields.flag("use_parallel_residual")
    shape = replace(
        _partial_rotary(fields, shape, default=0.25),
        attention_bias=fields.flag("use_qkv_bias"),
        parallel_residual=parallel,
        hidden_dropout=fields.share("hidden_dropout"),
    )
    norms = ("input_layernorm",) if parallel else ("input_layernorm", "post_attention_layernorm")
    return decoder(fields, shape, Layout(block_norms=norms, norm_leaves=_LAYERNORM), max_positions=4096)


def starcoder2(fields: Fields) -> FamilyModel:
    """StarCoder2 (arXiv:2402.19173): layer norms and a plain MLP, biases on all linear layers."""
    shape = architecture(
        fields,
        layer_class="Starcoder2DecoderLayer",
        tied=True,
        key_value_heads=2,
        norm="layernorm",
        activation="gelu_pytorch_tanh",
    )
    bias = fields.flag("use_bias", default=True)
    shape = replace(
        with_sliding(fields, shape, window=None),
        attention_bias=bias,
        mlp="plain",
        mlp_bias=bias,
        hidden_dropout=fields.share("residual_dropout"),
        embedding_dropout=fields.share("embedding_dropout"),
        mlp_output="mlp.c_proj",
    )
    layout = Layout(output_bias=bias, norm_leaves=_LAYERNORM, mlp_inputs=("c_fc",))
    return decoder(fields, shape, layout, max_positions=4096)


def _partial_rotary(fields: Fields, shape: Architecture, *, default: float) -> Architecture:
    share = fields.rotary_share("partial_rotary_factor", default=default)
    return shape if share == 1 else replace(shape, rotary_dim=int(shape.head_dim * share))


FAMILIES: dict[str, Callable[[Fields], FamilyModel]] = {
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3_text,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "olmo": olmo,
    "olmo2": olmo2,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "smollm3": smollm3,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
}
