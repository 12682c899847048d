"""What a built model says of its attention, and refusals that need no trace for models without formulas."""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from planner import attention, spec
from planner.catalog import model, models
from planner.catalog.inventory import _model
from planner.errors import SetupError, TraceError
from planner.model import AttentionShape, Model
from planner.simulate import simulate
from planner.spec import Setup, Training
from planner.training.inventory import inventory
from tests.catalog.every_architecture import small_config

CATALOGUE = {found.architecture.family: found for name in models() if (found := model(name)).architecture}


def inventoried(config: dict[str, Any], task: Any = None) -> Model:
    found = _model(json.dumps(inventory(config, task)), config, id="org/own", source="test")
    assert found is not None
    return found


@pytest.mark.parametrize("family", CATALOGUE)
def test_modules_say_what_the_closed_formulas_say(family: str) -> None:
    known = CATALOGUE[family]
    built = inventoried(known.config, known.task)
    assert built.architecture is None
    assert built.attention == known.attention


def small(model_type: str, **values: Any) -> Model:
    return inventoried({**small_config(CONFIG_MAPPING[model_type]), **values})


MLA = AttentionShape(fused=True, head_dims=((192, 128),))


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("deepseek_v3", MLA),
        ("longcat_flash", MLA),
        ("codegen", AttentionShape(fused=False, head_dims=((256, 256),))),
        ("cohere2", AttentionShape(fused=True, head_dims=((128, 128),), window=4096)),
        ("mt5", AttentionShape(fused=True, head_dims=((64, 64),), dropout=0.1)),
        ("gemma4_text", AttentionShape(fused=True, head_dims=((256, 256), (512, 512)), window=512)),
        ("llama4_text", AttentionShape(fused=True, head_dims=((128, 128),), window=8192)),
        ("mamba2", AttentionShape(fused=False, head_dims=())),
        # of a model that hears, the part that writes: its tower has heads of 64
        ("voxtral", AttentionShape(fused=True, head_dims=((128, 128),))),
    ],
)
def test_models_without_formulas(model_type: str, expected: AttentionShape) -> None:
    assert small(model_type).attention == expected


CASES = [
    ("deepseek_v3", "flash", "h200", "takes values as wide as queries and keys, org/own has queries of "
     "192 and values of 128; choose sdpa, efficient or eager."),
    ("deepseek_v3", "efficient", "a100-40gb", ""),
    ("zamba2", "cudnn", "a100-40gb", "takes heads of a multiple of 8 up to 128 on a100-40gb, org/own has"),
    ("zamba2", "flash", "a100-40gb", ""),
    ("glm4_moe_lite", "cudnn", "h200", ""),
    ("glm4_moe_lite", "flash", "a100-40gb", ""),
    ("glm4_moe", "efficient", "h200", "takes heads of a multiple of 8 on h200, org/own has 42"),
    ("gemma4_text", "flash", "h200", "takes heads of up to 256, org/own has 512"),
    ("mt5", "flash", "h200", "takes no position biases"),
    ("mt5", "cudnn", "h200", "takes no position biases"),
    ("mt5", "efficient", "h200", ""),
    ("doge", "cudnn", "h200", "takes no biases as org/own has them here"),
    ("doge", "efficient", "h200", ""),
    ("glm_moe_dsa", "flash", "h200", "its code always makes one"),
    ("layoutlm", "flash", "a100-40gb", "its code always makes one"),
    ("layoutlm", "efficient", "a100-40gb", ""),
    ("cohere2", "flash", "t4", "needs capability 8.0"),
    ("cohere2", "flash", "a100-40gb", "its sliding window of 100"),
    ("cohere", "flash", "a100-40gb", ""),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "kernel", "card", "words"), CASES)
def test_refused_in_the_setup_where_the_trace_finds_no_kernel(
    model_type: str, kernel: Any, card: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = small(model_type, **({"sliding_window": 100} if model_type == "cohere2" else {}))
    asked = Training(attention=kernel, seq_len=100)
    if words:
        with pytest.raises(SetupError) as refusal:
            Setup(model=built, training=asked, gpu=card)
        assert words in str(refusal.value)
    for module, name in ((spec, "check_attention"), (spec, "check_kernel")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    monkeypatch.setattr(import_module("planner.simulate.run"), "check_kernel", lambda *_, **__: None)
    setup = Setup(model=built, training=asked, gpu=card)
    if words:
        with pytest.raises(TraceError, match="no attention kernel takes"):
            simulate(setup, steps=1)
    else:
        assert simulate(setup, steps=1).peak_allocated_bytes > 0


def test_a_kernel_that_the_class_never_asks_for_is_refused_instead_of_left_out() -> None:
    with pytest.raises(SetupError, match="org/own with eager attention only, attention flash is not there"):
        Setup(model=small("codegen"), training=Training(attention="flash"))


def test_model_types_that_are_named_are_transformers_own() -> None:
    named = {*attention._ALWAYS_MASKED, *attention._BIASED, *attention._COMPUTED_BIASES}
    assert named <= set(CONFIG_MAPPING)
