"""The table of adapter places, held against transformers' own classes built on the `meta` device."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)

from planner import catalog
from planner.catalog.outputs import OUTPUTS, takes_adapter
from planner.errors import SetupError
from planner.spec import Adapter, BitFit, LoRA
from planner.training.peft import (
    AdapterSettings,
    BitFitSettings,
    LoRASettings,
    attach,
    settings,
    trainable_count,
)

LAYERS = 4
_LAYER_FIELDS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers",
)  # fmt: skip


def meta_model(model_type: str) -> nn.Module:
    """The family's class of its default config, four layers deep."""
    # Nemotron's default config names no key-value heads and cannot be built.
    changes = {"num_key_value_heads": 8} if model_type == "nemotron" else {}
    config: Any = CONFIG_MAPPING[model_type](**changes)
    for field in _LAYER_FIELDS:
        if hasattr(config, field):
            setattr(config, field, LAYERS)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:LAYERS]
    for auto in (AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of unusual default configs
                return auto.from_config(config)
    raise AssertionError(f"no language model for {model_type}")


@pytest.mark.parametrize("model_type", OUTPUTS)
def test_every_layer_has_one_attention_and_one_mlp_output(model_type: str) -> None:
    model = meta_model(model_type)
    attention, mlp = OUTPUTS[model_type]
    names = [name for name, _ in model.named_modules()]
    pfeiffer = {name for name in names if takes_adapter(name, "pfeiffer", attention, mlp)}
    houlsby = {name for name in names if takes_adapter(name, "houlsby", attention, mlp)}
    assert pfeiffer < houlsby
    # The path before the sub-layer is the layer; T5 numbers its sub-layers inside one.
    layer = re.compile(r"^(.*?\d+)\.")
    for places in (pfeiffer, houlsby - pfeiffer):
        in_layer = Counter(layer.match(name)[1] for name in places)  # type: ignore[index]
        stacks = 2 if model.config.is_encoder_decoder else 1
        depth = 1 if model_type == "albert" else LAYERS * stacks  # ALBERT shares one layer
        assert len(in_layer) == depth
        assert set(in_layer.values()) == {1}

    size = 3
    hidden = model.config.get_text_config(decoder=True).hidden_size
    attach(
        model,
        AdapterSettings(
            adapter_kind="houlsby", adapter_size=size, attention_outputs=attention, mlp_outputs=mlp
        ),
    )
    assert trainable_count(model) == len(houlsby) * (2 * hidden * size + size + hidden)


def test_a_setups_method_becomes_these_modules_settings() -> None:
    bert, t5 = catalog.model("google-bert/bert-base-uncased"), catalog.model("google-t5/t5-small")
    assert settings(bert, LoRA(lora_rank=4)) == LoRASettings(lora_rank=4, lora_alpha=8.0)  # alpha = 2 r
    named = LoRA(lora_rank=4, lora_alpha=3, lora_dropout=0.1, target_modules=("q", "v"), lora_bias="all")
    assert settings(t5, named) == LoRASettings(
        lora_rank=4, lora_alpha=3, lora_dropout=0.1, target_modules=("q", "v"), lora_bias="all"
    )
    assert settings(bert, BitFit()) == BitFitSettings()
    reduced = Adapter(adapter_kind="houlsby", adapter_reduction_factor=16)
    assert settings(bert, reduced) == AdapterSettings(
        adapter_kind="houlsby",
        adapter_size=768 // 16,
        attention_outputs=("attention.output.dense",),
        mlp_outputs=("output.dense",),
    )
    with pytest.raises(SetupError, match="where adapters go in"):
        settings(replace(bert, architecture=None), reduced)


def test_the_table_agrees_with_the_catalogue() -> None:
    families = {catalog.model(name).architecture for name in catalog.models()} - {None}
    assert len(families) > 100
    for shape in families:
        attention, mlp = OUTPUTS[shape.family]
        assert (shape.attention_output, shape.mlp_output) == (attention[0], mlp[0])
