"""Liger's norms, activations, rotary positions and experts in torch's words beside transformers' own."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from typing import Any

import pytest
import torch
from torch import nn

from planner.errors import SetupError
from planner.liger import REPLACED, liger_switches
from planner.spec import LoRA, PeftConfig, Setup, Sharding, Training
from planner.training import liger_kernels
from planner.training.run import TrainingRun
from tests.simulate.small import GPT2, LLAMA, model_of, setup_of

BASE: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 300, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 320, "max_position_embeddings": 4096, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = {"head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
MODELS: dict[str, dict[str, Any]] = {
    name: {**BASE, "model_type": name, **more}
    for name, more in {
        "exaone4": {},
        "gemma": WIDE,
        "gemma2": WIDE,
        "gemma3_text": WIDE,
        "glm4": WIDE,
        "granite": {},
        "hunyuan_v1_dense": WIDE,
        "llama": {},
        "ministral": WIDE,
        "mistral": {},
        "mixtral": EXPERTS,
        "olmo2": {},
        "olmo3": {},
        "phi3": {},
        "qwen2": {},
        "qwen3": WIDE,
        "qwen3_moe": {**WIDE, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 96},
        "smollm3": {"num_hidden_layers": 4},
    }.items()
}


def _lora_file(**values: Any) -> PeftConfig:
    return PeftConfig(peft_config_json=json.dumps({"peft_type": "LORA", **values}))


LN = PeftConfig(peft_config_json='{"peft_type": "LN_TUNING"}')


def _no_phases(_name: str, _step: int | None) -> Any:
    return contextlib.nullcontext()


def _step(setup: Setup) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step on the CPU and every gradient, norms away from their first values."""
    torch.manual_seed(0)
    run = TrainingRun(setup, torch.device("cpu"), _no_phases)
    run.prepare()
    with torch.no_grad():
        for parameter in run.net.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in run.net.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.__setitem__(name, p.grad.clone())
            )
    losses = []
    own = run._loss

    def loss(inputs: dict[str, Any]) -> Any:
        answer = own(inputs)
        losses.append(float(answer[0].detach()))
        return answer

    run._loss = loss  # type: ignore[method-assign]
    run.step(1)
    return losses[0], gradients


def test_every_model_type_is_here() -> None:
    assert set(MODELS) == set(REPLACED)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model_s_own_modules(name: str) -> None:
    def found(kernels: Any) -> tuple[float, dict[str, torch.Tensor]]:
        training = Training(
            micro_batch_size=2, seq_len=32, precision="fp32", optimizer="sgd", kernels=kernels,
            activation_checkpointing=name == "llama",
        )  # fmt: skip
        return _step(Setup(model=model_of(MODELS[name]), training=training))

    (loss, gradients), (own_loss, own) = found("liger"), found("torch")
    assert loss == pytest.approx(own_loss, rel=1e-5)
    assert gradients.keys() == own.keys()
    for key, gradient in gradients.items():
        size = max(float(own[key].norm()), 1e-6)
        assert float((gradient - own[key]).norm()) < 2e-4 * size, key


def test_a_copy_of_a_norm_that_peft_trains_is_trained() -> None:
    method = PeftConfig(
        peft_config_json='{"peft_type": "LORA", "target_modules": ["q_proj"], '
        '"modules_to_save": ["input_layernorm", "norm"]}'
    )
    setups = [setup_of(LLAMA, method, kernels=kernels, precision="fp32") for kernels in ("liger", "torch")]
    (_, gradients), (_, own) = (_step(setup) for setup in setups)
    saved = [name for name in own if "modules_to_save" in name]
    assert len(saved) == 5  # peft's `norm` means every name that ends so
    for name in saved:
        torch.testing.assert_close(gradients[name], own[name], rtol=1e-3, atol=1e-6)


