"""Setups as lines of text: whole models, and the settings crossed with each other.

`model method BxS settings`: settings are words of `WORDS`, or `name=value` of Training or the GPU. A
model marked `*` keeps all its layers; the others are cut to three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner import catalog
from planner.model import Model
from planner.spec import Adapter, BitFit, FullFineTuning, LoRA, Method, QLoRA, Setup, Training

from .shapes import shortened

__all__ = ["METHODS", "VARIED", "WORDS", "Varied", "model_named"]

METHODS: dict[str, Method] = {
    "full": FullFineTuning(),
    "lora": LoRA(lora_rank=16, target_modules=("attention",)),
    "all-linear": LoRA(lora_rank=8, target_modules=("all-linear",), lora_dropout=0.05),
    "wide-lora": LoRA(lora_rank=64, target_modules=("all-linear",)),
    "lora+bias": LoRA(lora_rank=8, target_modules=("attention",), lora_bias="all"),
    "houlsby": Adapter(adapter_kind="houlsby"),
    "pfeiffer": Adapter(adapter_kind="pfeiffer", adapter_reduction_factor=16),
    "bitfit": BitFit(),
    "int8": QLoRA(lora_rank=8, quantization="int8", target_modules=("all-linear",)),
    "nf4": QLoRA(lora_rank=8, target_modules=("all-linear",), lora_dropout=0.05),
}
OPTIMIZERS = ("adamw-fused", "adamw-single", "sgd", "sgd-momentum", "adafactor")
WORDS: dict[str, dict[str, Any]] = {
    **{name: {"precision": name} for name in ("bf16", "fp32", "fp16", "bf16-mixed", "fp16-mixed")},
    **{name: {"attention": name} for name in ("eager", "efficient", "flash", "cudnn")},
    **{name: {"optimizer": name} for name in OPTIMIZERS},
    "checkpointed": {"activation_checkpointing": True},
    "chunked": {"loss": "chunked"},
    "trainer": {"loop": "trainer"},
    "clipped": {"clip_grad_norm": 1.0},
    "zeroed": {"zero_grad": "zero"},
    **{f"x{steps}": {"gradient_accumulation_steps": steps} for steps in (2, 3, 4, 8)},
}
LINES = """
gpt2* full 4x512
gpt2* all-linear 8x1024 bf16-mixed checkpointed clipped
pythia-70m* full 8x512 fp16-mixed adamw-fused x2
pythia-160m* lora 4x1024 fp16 gpu=t4
opt-125m* full 2x1024 fp32 sgd-momentum
opt-350m* wide-lora 4x256 efficient
bloom-560m* lora 1x512 adamw-fused
Qwen2.5-0.5B* full 1x1024 clipped
Qwen2.5-0.5B* bitfit 4x512 x4
Qwen3-0.6B* all-linear 2x1024 gpu=h100
SmolLM2-135M* full 4x1024 adafactor
SmolLM2-135M* pfeiffer 8x512 bf16-mixed x2
SmolLM2-360M* wide-lora 2x2048 checkpointed gpu=rtx-4090
gemma-3-270m* full 1x2048 adamw-single
gemma-3-270m* lora 2x512 eager
bert-base-uncased* full 16x128 fp16-mixed clipped
bert-base-uncased* houlsby 8x384 gpu=v100-16gb fp16
roberta-base* all-linear 8x256 bf16-mixed
distilbert-base-uncased* full 32x128 zeroed
distilgpt2* lora+bias 4x300 x3
gpt-neox-20b lora 8x128 adamw-fused
gpt-neox-20b full 1x512 bf16-mixed sgd
gpt-neox-20b pfeiffer 6x77 fp16-mixed checkpointed
Mixtral-8x7B-v0.1 wide-lora 2x128 adamw-fused
Mixtral-8x7B-v0.1 wide-lora 4x512 checkpointed
Mixtral-8x7B-v0.1 wide-lora 2x256 fp32 sgd
Mixtral-8x22B-v0.1 wide-lora 6x77 fp16-mixed clipped
Qwen3-30B-A3B wide-lora 2x512
Qwen3-235B-A22B wide-lora 1x512 bf16-mixed adamw-fused
OLMo-2-1124-13B all-linear 4x1024 gpu=v100-32gb x4
phi-2 houlsby 2x1000 gpu=v100-32gb sgd
gpt2-large lora 2x512 gpu=v100-32gb
stablelm-2-1_6b all-linear 3x300 gpu=t4 x4
SmolLM2-1.7B pfeiffer 1x4096 bf16-mixed gpu=t4 checkpointed x4
Qwen3-4B wide-lora 2x1000 bf16-mixed gpu=v100-32gb
Llama-3.1-70B all-linear 1x2048 gpu=h200 checkpointed
Llama-3.1-8B full 2x512 cudnn adamw-fused x2 clipped
Llama-3.3-70B-Instruct nf4 2x2048 checkpointed
CodeLlama-34b-hf wide-lora 1x4096 flash gpu=a100-80gb
Yi-34B lora 3x300 efficient x2
Falcon3-7B-Base houlsby 2x1000 fp16-mixed
Ministral-8B-Instruct-2410 lora 1x4096 gpu=b200
Mistral-Nemo-Instruct-2407 all-linear 2x512 cudnn gpu=h100
Mistral-Small-24B-Instruct-2501 pfeiffer 4x256 checkpointed zeroed
Qwen2.5-72B lora+bias 1x1024 adamw-fused
Qwen2.5-Coder-7B bitfit 6x77 fp32 clipped
Qwen3-32B full 1x64 sgd
gemma-7b wide-lora 2x512 eager bf16-mixed
gemma-2-9b all-linear 1x2048 checkpointed
gemma-2-27b full 1x512 adamw-fused x2
gemma-3-1b-it houlsby 3x300 fp32 x2
phi-1_5 wide-lora 16x64 fp16-mixed adamw-single
phi-4 lora 2x1000 flash gpu=rtx-5090
Phi-4-mini-instruct all-linear 4x256 x4 clipped
Phi-3-medium-4k-instruct full 1x1024 checkpointed sgd-momentum
pythia-12b bitfit 8x128 bf16-mixed
pythia-2.8b nf4 4x512 clipped gpu=rtx-3090
opt-66b lora 1x2048 checkpointed
opt-13b full 2x300 fp16 sgd x2
bloom-7b1 lora+bias 2x300 fp16-mixed
OLMo-7B-hf pfeiffer 4x1024 eager
OLMo-2-0325-32B wide-lora 1x1024 gpu=h200 adamw-fused
SmolLM3-3B all-linear 3x300 bf16-mixed eager x2
granite-3.1-8b-instruct houlsby 2x512 fp16 gpu=t4
granite-3.1-8b-instruct all-linear 1x2048 fp16-mixed eager checkpointed clipped
granite-3.1-2b-instruct lora 4x1024 fp32 sgd x4 gpu=a100-80gb
stablelm-3b-4e1t full 4x256 fp32 checkpointed clipped
stablelm-3b-4e1t lora 1x4096 bf16-mixed eager checkpointed
starcoder2-7b full 1x64 flash adamw-fused x2
starcoder2-15b wide-lora 2x512 checkpointed bf16-mixed
bert-large-uncased lora+bias 8x384 fp32 efficient
roberta-large bitfit 4x512 fp16-mixed x8
distilroberta-base full 16x64 bf16-mixed zeroed
Mistral-7B-v0.1 int8 1x512 fp16-mixed checkpointed x3
Mistral-7B-v0.1 int8 4x512 x2
phi-4 int8 2x512 trainer bf16-mixed x2
gemma-3-270m* lora 4x1024 efficient chunked
gemma-3-270m* lora 2x1024 eager chunked trainer
"""


@dataclass(frozen=True, kw_only=True)
class Varied:
    """One line of the table, and the setup that it says."""

    text: str

    def setup(self) -> Setup:
        """Model, method, training and GPU by their short names."""
        name, method, size, *words = self.text.split()
        batch, _, seq_len = size.partition("x")
        values: dict[str, Any] = {"micro_batch_size": int(batch), "seq_len": int(seq_len)}
        gpu = None
        for word in words:
            key, is_pair, value = word.partition("=")
            if is_pair:
                assert key == "gpu", word
                gpu = value
            else:
                values |= WORDS[word]
        return Setup(model=model_named(name), method=METHODS[method], training=Training(**values), gpu=gpu)


def model_named(name: str) -> Model:
    """The catalogue's model by the end of its name, whole or cut to three layers."""
    return catalog.model(name.removesuffix("*")) if name.endswith("*") else shortened(name)


VARIED = tuple(Varied(text=line) for line in LINES.strip().splitlines())
