"""Setups of the cross-check for samples of different length, padded or packed into one row."""

from __future__ import annotations

from typing import Any

from planner.spec import BitFit, FullFineTuning, LoRA, Method, QLoRA

__all__ = ["BATCH_CASES"]

FULL, BITFIT = FullFineTuning(), BitFit()
LORA = LoRA(lora_rank=16, target_modules=("attention",))
ALL_LINEAR = LoRA(lora_rank=8, target_modules=("all-linear",), lora_dropout=0.05)
NF4 = QLoRA(lora_rank=8, target_modules=("all-linear",), lora_dropout=0.05)

LLAMA = "meta-llama/Llama-3.2-1B"
QWEN2 = "Qwen/Qwen2.5-0.5B"
QWEN3 = "Qwen/Qwen3-0.6B"
MISTRAL = "mistralai/Mistral-7B-v0.1"
GEMMA = "google/gemma-2b"
GEMMA2 = "google/gemma-2-2b"
GEMMA3 = "google/gemma-3-1b-pt"
PHI3 = "microsoft/Phi-3-mini-4k-instruct"
NEOX = "EleutherAI/pythia-410m"
GPT2 = "openai-community/gpt2-medium"
OPT = "facebook/opt-125m"
BLOOM = "bigscience/bloom-560m"
BERT = "google-bert/bert-large-uncased"
ROBERTA = "FacebookAI/roberta-large"
FALCON = "tiiuae/falcon-7b"
SMOLLM2 = "HuggingFaceTB/SmolLM2-360M"
MIXTRAL = "mistralai/Mixtral-8x7B-v0.1"

PADDED: dict[str, Any] = {"micro_batch_size": 4, "seq_len": 512, "batching": "padded"}
PACKED: dict[str, Any] = {**PADDED, "batching": "packed"}
CHECKPOINTED = {"activation_checkpointing": True}
SEVERAL: dict[str, Any] = {"gradient_accumulation_steps": 3}
LONG: dict[str, Any] = {"micro_batch_size": 8, "seq_len": 2048, "loss": "chunked", **CHECKPOINTED}

