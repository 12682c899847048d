"""The planner's own LoRA in place of peft's: the same parameters, and the same memory to the byte."""

from __future__ import annotations

import pytest

from planner.errors import SetupError
from planner.simulate.run import simulate
from planner.spec import LoRA, QLoRA, Setup, Training
from planner.training.attach import attached
from planner.training.build import skeleton
from planner.training.peft import LoRALayer
from planner.training.recipe import weight_dtype
from tests.estimate.shapes import shortened

MODEL = shortened("Qwen/Qwen2.5-0.5B", layers=2)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_own_lora_takes_what_peft_s_takes(checkpointed: bool) -> None:
    training = Training(micro_batch_size=2, seq_len=256, activation_checkpointing=checkpointed)
    setup = Setup(model=MODEL, method=LoRA(target_modules=("q_proj", "v_proj")), training=training)
    theirs, ours = simulate(setup), simulate(setup, own_lora=True)
    assert ours.parameters == theirs.parameters
    assert ours.peak_allocated_bytes == theirs.peak_allocated_bytes
    assert ours.parts == theirs.parts


def test_own_lora_is_really_ours() -> None:
    net = attached(skeleton(MODEL, dtype=weight_dtype("bf16")), MODEL, LoRA(), own_lora=True)
    assert any(isinstance(module, LoRALayer) for module in net.modules())


def test_quantized_layers_are_refused() -> None:
    with pytest.raises(SetupError, match="own_lora does not take quantized layers"):
        attached(skeleton(MODEL, dtype=weight_dtype("bf16")), MODEL, QLoRA(), own_lora=True)
