"""The families' formulas over their options, against transformers' classes, and the configs they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from planner.catalog import UnknownFamily, model_from_config
from planner.catalog.families import TASKS, families
from planner.errors import ModelError
from planner.model import Model
from tests.catalog.on_meta import built, tensors_by_formula, tensors_of

Config = dict[str, Any]

BASE: Config = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2: Config = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 50}
OPT: Config = BASE | {"ffn_dim": 40, "word_embed_proj_dim": 24}
BLOOM: Config = {"hidden_size": 24, "n_layer": 2, "n_head": 4, "vocab_size": 50}
DISTILBERT: Config = {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 40, "vocab_size": 50}
T5: Config = {"d_model": 24, "num_layers": 2, "num_heads": 4, "d_kv": 6, "d_ff": 40, "vocab_size": 50}
EXPERTS: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
SMALL = {"gpt2": GPT2, "opt": OPT, "bloom": BLOOM, "distilbert": DISTILBERT, "t5": T5}

FULL = ["full_attention"]
# What a config.json may say beside the sizes; each row is one model.
OPTIONS: list[tuple[str, Config]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 10, "num_key_value_heads": None}),
    ("mistral", {"head_dim": 8, "sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "num_hidden_layers": 30}),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention", *FULL]}),
    ("mistral", {"layer_types": ["full_attention"] * 3}),
    ("llama", {"use_sliding_window": True, "sliding_window": 8}),
    ("gemma2", {"layer_types": ["sliding_attention"] + 2 * FULL, "final_logit_softcapping": None}),
    ("gemma3_text", {"sliding_window_pattern": 2, "sliding_window": 8}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layer_interval": 2}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [0, 1, 0]}),
    ("phi3", {"sliding_window": 8}),
    ("starcoder2", {"sliding_window": 8}),
    ("mixtral", {"sliding_window": 8, "num_local_experts": 2}),
    ("qwen3_moe", EXPERTS | {"use_sliding_window": True}),
    ("qwen3", {"attention_bias": True, "head_dim": 10}),
    (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 6,
            "mlp_only_layers": [1],
            "head_dim": 6,
        },
    ),
    (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 6,
            "decoder_sparse_step": 2,
            "attention_bias": True,
        },
    ),
    ("mixtral", {"num_local_experts": 3, "head_dim": 10}),
    ("gpt_oss", {"num_local_experts": 4, "head_dim": 10}),
    ("gpt_oss", {"num_local_experts": 4, "attention_bias": False, "tie_word_embeddings": True}),
    ("gemma", {"attention_bias": True, "head_dim": 10}),
    ("gemma2", {"attention_bias": True, "head_dim": 10}),
    ("gemma3_text", {"attention_bias": True, "head_dim": 10, "tie_word_embeddings": False}),
    ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.5}),
    ("phi", {"tie_word_embeddings": True}),
    ("phi3", {"tie_word_embeddings": True}),
    ("olmo", {"attention_bias": True}),
    ("olmo2", {"attention_bias": True}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True}),
    ("stablelm", {"head_dim": 10}),
    ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    ("gpt2", {"n_inner": 30, "tie_word_embeddings": False}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True, "use_parallel_residual": False}),
    ("opt", {"word_embed_proj_dim": 12, "do_layer_norm_before": False}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("opt", {"_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    ("bloom", {"tie_word_embeddings": False}),
    ("falcon", {"bias": True, "alibi": True}),
    ("falcon", {"multi_query": False, "parallel_attn": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 30}),
    ("bert", {"type_vocab_size": 1, "tie_word_embeddings": False}),
    ("roberta", {"pad_token_id": 1, "tie_word_embeddings": False}),
    ("distilbert", {"tie_word_embeddings": False}),
    ("t5", {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 3}),
    ("t5", {"tie_word_embeddings": False, "relative_attention_num_buckets": 8}),
]


def by_formula(config: Config) -> Model:
    return model_from_config(config, id="test", source="a test")


def small(family: str, **options: Any) -> Config:
    return {"model_type": family} | SMALL.get(family, BASE) | options


def assert_equal(config: Config) -> None:
    theirs = built(config, TASKS.get(config["model_type"], "causal-lm"))
    ours = by_formula(config)
    assert tensors_by_formula(ours) == tensors_of(theirs)
    assert ours.parameters == sum(p.numel() for p in theirs.parameters())
    assert ours.architecture is not None
    assert ours.architecture.sliding_layers == windowed(theirs.config)
    window = theirs.config.sliding_window if ours.architecture.sliding_layers else None
    assert ours.architecture.sliding_window == window


def windowed(config: Any) -> tuple[int, ...]:
    """The layers that see a window only, as transformers' masks are made."""
    layers = range(config.num_hidden_layers)
    if config.model_type in ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"):
        return tuple(layers) if config.sliding_window else ()
    kinds = getattr(config, "layer_types", None) or ()
    return tuple(layer for layer, kind in zip(layers, kinds, strict=False) if kind == "sliding_attention")


