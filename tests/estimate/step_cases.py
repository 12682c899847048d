"""Setups of the cross-check for how the step is written: its loop, its loss, its padding."""

from __future__ import annotations

from typing import Any

from planner.spec import Adapter, BitFit, FullFineTuning, LoRA, Method, PeftConfig, QLoRA

__all__ = ["STEP_CASES"]

FULL = FullFineTuning()
LORA = LoRA(lora_rank=16, target_modules=("attention",))

ALL_LINEAR = LoRA(lora_rank=8, target_modules=("all-linear",), lora_dropout=0.05)
HEAD = LoRA(lora_rank=8, target_modules=("q_proj", "lm_head"))
BITFIT = BitFit()
NF4 = QLoRA(lora_rank=8, target_modules=("all-linear",), lora_dropout=0.05)
HOULSBY = Adapter(adapter_kind="houlsby")
IA3 = PeftConfig(peft_config_json='{"peft_type": "IA3"}')
SAVED_HEAD = PeftConfig(
    peft_config_json='{"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}'
)

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
MISTRAL = "mistralai/Mistral-7B-v0.1"
GRANITE = "ibm-granite/granite-3.1-2b-instruct"
SMOLLM3 = "HuggingFaceTB/SmolLM3-3B"
GEMMA2 = "google/gemma-2-2b"
GEMMA3 = "google/gemma-3-1b-pt"
QWEN3_MOE = "Qwen/Qwen3-30B-A3B"
BERT = "google-bert/bert-large-uncased"

