"""Setups of the cross-check for how the step is written: its loop, its loss, its padding."""

from __future__ import annotations

from typing import Any

from planner.spec import FullFineTuning, LoRA, Method

__all__ = ["STEP_CASES"]

FULL = FullFineTuning()
LORA = LoRA(lora_rank=16, target_modules=("attention",))

LLAMA = "meta-llama/Llama-3.2-1B"
QWEN2 = "Qwen/Qwen2.5-0.5B"
BERT = "google-bert/bert-large-uncased"

Case = tuple[str, Method, dict[str, Any]]
TRAINER = {"micro_batch_size": 4, "seq_len": 512, "loop": "trainer"}

STEP_CASES: list[Case] = [
    # HF Trainer's loop, which gives the logits up before the backward pass
    *[(model, method, TRAINER) for model in (LLAMA, BERT) for method in (FULL, LORA)],
    (LLAMA, FULL, {**TRAINER, "gradient_accumulation_steps": 3}),
    (QWEN2, LORA, {**TRAINER, "activation_checkpointing": True}),
    (QWEN2, FULL, {**TRAINER, "precision": "bf16-mixed"}),
]
