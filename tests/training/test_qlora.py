"""QLoRA: refusals in the user's words, the bytes of what is kept, and a step on the CPU with bitsandbytes."""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from planner.errors import SetupError
from planner.estimate import estimate
from planner.estimate.quantized import kept_sizes, quantized_tensors
from planner.simulate.run import simulate
from planner.simulate.simulation import Simulation
from planner.spec import LoRA, QLoRA, Setup, Training
from planner.training import quantize
from planner.training.recipe import no_autocast
from planner.training.run import TrainingRun
from tests.simulate.small import GPT2, LLAMA, model_of

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed; tests/requirements.txt brings it",
)
QUANTIZATIONS = ("nf4", "nf4-double", "int8")
BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 1000,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 128,
    "d_ff": 256,
    "d_kv": 32,
    "num_heads": 4,
    "num_layers": 2,
    "vocab_size": 1000,
}
OLMO = {**LLAMA, "model_type": "olmo", "architectures": ["OlmoForCausalLM"], "tie_word_embeddings": True}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def setup_of(config: dict[str, Any], quantization: Any = "nf4", **training: Any) -> Setup:
    values = {"seq_len": 64, "precision": "bf16", **training}
    return Setup(
        model=model_of(config), method=QLoRA(quantization=quantization), training=Training(**values), gpu="t4"
    )


@pytest.mark.parametrize("precision", ["fp32", "textbook"])
def test_a_precision_that_bitsandbytes_does_not_compute_in_is_refused(precision: str) -> None:
    with pytest.raises(SetupError, match="choose bf16, fp16, bf16-mixed, fp16-mixed"):
        setup_of(LLAMA, precision=precision)


@pytest.mark.parametrize("attention", ["flash", "cudnn"])
def test_a_16_bit_attention_kernel_needs_autocast(attention: str) -> None:
    with pytest.raises(SetupError, match="attends in fp32; choose bf16-mixed"):
        setup_of(LLAMA, attention=attention)
    mixed = setup_of(LLAMA, precision="bf16-mixed")
    assert mixed.replace(attention=attention, gpu="a100-40gb").training.attention == attention


def test_linear_layers_of_a_class_of_their_own_are_not_quantized() -> None:
    with pytest.raises(SetupError, match=r"nothing to quantize in tiiuae/falcon-7b.*choose lora"):
        Setup(model="tiiuae/falcon-7b", method=QLoRA())


def test_an_unknown_quantization_and_trained_biases_are_refused() -> None:
    with pytest.raises(SetupError, match="quantization must be one of nf4, nf4-double, int8, got 'fp4'"):
        QLoRA(quantization="fp4")  # type: ignore[arg-type]
    with pytest.raises(SetupError, match="use lora_bias none"):
        Setup(model=model_of(GPT2), method=QLoRA(lora_bias="all"))


def test_without_bitsandbytes_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install -r requirements-qlora\.txt") as refused:
        simulate(setup_of(LLAMA))
    assert "\n" not in str(refused.value)


def test_a_setup_survives_its_flat_form() -> None:
    setup = setup_of(LLAMA, "nf4-double")
    assert setup.to_dict()["quantization"] == "nf4-double"
    assert Setup.from_dict(setup.to_dict()) == setup
    with pytest.raises(SetupError, match="quantization does not belong to method lora"):
        Setup.from_dict({**setup.to_dict(), "method": "lora"})


def test_the_estimate_knows_every_part() -> None:
    report = estimate(setup_of(LLAMA))
    assert (report.not_known, report.notes) == ((), ())
    assert min(report.parts.base_weights, report.parts.activations, report.parts.logits_and_loss) > 0