Case = tuple[str, Method, dict[str, Any]]
TRAINER = {"micro_batch_size": 4, "seq_len": 512, "loop": "trainer"}
LIGER = {"micro_batch_size": 8, "seq_len": 512, "loss": "liger"}
KERNELS = {"micro_batch_size": 4, "seq_len": 512, "kernels": "liger"}
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
    (OPT, LORA, {**TRAINER, "precision": "fp32"}),  # its 350m has no norm behind the last layer
    (GEMMA, LORA, {"micro_batch_size": 3, "seq_len": 900, "loss": "chunked"}),  # the last chunk is short
    # embeddings scaled by their own module (Gemma) or by the model (Granite), under checkpoints
    *[
        (model, LORA, {**CHUNKED, "activation_checkpointing": True, "precision": precision})
        for model in (GEMMA, GEMMA3)
        for precision in ("bf16", "bf16-mixed")
    ],
    (GRANITE, LORA, {"micro_batch_size": 8, "seq_len": 512, "activation_checkpointing": True}),
    # checkpoints of some layers, and their inputs on the host
    *[
        (model, method, {**TRAINER, "activation_checkpointing": True, **more})
        for model, method, more in (
            (LLAMA, LORA, {"checkpoint_offload": True, "seq_len": 2048}),
            (LLAMA, FULL, {"checkpoint_offload": True, "loop": "plain"}),
            (LLAMA, FULL, {"checkpoint_every": 2}),
            (QWEN2, NF4, {"checkpoint_offload": True, "precision": "bf16-mixed"}),
            (QWEN3, ALL_LINEAR, {"checkpoint_every": 3, "checkpoint_offload": True}),
            (GEMMA, LORA, {"checkpoint_offload": True, "precision": "bf16-mixed", "loss": "chunked"}),
            (NEOX, FULL, {"checkpoint_every": 2, "precision": "fp16-mixed"}),
            (PHI, BITFIT, {"checkpoint_every": 2, "checkpoint_offload": True}),
            (GPT2, LORA, {"checkpoint_offload": True, "attention": "eager", "precision": "bf16-mixed"}),
            (BERT, ALL_LINEAR, {"checkpoint_offload": True, "batching": "padded"}),
            (QWEN3_MOE, LORA, {"checkpoint_offload": True, "checkpoint_every": 2}),
            (OLMO2, Adapter(), {"checkpoint_offload": True, "gradient_accumulation_steps": 2}),
        )
    ],
    ("facebook/opt-350m", LORA, {**CHUNKED, "precision": "bf16-mixed", "activation_checkpointing": True}),
    # gradients of a product of two types, in the wider one; what a module is given, while its hook runs
    (PHI, LORA, {**CHUNKED, "precision": "fp16-mixed", "activation_checkpointing": True}),
    *[(model, Adapter(), {**LIGER, "activation_checkpointing": True}) for model in (MISTRAL, PHI3)],
    # an autograd function of Liger's is run to its end before a checkpoint's recomputation stops
    (LLAMA, QLoRA(), {**LIGER, **KERNELS, "precision": "bf16-mixed", "activation_checkpointing": True}),
    # Liger's loss: both gradients of the head made in the forward pass, logits of some tokens in one tensor
    *[
        (model, method, LIGER)
        for model in (LLAMA, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, SMOLLM3)
        for method in (FULL, ALL_LINEAR)
    ],
    (QWEN2, BITFIT, LIGER),
    (LLAMA, SAVED_HEAD, LIGER),
    (LLAMA, NF4, LIGER),
    (QWEN3_MOE, LORA, {**LIGER, "optimizer": "sgd"}),
    *[
        (model, method, {**LIGER, "precision": precision})
        for model, method, precision in (
            (QWEN2, FULL, "bf16-mixed"),
            (QWEN2, FULL, "fp32"),
            (LLAMA, LORA, "bf16-mixed"),
            (GEMMA3, FULL, "fp16-mixed"),
            (LLAMA, NF4, "bf16-mixed"),
            (QWEN3, LORA, "fp32"),
        )
    ],
    # where the head's product is the peak: short of memory elsewhere, large vocabularies
    *[
        (model, method, {**LIGER, "activation_checkpointing": True, **more})
        for model, method, more in (
            (LLAMA, FULL, {}),
            (GEMMA3, LORA, {"micro_batch_size": 1}),
            (GEMMA3, FULL, {"precision": "bf16-mixed"}),
            (QWEN2, LORA, {"precision": "fp16-mixed"}),
            (QWEN2, FULL, {"precision": "fp32", "optimizer": "sgd"}),
        )
    ],
    *[
        (model, method, {**LIGER, "loop": "trainer", **more})
        for model, method, more in (
            (LLAMA, FULL, {"gradient_accumulation_steps": 2}),
            (MISTRAL, FULL, {"gradient_accumulation_steps": 3, "optimizer": "sgd"}),
            (QWEN2, LORA, {"activation_checkpointing": True}),
            (QWEN2, FULL, {"gradient_accumulation_steps": 2, "precision": "bf16-mixed"}),
        )
    ],
    # summed in place from capability 8.0 on, by a product and a copy before it
    *[
        (model, FULL, {**LIGER, "gpu": gpu, "precision": precision, "optimizer": "sgd"})
        for model in (LLAMA, GEMMA3)
        for gpu, precision in (("t4", "fp16"), ("t4", "fp16-mixed"), ("h200", "bf16"), ("h200", "bf16-mixed"))
    ],
    (LLAMA, FULL, {**LIGER, "micro_batch_size": 1, "seq_len": 20, "loop": "trainer"}),  # one token a chunk
    (GEMMA, LORA, {**LIGER, "micro_batch_size": 3, "seq_len": 900}),  # the last chunk is short
    # Liger's norms, activations and rotary positions; with its loss what use_liger_kernel switches on
    *[
        (model, method, {**LIGER, "kernels": "liger"})
        for model in (LLAMA, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, SMOLLM3)
        for method in (FULL, ALL_LINEAR)
    ],
    *[(GRANITE, method, KERNELS) for method in (FULL, LORA)],
    *[(LLAMA, method, KERNELS) for method in (FULL, HOULSBY, IA3, NF4)],
    (QWEN2, BITFIT, KERNELS),
    *[
        (model, method, {**KERNELS, **more})
        for model in (QWEN3, GEMMA3, PHI3, OLMO2)
        for method, more in (
            (FULL, {"precision": "bf16-mixed"}),
            (LORA, {"precision": "bf16-mixed"}),
            (FULL, {"attention": "eager"}),
            (LORA, {"attention": "efficient"}),
            (FULL, {"activation_checkpointing": True, "loss": "liger", "optimizer": "sgd"}),
            (LORA, {"activation_checkpointing": True, "loss": "liger"}),
        )
    ],
    *[
        (LLAMA, method, {**KERNELS, **more})
        for method, more in (
            (FULL, {"precision": "fp32", "optimizer": "sgd"}),
            (LORA, {"precision": "fp32"}),
            (FULL, {"precision": "fp16", "gpu": "t4"}),
            (FULL, {"gpu": "h200"}),
            (FULL, {"batching": "padded"}),
            (LORA, {"batching": "packed", "attention": "flash"}),
            (NF4, {"precision": "bf16-mixed"}),
            (LORA, {"loop": "trainer", "gradient_accumulation_steps": 2, "loss": "liger"}),
        )
    ],
]
