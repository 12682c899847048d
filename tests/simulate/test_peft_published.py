"""Parameters of methods as peft's own comparison counted them on Llama-3.2-3B, on an NVIDIA L40S.

github.com/huggingface/peft, method_comparison/MetaMathQA/results, one JSON file a run, cited by its name
and commit; `num_trainable_params` and `num_total_params` of `train_info`, under each run's `peft_config`.
"""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch

from planner.methods import PeftConfig
from planner.simulate.simulation import Simulation
from planner.spec import Setup, Training
from planner.training.run import TrainingRun
from tests.simulate.peft_cases import TARGETS

LORA = TARGETS | {"peft_type": "LORA", "r": 32, "lora_alpha": 64}
SHADOW = {
    "peft_type": "SHADOW",
    "shadow_num_hidden_layers": 1,
    "shadow_hidden_size": 32,
    "shadow_num_attention_heads": 8,
    "shadow_intermediate_size": 256,
}
RUNS: dict[str, tuple[dict[str, Any], int, int]] = {
    "lora--llama-3.2-3B-rank32 eccc7885": (LORA, 9_175_040, 3_221_924_864),
    "lora--llama-3.2-3B-rank32-kasa 85aa7262": (LORA | {"kasa_config": {}}, 9_176_832, 3_221_926_656),
    "boft--llama-3.2-3B-default 06f76d8e": (TARGETS | {"peft_type": "BOFT"}, 802_816, 3_213_552_640),
    "frod--llama-3.2-3B-default 7085385e": (
        TARGETS | {"peft_type": "FROD", "sparse_rate": 0.01},
        5_456_808,
        3_218_206_632,
    ),
    "shadow--llama-3.2-3B-mirror 85aa7262": (SHADOW, 8_659_488, 3_221_409_312),
}


@pytest.mark.skipif(not peft.__version__.startswith("0.21."), reason="the methods are of peft 0.21")
@pytest.mark.parametrize("name", RUNS)
def test_counts_are_those_of_pefts_own_runs(name: str) -> None:
    values, trainable, total = RUNS[name]
    method = PeftConfig(peft_config_json=json.dumps(values))
    setup = Setup(model="meta-llama/Llama-3.2-3B", method=method, training=Training(precision="bf16"))
    simulation = Simulation()
    run = TrainingRun(setup, torch.device("meta"), simulation.phase)
    with simulation.outcome():
        run.prepare()
    assert sum(p.numel() for p in run.trained) == trainable
    assert sum(p.numel() for p in run.net.parameters()) == total
