"""Any method of the peft library by its configuration: counts equal peft's own, on a small llama."""

from __future__ import annotations

import json
import warnings
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from planner.errors import SetupError
from planner.methods import PeftConfig
from planner.simulate.run import simulate
from planner.spec import LoRA
from tests.simulate.peft_cases import CASES
from tests.simulate.small import LLAMA, setup_of

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
COUNTED = ("ADALORA", "LORA", "LORA dora", "LORA saved", "LORA tokens", "P_TUNING", "VBLORA", "VERA")


def config_of(name: str) -> dict[str, Any]:
    return dict(CASES[name])


def counted_by_peft(values: dict[str, Any]) -> tuple[int, int]:
    """(trained, all), by peft's own counter, in bf16 (where AdaLoRA counts four more than in fp32)."""
    rest = {key: value for key, value in values.items() if key != "peft_type"}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(values["peft_type"])](**rest)
    architecture = {key: value for key, value in LLAMA.items() if key != "model_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config_of_model = AutoConfig.for_model("llama", **architecture)
        net = AutoModelForCausalLM.from_config(config_of_model, dtype=torch.bfloat16)
        return tuple(peft.get_peft_model(net, config).get_nb_trainable_parameters())


@pytest.mark.parametrize("name", COUNTED)
def test_counts_equal_pefts_own(name: str) -> None:
    values = config_of(name)
    setup = setup_of(LLAMA, PeftConfig(peft_config_json=json.dumps(values)), seq_len=64)
    report = simulate(setup)
    assert (report.parameters.trainable, report.parameters.total) == counted_by_peft(values)
    assert report.peak_allocated_bytes == max(phase.peak_allocated_bytes for phase in report.phases)
    assert report.parts.optimizer_states > 0


def test_lora_by_its_file_is_lora() -> None:
    by_file = setup_of(LLAMA, PeftConfig(peft_config_json=json.dumps(config_of("LORA"))))
    by_name = setup_of(LLAMA, LoRA(lora_rank=4, target_modules=("q_proj", "v_proj")))
    found, expected = simulate(by_file), simulate(by_name)
    assert (found.parameters, found.parts) == (expected.parameters, expected.parts)
    assert [p.peak_allocated_bytes for p in found.phases[2:]] == [
        p.peak_allocated_bytes for p in expected.phases[2:]
    ]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"peft_type": "LROA"}, "did you mean .*LORA"),
        ({"peft_type": "LORA", "ranks": 4}, "has no setting 'ranks'"),
        ({"peft_type": "LORA", "target_modules": ["qproj"]}, "cannot attach"),
        ({"peft_type": "BOFT", "boft_block_size": 7} | TARGETS, "cannot attach"),
        ({"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": ["v_proj"]}, "refuses"),
    ],
)
def test_what_peft_refuses_is_refused_in_one_line(values: dict[str, Any], words: str) -> None:
    setup = setup_of(LLAMA, PeftConfig(peft_config_json=json.dumps(values)))
    with pytest.raises(SetupError, match=words) as error:
        simulate(setup)
    assert "\n" not in str(error.value)
