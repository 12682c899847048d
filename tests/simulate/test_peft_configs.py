"""Any method of the peft library by its configuration: counts equal peft's own, on a small llama."""

from __future__ import annotations

import json
import warnings
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from planner.errors import PlannerError, SetupError, TraceError
from planner.methods import PeftConfig
from planner.simulate.run import simulate
from planner.spec import LoRA
from tests.simulate.small import LLAMA, setup_of

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
VIRTUAL = {"num_virtual_tokens": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "LORA": TARGETS | {"r": 4},
    "LORA dora": {"peft_type": "LORA", "use_dora": True} | TARGETS,
    "LORA rslora": {"peft_type": "LORA", "use_rslora": True} | TARGETS,
    "LORA ranks": {"peft_type": "LORA", "rank_pattern": {"q_proj": 2}} | TARGETS,
    "LORA saved": {"peft_type": "LORA", "modules_to_save": ["lm_head"]} | TARGETS,
    "LORA tokens": {"peft_type": "LORA", "trainable_token_indices": [0, 1, 2]} | TARGETS,
    "BOFT": TARGETS | {"boft_block_size": 8},
    "C3A": TARGETS | {"block_size": 32},
    "FOURIERFT": TARGETS | {"n_frequency": 16},
    "HRA": TARGETS,
    "IA3": {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": TARGETS,
    "LOKR": TARGETS,
    "MISS": TARGETS,
    "OFT": TARGETS | {"oft_block_size": 8},
    "PREFIX_TUNING": VIRTUAL,
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL | {"encoder_hidden_size": 32},
    "RANDLORA": TARGETS | {"r": 8},
    "ROAD": TARGETS,
    "TINYLORA": TARGETS,
    "TRAINABLE_TOKENS": {"token_indices": [0, 1]},
    "VBLORA": TARGETS | {"vector_length": 32, "num_vectors": 8},
    "VERA": TARGETS | {"r": 8},
    "WAVEFT": TARGETS | {"n_frequency": 64},
}


def config_of(name: str) -> dict[str, Any]:
    return {"peft_type": name, "task_type": "CAUSAL_LM"} | CONFIGS[name]


def counted_by_peft(values: dict[str, Any]) -> tuple[int, int]:
    """(trained, all), by peft's own counter on a real model."""
    rest = {key: value for key, value in values.items() if key != "peft_type"}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(values["peft_type"])](**rest)
    architecture = {key: value for key, value in LLAMA.items() if key != "model_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **architecture))
        return tuple(peft.get_peft_model(net, config).get_nb_trainable_parameters())


@pytest.mark.parametrize("name", CONFIGS)
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


def test_a_method_that_decides_by_values_is_a_trace_error() -> None:
    values = {"peft_type": "POLY", "task_type": "CAUSAL_LM"} | TARGETS  # asks for a task's id in each batch
    with pytest.raises(TraceError, match="cannot be simulated") as error:
        simulate(setup_of(LLAMA, PeftConfig(peft_config_json=json.dumps(values))))
    assert isinstance(error.value, PlannerError)
    assert torch.ones(1).device.type == "cpu"