Case = tuple[str, Method, dict[str, Any]]
BATCH_CASES: list[Case] = [
    # padded: a mask for the whole batch, and with it no flash attention
    *[
        (model, method, {**PADDED, "attention": attention})
        for model, method in ((LLAMA, FULL), (QWEN3, LORA), (GPT2, ALL_LINEAR))
        for attention in ("sdpa", "eager")
    ],
    (LLAMA, LORA, {**PADDED, "attention": "efficient"}),
    *[(model, method, PADDED) for model in (BERT, ROBERTA) for method in (FULL, LORA)],
    (BERT, FULL, {**PADDED, "attention": "eager", "precision": "bf16-mixed"}),
    (BERT, BITFIT, {**PADDED, **CHECKPOINTED, "micro_batch_size": 16}),
    *[(model, LORA, PADDED) for model in (OPT, BLOOM, FALCON, GEMMA2, GEMMA3)],
    *[(FALCON, FULL, {**PADDED, "optimizer": "sgd", "attention": name}) for name in ("sdpa", "eager")],
    (MISTRAL, LORA, {**PADDED, "micro_batch_size": 2, "seq_len": 6144, **CHECKPOINTED}),
    (LLAMA, FULL, {**PADDED, "seq_len": 500, "loop": "trainer", "loss": "chunked"}),  # no multiple of 16
    (LLAMA, FULL, {**PADDED, "precision": "bf16-mixed", **SEVERAL}),
    (NEOX, FULL, {**PADDED, "precision": "fp32", "micro_batch_size": 1}),
    (QWEN3, NF4, {**PADDED, "precision": "bf16-mixed"}),
    *[(LLAMA, LORA, {**PADDED, "gpu": gpu}) for gpu in ("h200", "rtx 4090")],
    *[(model, LORA, {**PADDED, "gpu": "t4", "precision": "fp16"}) for model in (LLAMA, NEOX)],
    # padded under FlashAttention-2: the padding is taken out before the kernel and put back behind it
    *[
        (model, method, {**PADDED, "attention": "flash"})
        for model in (LLAMA, QWEN3, NEOX, GPT2, PHI3, BERT)
        for method in (FULL, LORA)
    ],
    *[(model, ALL_LINEAR, {**PADDED, "attention": "flash"}) for model in (OPT, ROBERTA)],
    (NEOX, LORA, {**PADDED, "micro_batch_size": 1, "attention": "flash", "gpu": "h200"}),
    (MISTRAL, NF4, {**PADDED, "attention": "flash", "precision": "bf16-mixed", **SEVERAL}),
    (MIXTRAL, LORA, {**PADDED, "attention": "flash", "optimizer": "sgd", **CHECKPOINTED}),
    (QWEN3, FULL, {**PADDED, "attention": "flash", "precision": "bf16-mixed", "loop": "trainer"}),
    # packed: one row, one mask as wide as all samples together
    *[(model, LORA, PACKED) for model in (LLAMA, QWEN2, NEOX, GPT2, PHI3, GEMMA2, GEMMA3)],
    *[(model, FULL, {**PACKED, "attention": a}) for model in (QWEN3, NEOX) for a in ("eager", "efficient")],
    (LLAMA, ALL_LINEAR, {**PACKED, **CHECKPOINTED, "seq_len": 2048}),
    (LLAMA, LORA, {**PACKED, "micro_batch_size": 1}),  # one sample needs no mask
    (MISTRAL, NF4, {**PACKED, "precision": "bf16-mixed", **SEVERAL}),
    *[(LLAMA, LORA, {**PACKED, "gpu": gpu}) for gpu in ("h200", "rtx 4090")],
    (NEOX, LORA, {**PACKED, "gpu": "t4", "precision": "fp16"}),
    # one key head for all: a view of it is repeated, which autocast copies for each
    *[(GEMMA, method, {**PACKED, "precision": "bf16-mixed", "loss": "liger"}) for method in (LORA, NF4)],
    (GEMMA, LORA, {**PADDED, "precision": "bf16-mixed", "attention": "eager", **CHECKPOINTED}),
    # packed under FlashAttention-2, which is told where samples begin and takes no mask
    *[
        (model, method, {**PACKED, "attention": "flash"})
        for model in (LLAMA, QWEN3, NEOX, GPT2, PHI3)
        for method in (FULL, LORA)
    ],
    (OPT, ALL_LINEAR, {**PACKED, "attention": "flash"}),
    (GEMMA3, LORA, {**PACKED, "seq_len": 1500, "attention": "flash"}),
    (MIXTRAL, LORA, {**PACKED, "attention": "flash", "optimizer": "sgd", **CHECKPOINTED}),
    # a row so wide that a layer's own copy of its mask is the most of the forward pass
    (SMOLLM2, LORA, {**PACKED, **LONG, "batching": "packed", "loss": "liger", "precision": "fp32"}),
    (MISTRAL, LORA, {**PACKED, "micro_batch_size": 2, "seq_len": 6144, "attention": "flash"}),
    (QWEN3, FULL, {**PACKED, "micro_batch_size": 64, "seq_len": 64, "attention": "flash"}),
    (LLAMA, ALL_LINEAR, {**PACKED, "attention": "flash", **CHECKPOINTED, "loss": "chunked"}),
    (NEOX, FULL, {**PACKED, "attention": "flash", "precision": "bf16-mixed", **SEVERAL}),
    (QWEN3, NF4, {**PACKED, "attention": "flash", "precision": "bf16-mixed", "loop": "trainer"}),
    (LLAMA, LORA, {**PACKED, "attention": "flash", "gpu": "h200"}),
    # long rows without logits, where masks and what attention keeps are most of the peak
    (LLAMA, LORA, {**PACKED, "micro_batch_size": 8, "seq_len": 1024, "loss": "chunked"}),
    *[(LLAMA, LORA, {**batch, **LONG}) for batch in (PACKED, PADDED)],
    (LLAMA, LORA, {**PADDED, **LONG, "attention": "flash"}),
    (NEOX, FULL, {**PADDED, **LONG, "attention": "flash", "activation_checkpointing": False}),
    (LLAMA, LORA, {**PACKED, **LONG, "attention": "flash"}),
    (LLAMA, LORA, {**PACKED, **LONG, "attention": "eager", "micro_batch_size": 4}),
    (QWEN3, LORA, {**PACKED, **LONG, "attention": "flash", "micro_batch_size": 64, "seq_len": 64}),
    (MISTRAL, LORA, {**PACKED, **LONG, "micro_batch_size": 2, "seq_len": 6144}),
]
