"""Setups of the cross-check for how the step is written: its loop, its loss, its padding."""

from __future__ import annotations

from typing import Any

from planner.spec import BitFit, FullFineTuning, LoRA, Method

__all__ = ["STEP_CASES"]

FULL = FullFineTuning()
LORA = LoRA(lora_rank=16, target_modules=("attention",))

ALL_LINEAR = LoRA(lora_rank=8, target_modules=("all-linear",), lora_dropout=0.05)
HEAD = LoRA(lora_rank=8, target_modules=("q_proj", "lm_head"))
BITFIT = BitFit()

LLAMA = "meta-llama/Llama-3.2-1B"
QWEN2 = "Qwen/Qwen2.5-0.5B"
QWEN3 = "Qwen/Qwen3-0.6B"
GEMMA = "google/gemma-2b"
GPT2 = "openai-community/gpt2-medium"
NEOX = "EleutherAI/pythia-410m"
OPT = "facebook/opt-350m"
PHI = "microsoft/phi-1_5"
PHI3 = "microsoft/Phi-3-mini-4k-instruct"
OLMO2 = "allenai/OLMo-2-0425-1B"
BERT = "google-bert/bert-large-uncased"

Case = tuple[str, Method, dict[str, Any]]
TRAINER = {"micro_batch_size": 4, "seq_len": 512, "loop": "trainer"}
CHUNKED = {"micro_batch_size": 8, "seq_len": 512, "loss": "chunked"}

STEP_CASES: list[Case] = [
    # HF Trainer's loop, which gives the logits up before the backward pass
    *[(model, method, TRAINER) for model in (LLAMA, BERT) for method in (FULL, LORA)],
    (LLAMA, FULL, {**TRAINER, "gradient_accumulation_steps": 3}),
    (QWEN2, LORA, {**TRAINER, "activation_checkpointing": True}),
    (QWEN2, FULL, {**TRAINER, "precision": "bf16-mixed"}),
    # head and loss on 1,024 tokens at a time
    *[
        (model, method, CHUNKED)
        for model in (LLAMA, QWEN3, GEMMA, GPT2, NEOX, OPT, PHI, PHI3, OLMO2)
        for method in (FULL, ALL_LINEAR)
    ],
    (QWEN2, BITFIT, CHUNKED),
    (LLAMA, HEAD, CHUNKED),
    *[
        (model, method, {**CHUNKED, "precision": precision})
        for model, method, precision in (
            (QWEN2, FULL, "bf16-mixed"),
            (LLAMA, LORA, "bf16-mixed"),
            (NEOX, FULL, "fp16-mixed"),
            (GPT2, LORA, "fp32"),
        )
    ],
    *[
        (model, method, {**CHUNKED, "loop": "trainer", **more})
        for model, method, more in (
            (LLAMA, FULL, {"gradient_accumulation_steps": 2}),
            (NEOX, FULL, {"gradient_accumulation_steps": 3}),
            (QWEN2, LORA, {"activation_checkpointing": True}),
            (LLAMA, FULL, {"activation_checkpointing": True}),
            (PHI, ALL_LINEAR, {"activation_checkpointing": True, "precision": "bf16-mixed"}),
        )
    ],
    (LLAMA, FULL, {"micro_batch_size": 1, "seq_len": 700, "loss": "chunked"}),  # one chunk
    (GEMMA, LORA, {"micro_batch_size": 3, "seq_len": 900, "loss": "chunked"}),  # the last chunk is short
]
