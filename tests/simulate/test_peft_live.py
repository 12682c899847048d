"""Every method of peft, simulated and run with real tensors on the CPU: the same parameters and bytes."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest

from planner.errors import SetupError
from planner.methods import PeftConfig
from planner.simulate import peft_forms, peft_inits
from planner.simulate.run import simulate
from planner.training import run as training_run
from tests.simulate.live_bytes import BLOCK_BYTES, really, simulated
from tests.simulate.peft_cases import CASES, LORA, METHODS, TARGETS
from tests.simulate.small import LLAMA, setup_of

# A real run on the CPU copies no indices "to the device": up to four of them, of one block each, differ;
# AdaMSS has one of 8 bytes for each output, 256 of q and 128 of v in two layers.
COPIES_BYTES = 4 * BLOCK_BYTES
COPIES_OF_ADAMSS_BYTES = 2 * (256 + 128) * 8
REFUSED = {"XLORA"}
LATEST = peft.__version__.startswith("0.21.")


def setup_with(values: dict[str, Any], **training: Any) -> Any:
    """Eager attention and SGD: operations that the CPU runs as CUDA does."""
    method = PeftConfig(peft_config_json=json.dumps(values))
    options: dict[str, Any] = {"seq_len": 24, "attention": "eager", "optimizer": "sgd", "precision": "bf16"}
    return setup_of(LLAMA, method, **(options | training))


@pytest.fixture(autouse=True)
def clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdaMSS asks scikit-learn for k-means; here all its clusters are of one size."""

    def fit_predict(rows: Any, count: int) -> Any:
        return np.arange(len(rows)) * count // len(rows)

    def kmeans(n_clusters: int, **_settings: Any) -> Any:
        return SimpleNamespace(fit_predict=lambda rows: fit_predict(rows, n_clusters))

    sklearn, cluster = ModuleType("sklearn"), ModuleType("sklearn.cluster")
    cluster.KMeans = kmeans  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sklearn", sklearn)
    monkeypatch.setitem(sys.modules, "sklearn.cluster", cluster)


@pytest.mark.skipif(not LATEST, reason="cases are of peft 0.21")
def test_every_method_of_peft_has_a_case_or_is_refused() -> None:
    assert {kind.value for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING} == {*METHODS} | REFUSED


@pytest.mark.skipif(not LATEST, reason="cases are of peft 0.21")
@pytest.mark.parametrize("name", CASES)
def test_simulated_bytes_are_those_of_a_real_run(name: str) -> None:
    setup = setup_with(CASES[name])
    found, phases = simulated(setup)
    expected, real = really(setup)
    assert found == expected
    # not of loading, which gives weights their values on the CPU
    assert [phase.name for phase in phases] == [phase.name for phase in real]
    allowed = COPIES_OF_ADAMSS_BYTES if name == "ADAMSS" else COPIES_BYTES
    for here, there in zip(phases[1:], real[1:], strict=True):
        assert abs(here.end_bytes - there.end_bytes) <= allowed, here.name
        if here.name != "attach":  # its solvers and random numbers are the host's
            assert abs(here.peak_bytes - there.peak_bytes) <= allowed, here.name


@pytest.mark.skipif(not LATEST, reason="forms are of peft 0.21")
def test_every_form_stands_for_a_function_of_peft() -> None:
    for place in (*peft_inits.INITS, *peft_forms._OF_THE_STEP):
        module, _, path = place.partition(":")
        owner: Any = sys.modules[module]
        for name in path.split("."):
            owner = getattr(owner, name)
        assert callable(owner), place


@pytest.mark.parametrize(
    "init", [{"init_lora_weights": "corda"}, {"init_lora_weights": "lora_ga", "lora_ga_config": {}}]
)
def test_an_initialisation_by_data_leaves_the_memory_of_pissa(init: dict[str, Any]) -> None:
    """CorDA and LoRA-GA, too, leave new factors and a residual weight of the model's type."""
    base = {"peft_type": "LORA", "task_type": "CAUSAL_LM"} | LORA
    by_data, plain = simulate(setup_with(base | init)), simulate(setup_with(base))
    pissa = simulate(setup_with(base | {"init_lora_weights": "pissa"}))
    assert (by_data.parameters, by_data.parts) == (pissa.parameters, pissa.parts)
    assert by_data.parts.base_weights == plain.parts.base_weights
    weight_bytes = 256 * 256 * 4  # in fp32, while q's residual is made
    assert by_data.phases[1].peak_allocated_bytes >= plain.phases[1].peak_allocated_bytes + weight_bytes
    assert any("pass over training data" in note for note in by_data.notes)


def test_loftq_leaves_a_weight_of_the_models_type() -> None:
    base = {"peft_type": "LORA", "task_type": "CAUSAL_LM"} | LORA
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    found, plain = simulate(setup_with(base | loftq)), simulate(setup_with(base))
    assert (found.parameters, found.parts) == (plain.parameters, plain.parts)


def test_frods_base_weights_leave_the_device() -> None:
    """FrodLayer keeps the weight that it replaces in the host's memory (runtime_offload_base_weight)."""
    values = {"peft_type": "FROD", "task_type": "CAUSAL_LM", "progressbar": False} | TARGETS
    kept = simulate(setup_with(values | {"runtime_offload_base_weight": False}))
    gone = simulate(setup_with(values | {"runtime_offload_base_weight": True}))
    weights = 2 * (256 * 256 + 128 * 256) * 2  # q and v of two layers, in bf16
    assert kept.parts.base_weights - gone.parts.base_weights == weights


@pytest.mark.parametrize(
    "values, words",
    [
        ({"peft_type": "XLORA", "adapters": {"a": "somewhere"}}, "X-LoRA mixes .* plan one of those"),
        ({"peft_type": "LORA", "arrow_config": {}} | TARGETS, "arrow routes .* plan one of those"),
        ({"peft_type": "LORA", "init_lora_weights": "eva"} | TARGETS, 'set "eva_config"'),
        ({"peft_type": "LORA", "init_lora_weights": "lora_ga"} | TARGETS, 'give "lora_ga_config"'),
        ({"peft_type": "SHADOW"} | TARGETS, "leave target_modules out"),
        ({"peft_type": "SHADOW", "shadow_model": "a/b"}, 'set "shadow_model"'),
        (
            {
                "peft_type": "MULTITASK_PROMPT_TUNING",
                "num_virtual_tokens": 4,
                "prompt_tuning_init_state_dict_path": "x",
            },
            'set "prompt_tuning_init"',
        ),
    ],
)
def test_what_a_configuration_cannot_say_is_refused_before_a_model_is_built(
    values: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_run, "skeleton", None)
    with pytest.raises(SetupError, match=words) as error:
        simulate(setup_with(values))
    assert "\n" not in str(error.value)
