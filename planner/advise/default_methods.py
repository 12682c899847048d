"""The methods of the table, each as people usually set it up: peft's own defaults, LoRA's targets for all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from planner.errors import SetupError
from planner.methods import Adapter, BitFit, FullFineTuning, LoRA, Method, PeftConfig, PeftOfSize, QLoRA
from planner.model import Model
from planner.spec import Setup
from planner.targets import lora_targets

__all__ = ["REFERENCE", "Named", "default_methods"]

REFERENCE = "LoRA, r = 8"
OWN = "The method asked for"
_VIRTUAL = {"num_virtual_tokens": 20}  # peft's examples of prompt, prefix and P-tuning
# Title, peft_type, settings beside the targets. Where nothing stands, peft 0.21's defaults hold.
_OVER_LINEAR: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("rsLoRA, r = 32", "LORA", {"r": 32, "lora_alpha": 64, "use_rslora": True}),
    ("DoRA, r = 8", "LORA", {"r": 8, "lora_alpha": 16, "use_dora": True}),
    ("PiSSA, r = 8", "LORA", {"r": 8, "lora_alpha": 16, "init_lora_weights": "pissa"}),
    ("AdaLoRA", "ADALORA", {"total_step": 1000}),  # which peft asks for; memory does not depend on it
    ("LoHa, r = 8", "LOHA", {}),
    ("LoKr, r = 8", "LOKR", {}),
    ("OFT, blocks of 32", "OFT", {}),
    ("BOFT, blocks of 4", "BOFT", {}),
    ("HRA, r = 8", "HRA", {}),
    ("VeRA, r = 256", "VERA", {}),
    ("RandLoRA, r = 32", "RANDLORA", {}),
    ("FourierFT, 1,000 frequencies", "FOURIERFT", {}),
    ("WaveFT", "WAVEFT", {}),
    ("SHiRA, r = 32", "SHIRA", {}),
    ("MiSS, r = 64", "MISS", {}),
    ("RoAd", "ROAD", {}),
    ("DeLoRA, r = 8", "DELORA", {}),
    ("HiRA, r = 32", "HIRA", {}),
    ("GraLoRA, r = 32", "GRALORA", {}),
)
_OVER_THE_MODEL: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("Prompt tuning, 20 tokens", "PROMPT_TUNING", _VIRTUAL),
    ("Prefix tuning, 20 tokens", "PREFIX_TUNING", _VIRTUAL),
    ("P-tuning, 20 tokens", "P_TUNING", _VIRTUAL),
)
_LARGEST_BLOCK = 256  # peft's default for both; the sides of a matrix must be multiples of it
_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k", "v", "query_key_value", "qkv_proj", "c_attn")


@dataclass(frozen=True, kw_only=True)
class Named:
    """A method under its title: its setup, or why this model or recipe cannot have it."""

    title: str
    setup: Setup | None
    reason: str = ""


def default_methods(setup: Setup) -> tuple[Named, ...]:
    """The same model, training and GPU with each method. A LoRA's target modules are taken for all.

    The setup's own method stands first where it is none of them.
    """
    usual = tuple(_methods(setup))
    own = setup.method
    if any(own == method for _, method in usual) or isinstance(own, PeftOfSize):
        return tuple(_named(setup, title, method) for title, method in usual)
    return tuple(_named(setup, title, method) for title, method in ((OWN, own), *usual))


def _named(setup: Setup, title: str, method: Method) -> Named:
    try:
        return Named(title=title, setup=setup.replace(method=method))
    except SetupError as error:
        return Named(title=title, setup=None, reason=str(error))


def _methods(setup: Setup) -> Iterator[tuple[str, Method]]:
    model = setup.model
    asked = setup.method.target_modules if isinstance(setup.method, LoRA) else ("attention",)
    names = _target_names(model, asked)
    over_linear = {"target_modules": list(names)}
    lora = LoRA(lora_rank=8, target_modules=asked)
    yield "Full fine-tuning", FullFineTuning()
    yield "BitFit", BitFit()
    yield REFERENCE, lora
    yield "LoRA, r = 32", replace(lora, lora_rank=32)
    yield "QLoRA nf4, r = 8", QLoRA(lora_rank=8, target_modules=asked)
    yield "Adapters, Pfeiffer", Adapter(adapter_kind="pfeiffer")
    yield "Adapters, Houlsby", Adapter(adapter_kind="houlsby")
    if names:
        for title, kind, settings in _OVER_LINEAR:
            yield title, _peft(kind, over_linear | dict(settings))
        side = gcd(_LARGEST_BLOCK, *_sides(model, asked))
        yield "VB-LoRA, r = 4", _peft("VBLORA", over_linear | {"vector_length": side})
        yield f"C3A, blocks of {side}", _peft("C3A", over_linear | {"block_size": side})
    for title, kind, settings in _OVER_THE_MODEL:
        yield title, _peft(kind, settings)
    if norms := _leaves(model, lambda t: t.role == "norm"):
        yield "LN tuning", _peft("LN_TUNING", {"target_modules": norms})
    if model.architecture and (keys := [name for name in names if name in _KEYS_AND_VALUES]):
        output = model.architecture.mlp_output.rpartition(".")[2]
        yield "IA3", _peft("IA3", {"target_modules": [*keys, output], "feedforward_modules": [output]})


def _target_names(model: Model, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Last parts of the names of the linear layers that LoRA would adapt."""
    try:
        found = [target.weight.module for target in lora_targets(model, asked) if not target.by_parameter]
    except SetupError:
        return ()
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in found))


def _sides(model: Model, asked: tuple[str, ...]) -> Iterator[int]:
    """Widths of the matrices that LoRA would adapt."""
    for target in lora_targets(model, asked):
        yield from (target.weight.in_features, target.weight.out_features)


def _leaves(model: Model, wanted: Any) -> list[str]:
    return list(dict.fromkeys(t.module.rpartition(".")[2] for t in model.tensors if wanted(t)))


def _peft(kind: str, settings: Mapping[str, Any]) -> PeftConfig:
    return PeftConfig(peft_config_json=json.dumps({"peft_type": kind, **settings}))