@pytest.mark.parametrize("family, options", OPTIONS, ids=[f"{f}-{'-'.join(o)}" for f, o in OPTIONS])
def test_options(family: str, options: Config) -> None:
    assert_equal(small(family, **options))


@pytest.mark.parametrize("family", families())
def test_defaults_are_those_of_transformers(family: str) -> None:
    """Only the sizes given: every other key takes the default of transformers' config class."""
    sizes = {key: value for key, value in small(family).items() if not key.endswith("_positions")}
    for key in ("num_key_value_heads", "max_position_embeddings", "word_embed_proj_dim", "d_kv"):
        sizes.pop(key, None)
    sizes |= {"num_attention_heads": 32, "hidden_size": 64} if "num_attention_heads" in sizes else {}
    assert_equal(sizes)
    theirs = built(sizes, TASKS.get(family, "causal-lm")).config
    ours = by_formula(sizes)
    shape = ours.architecture
    assert shape is not None
    if family == "roberta":
        assert ours.max_positions == theirs.max_position_embeddings - theirs.pad_token_id - 1
    elif family not in ("bloom", "t5"):
        assert ours.max_positions == theirs.max_position_embeddings
    dropout = {"gpt2": "attn_pdrop", "bert": "attention_probs_dropout_prob", "t5": "dropout_rate"}
    dropout["roberta"] = dropout["bert"]
    assert shape.attention_dropout == getattr(theirs, dropout.get(family, "attention_dropout"))
    hidden = {
        "gpt2": "resid_pdrop",
        "phi": "resid_pdrop",
        "phi3": "resid_pdrop",
        "starcoder2": "residual_dropout",
    }
    hidden |= {"bert": "hidden_dropout_prob", "roberta": "hidden_dropout_prob", "t5": "dropout_rate"}
    hidden |= {"opt": "dropout", "distilbert": "dropout"}
    assert shape.hidden_dropout == getattr(theirs, hidden.get(family, "hidden_dropout"), 0.0)
    activation = {"gpt2": "activation_function", "opt": "activation_function", "falcon": "activation"}
    activation |= {
        "distilbert": "activation",
        "gemma2": "hidden_activation",
        "gemma3_text": "hidden_activation",
    }
    activation["t5"] = "dense_act_fn"
    assert shape.activation == getattr(theirs, activation.get(family, "hidden_act"), "gelu")