def test_positions_are_turned_by_liger_s_function_in_a_step_alone() -> None:
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb
    run = TrainingRun(setup_of(LLAMA, kernels="liger"), torch.device("meta"), _no_phases)
    run.prepare()
    assert modeling_llama.apply_rotary_pos_emb is own
    with run.positions():
        assert modeling_llama.apply_rotary_pos_emb is liger_kernels.rotated
    assert modeling_llama.apply_rotary_pos_emb is own


def test_in_place_means_the_storage_that_was_there() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    weight = nn.Parameter(torch.ones(8))
    for in_place in (True, False):
        out = liger_kernels.rms_norm(x, weight, 1e-6, offset=0.0, single=False, in_place=in_place)
        gradient = torch.randn(6, 8)
        before = gradient.clone()
        out.backward(gradient)
        assert torch.equal(gradient, before) != in_place


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="liger_kernel is installed")
def test_a_card_without_the_library_is_refused_before_anything_is_built() -> None:
    with pytest.raises(SetupError, match=r"^kernels liger needs liger-kernel"):
        TrainingRun(setup_of(LLAMA, kernels="liger"), torch.device("cuda"), _no_phases)


@pytest.mark.parametrize(
    ("config", "method", "words"),
    [
        (GPT2, None, r"\(gpt2\) is none of them; choose kernels torch"),
        ({**LLAMA, "model_type": "gpt_oss"}, None, "is none of them"),
        ({**LLAMA, "hidden_act": "gelu"}, None, "has gelu; choose kernels torch"),
        (LLAMA, LN, "would never be trained; choose kernels torch"),
        (MODELS["mixtral"], LoRA(target_modules=("all-linear",)), "leave the experts out of target_modules"),
        (MODELS["mixtral"], _lora_file(target_modules="all-linear"), "leave the experts out"),
        (MODELS["mixtral"], _lora_file(target_modules=["q_proj", "w1", "w3"]), "leave the experts out"),
        (MODELS["qwen3_moe"], _lora_file(target_modules=r".*\.up_proj"), "leave the experts out"),
        (MODELS["qwen3_moe"], _lora_file(target_parameters=["experts.down_proj"]), "leave the experts out"),
        ({**MODELS["qwen3_moe"], "mlp_only_layers": [1]}, None, "has layers without"),
    ],
)
def test_what_the_library_has_not_or_would_break_is_refused(config: Any, method: Any, words: str) -> None:
    Setup(model=model_of(config), method=method)
    with pytest.raises(SetupError, match=words) as refusal:
        Setup(model=model_of(config), method=method, training=Training(kernels="liger"))
    assert "\n" not in str(refusal.value)


def test_a_norm_that_peft_has_wrapped_is_refused_where_only_peft_can_tell() -> None:
    method = PeftConfig(peft_config_json='{"peft_type": "LORA", "target_modules": "all-linear"}')
    setup = setup_of(LLAMA, method, kernels="liger")
    object.__setattr__(setup, "method", LN)
    with pytest.raises(SetupError, match="would never be trained"):
        TrainingRun(setup, torch.device("meta"), _no_phases).prepare()


def test_several_gpus_are_refused() -> None:
    shared = Sharding(num_gpus=2, sharding="fsdp")
    with pytest.raises(SetupError, match="kernels liger is covered on one GPU only"):
        Setup(model=model_of(LLAMA), training=Training(kernels="liger"), sharding=shared)


def test_both_settings_are_hf_trainer_s_own_default() -> None:
    """Each model type's defaults are kept; the losses alone are said."""
    assert liger_switches("liger", "liger") == {"fused_linear_cross_entropy": True, "cross_entropy": False}
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed: requirements-liger.txt")
    import inspect

    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    for name, what in REPLACED.items():
        given = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[name]).parameters
        if name != "granite":  # by default liger's loss on logits that are there
            assert given["fused_linear_cross_entropy"].default is True, name
            assert given["cross_entropy"].default is False, name
        assert given["rms_norm"].default is True
        assert given["rope"].default is what.rotary, name
        assert given["geglu" if what.gate == "gelu" else "swiglu"].default is True