def kept_bytes(net: torch.nn.Module) -> int:
    """Bytes of all parameters and of what bitsandbytes keeps beside them."""
    total = 0
    for parameter in net.parameters():
        total += parameter.numel() * parameter.element_size()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors = [state.absmax, state.code]
            if state.nested:
                tensors += [state.offset, state.state2.absmax, state.state2.code]
            total += sum(t.numel() * t.element_size() for t in tensors)
        if (scales := getattr(parameter, "SCB", None)) is not None:
            total += scales.numel() * scales.element_size()
    return total


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    "config", [LLAMA, QWEN2, OLMO, GPT2, MIXTRAL, BERT, T5], ids=lambda c: c["model_type"]
)
def test_the_formulas_count_every_byte_that_is_kept(config: dict[str, Any], quantization: str) -> None:
    setup = setup_of(config, quantization)
    run = TrainingRun(setup, torch.device("meta"), lambda _name, _step: nullcontext())
    run._load()
    assert isinstance(setup.method, QLoRA)
    packed = quantized_tensors(setup.model)
    kept = sum(sum(kept_sizes(t, setup.method.quantization)) * t.count for t in packed)
    rest = setup.model.parameters - sum(t.parameters for t in packed)
    assert kept + 4 * rest == kept_bytes(run.net)
    assert sum(quantize.parameter_count(p) for p in run.net.parameters()) == setup.model.parameters


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_simulated_step_counts_the_parameters_of_lora(quantization: str) -> None:
    setup = setup_of(LLAMA, quantization)
    plain = Setup(model=setup.model, method=LoRA(), training=setup.training, gpu="t4")
    report = simulate(setup)
    assert report.parameters == estimate(setup).parameters == estimate(plain).parameters
    assert report.notes
    assert report.provenance["bitsandbytes"]
    loaded = report.phases[0].allocated_bytes
    assert abs(loaded - estimate(setup).parts.base_weights) < 64 * 1024
    assert loaded < simulate(plain).phases[0].allocated_bytes * (1.5 if quantization == "int8" else 1)


@needs_bitsandbytes
def test_int8_keeps_the_inputs_that_checkpointing_would_drop() -> None:
    """bitsandbytes, autograd/_functions.py: MatMul8bitLt keeps its input on ctx, where no hook sees it.

    Inputs of q, k and v, of o, of gate and up, of down: fp32, in both layers.
    """
    packed, wide = (
        simulate(setup_of(LLAMA, quantization, activation_checkpointing=True, seq_len=2048)).parts.activations
        for quantization in ("nf4", "int8")
    )
    assert wide - packed == 2 * 2048 * (3 * LLAMA["hidden_size"] + LLAMA["intermediate_size"]) * 4


@needs_bitsandbytes
@pytest.mark.parametrize("quantization", ["nf4", "nf4-double"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_step_trains_the_adapters_alone(quantization: str, checkpointing: bool) -> None:
    setup = setup_of(LLAMA, quantization, activation_checkpointing=checkpointing)
    run = TrainingRun(setup, torch.device("cpu"), lambda _name, _step: nullcontext(), autocast=no_autocast)
    run.prepare()
    before = {name: p.detach().clone() for name, p in run.net.named_parameters()}
    run.step(1)
    run.step(2)
    changed = {name for name, p in run.net.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert all(p.dtype == torch.float32 for p in run.trained)
    assert sum(p.numel() for p in run.trained) == estimate(setup).parameters.trainable


@needs_bitsandbytes
@pytest.mark.parametrize(("rows", "weight_bytes"), [(4, 0), (5, 256 * 512 * 2)])
def test_a_product_holds_the_whole_weight_dequantized_but_for_few_rows(rows: int, weight_bytes: int) -> None:
    """bitsandbytes, backends/cuda/ops.py: _GEMM_4BIT_CUSTOM_FLOOR_M is 4, then _dequant_linear_fallback."""
    import bitsandbytes  # noqa: F401

    simulation = Simulation()
    with simulation.device(), torch.device("meta"):
        packed = torch.empty(256 * 512 // 2, 1, dtype=torch.uint8)
        absmax = torch.empty(256 * 512 // 64)
        inputs = torch.empty(rows, 512, dtype=torch.bfloat16)
        before = simulation.allocator.allocated_bytes
        simulation.allocator.reset_peak()
        out = torch.ops.bitsandbytes.gemm_4bit.default(inputs, packed, [256, 512], absmax, 64, "nf4")
    workspace = simulation.tracer.workspaces.cublas_bytes if weight_bytes else 0
    needed = out.numel() * 2 + weight_bytes + workspace
    assert simulation.allocator.peak_allocated_bytes - before == needed