@st.composite
def llama_like(draw: st.DrawFn) -> Config:
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    heads, head_dim = groups * per_group, 2 * draw(st.integers(1, 6))
    family = draw(
        st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "olmo2", "granite", "smollm3", "phi3"])
    )
    config = {
        "model_type": family,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": draw(st.integers(1, 40)),
        "vocab_size": draw(st.integers(4, 60)),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in ("llama", "granite", "smollm3", "qwen3", "olmo2"):
        config["attention_bias"] = draw(st.booleans())
    if family in ("llama", "granite", "smollm3"):
        config["mlp_bias"] = draw(st.booleans())
    if family in ("llama", "mistral", "qwen3"):
        config["head_dim"] = 2 * draw(st.integers(1, 6))
    return config


@settings(max_examples=40, deadline=None)
@given(llama_like())
def test_random_llamas(config: Config) -> None:
    assert_equal(config)


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 5),
    width=st.integers(1, 8),
    layers=st.integers(1, 4),
    vocab=st.integers(3, 60),
    inner=st.one_of(st.none(), st.integers(1, 50)),
    tied=st.booleans(),
)
def test_random_gpt2(heads: int, width: int, layers: int, vocab: int, inner: int | None, tied: bool) -> None:
    config = GPT2 | {"model_type": "gpt2", "n_head": heads, "n_embd": heads * width, "n_layer": layers}
    assert_equal(config | {"vocab_size": vocab, "n_inner": inner, "tie_word_embeddings": tied})


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"hidden_size": None}, "config.json has no hidden_size; a llama config needs it"),
        ({"hidden_size": "24"}, "hidden_size must be a whole number from 1 to 10,000,000, got '24'"),
        ({"hidden_size": -24}, "got -24"),
        ({"hidden_size": 24.5}, "got 24.5"),
        ({"hidden_size": True}, "got True"),
        ({"hidden_size": [24]}, r"got \[24\]"),
        ({"vocab_size": math.nan}, "vocab_size must be a whole number .* got nan"),
        ({"vocab_size": math.inf}, "got inf"),
        ({"vocab_size": 10**7 + 1}, "got 10000001"),
        ({"intermediate_size": 10**400}, "intermediate_size must be"),
        (
            {"num_hidden_layers": 10_001},
            "num_hidden_layers must be a whole number from 1 to 10,000, got 10001",
        ),
        ({"num_hidden_layers": 0}, "got 0"),
        ({"num_attention_heads": 5}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"attention_dropout": 1.5}, "attention_dropout must be a number from 0 to 1, got 1.5"),
        ({"attention_dropout": math.nan}, "got nan"),
        ({"attention_dropout": -0.1}, "got -0.1"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false, got 'yes'"),
        ({"hidden_act": 3}, "hidden_act must be a name, got 3"),
        ({"model_type": None}, "config.json has no model_type"),
        ({"model_type": ["llama"]}, "config.json has no model_type"),
        ({"model_type": "mine", "auto_map": {"AutoModel": "mine.Model"}}, "never runs remote code"),
    ],
)
def test_malformed_configs(change: Config, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as raised:
        by_formula(small("llama", **change))
    assert not isinstance(raised.value, UnknownFamily)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("value", [None, 0, -1, "many", math.nan, 10**9, {}])
def test_a_broken_vocabulary_is_refused_by_every_family(family: str, value: object) -> None:
    with pytest.raises(ModelError, match="vocab_size"):
        by_formula(small(family, vocab_size=value))


@pytest.mark.parametrize(
    "config, complaint",
    [
        (small("gpt2", hidden_size=48), "n_embd = 24 and hidden_size = 48; they must agree"),
        (small("gpt2", n_head=5), "not a multiple of"),
        (small("bert", num_attention_heads=5), "not a multiple of"),
        (small("mixtral", num_experts_per_tok=9), "num_experts_per_tok 9 is above the number of experts 8"),
        (small("qwen3_moe", mlp_only_layers="1"), "mlp_only_layers must be a list of layer indices"),
        (small("gemma2", layer_types=["full_attention"]), "layer_types must be a list of 3 names"),
        (small("gemma2", final_logit_softcapping=-1), "final_logit_softcapping must be a number above 0"),
        (small("t5", feed_forward_proj="a-b-c"), "feed_forward_proj"),
        (small("roberta", max_position_embeddings=1), "leaves no position"),
    ],
)
def test_contradictions(config: Config, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        by_formula(config)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba", "hidden_size": 8},
        small("gpt2", add_cross_attention=True),
        small("bert", is_decoder=True),
        small("stablelm", qk_layernorm=True),
        small("distilbert", sinusoidal_pos_embds=True),
    ],
)
def test_no_formula_is_said_so(config: Config) -> None:
    """UnknownFamily lets the caller count the model by building it."""
    with pytest.raises(UnknownFamily, match="has no closed formula"):
        by_formula(config)
    with pytest.raises(UnknownFamily, match="for causal-lm has no closed formula"):
        model_from_config(small("bert"), id="test", source="a test", task="causal-lm")


def test_native_families_ignore_auto_map() -> None:
    """Phi-3's config.json names code on the hub, but transformers has the class itself."""
    config = small("phi3", auto_map={"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"})
    assert by_formula(config).parameters == by_formula(small("phi3")).parameters


@pytest.mark.parametrize("config", [[], None, "llama", {"model_type": "llama", "x": {1, 2}}])
def test_what_is_not_json_is_refused(config: Any) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        by_formula(config)
