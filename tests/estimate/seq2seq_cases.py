"""Encoder-decoder setups of the cross-check, as lines of text: whole models (`*`), then each setting.

T5's MLP is plain and its output scaled; `flan` is Flan-T5-small, gated and not scaled; `narrow` is T5-small
with a vocabulary of 512, where the layers and not the loss decide.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from planner import catalog
from planner.model import Model
from planner.spec import LoRA, Method, PeftConfig, QLoRA, Setup, Training

from . import varied_setups
from .varied_setups import Varied, model_named

__all__ = ["FLAN_T5_SMALL", "NARROW_T5", "SEQ2SEQ", "seq2seq_model"]


def _peft(kind: str, **values: Any) -> PeftConfig:
    return PeftConfig(peft_config_json=json.dumps({"peft_type": kind, **values}))


METHODS: dict[str, Method] = {
    **varied_setups.METHODS,
    "qv": LoRA(target_modules=("q", "v")),
    "cross": LoRA(target_modules=("EncDecAttention.q", "EncDecAttention.k", "EncDecAttention.v")),
    "decoder": LoRA(target_modules=("decoder.block.1.layer.0.SelfAttention.q",)),
    "int8": QLoRA(lora_rank=8, quantization="int8", target_modules=("all-linear",)),
    "ia3": _peft("IA3"),
    "ln": _peft("LN_TUNING"),
    "dora": _peft("LORA", use_dora=True, r=16, target_modules=["q", "v"]),
}
WORDS = {
    **varied_setups.WORDS,
    "trainer": {"loop": "trainer"},
    "adamw-8bit": {"optimizer": "adamw-8bit"},
    "padded": {"batching": "padded"},
}

# https://huggingface.co/google/flan-t5-small/blob/main/config.json
FLAN_T5_SMALL: dict[str, Any] = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_heads": 6,
    "num_layers": 8,
    "num_decoder_layers": 8,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}
NARROW_T5: dict[str, Any] = {
    **FLAN_T5_SMALL,
    "d_ff": 2048,
    "num_heads": 8,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "vocab_size": 512,
    "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
}

LINES = """
t5-small* full 8x512
t5-small* lora 4x512 eager
t5-small* all-linear 8x256 bf16-mixed checkpointed
t5-base* lora 8x512
t5-base* full 8x512 checkpointed adamw-fused
flan* full 4x512
flan* nf4 8x256
flan* cross 8x256 fp16
t5-large full 4x512 adafactor
t5-base full 8x512 fp16-mixed sgd
t5-3b wide-lora 2x512 fp16-mixed
t5-3b houlsby 2x512 trainer
t5-11b lora 1x512
t5-11b full 1x128 sgd
t5-small full 8x512 fp16 adamw-fused
t5-small all-linear 8x256 fp16 eager checkpointed
t5-small full 4x256 fp32 efficient clipped
t5-small full 8x256 x3 trainer
t5-small lora 8x512 gpu=h200
t5-small lora 8x512 cudnn gpu=h200
t5-small full 4x512 gpu=t4
t5-small pfeiffer 8x256 gpu=t4 fp16
t5-small nf4 8x256 bf16-mixed eager
t5-small int8 8x256 trainer
t5-small ia3 8x256 zeroed
t5-small ln 8x256
t5-small dora 8x256
t5-small decoder 8x256
t5-small qv 6x300
t5-small full 4x512 adamw-8bit
narrow full 8x256
narrow full 1x1024 eager
narrow full 1x1024 checkpointed fp16
narrow full 2x512 bf16-mixed
narrow full 1x1024 checkpointed eager bf16-mixed
narrow full 1x1024 checkpointed gpu=t4
narrow lora 2x512 checkpointed trainer
narrow lora 1x1024 checkpointed eager fp32
narrow houlsby 8x256 bf16-mixed checkpointed
narrow int8 8x256
narrow cross 4x256 cudnn gpu=h200
t5-small full 4x512 eager padded
t5-small lora 4x256 eager padded checkpointed bf16-mixed
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Line(Varied):
    """One line, read with the words and models of this file."""

    def setup(self) -> Setup:
        name, method, size, *words = self.text.split()
        batch, _, seq_len = size.partition("x")
        values: dict[str, Any] = {"micro_batch_size": int(batch), "seq_len": int(seq_len)}
        for word in words:
            values |= {"gpu": word[4:]} if word.startswith("gpu=") else WORDS[word]
        gpu = values.pop("gpu", None)
        return Setup(model=seq2seq_model(name), method=METHODS[method], training=Training(**values), gpu=gpu)


def seq2seq_model(name: str) -> Model:
    """`flan*` and `narrow` by their configurations, others from the catalogue, cut without `*`."""
    configs = {"flan*": FLAN_T5_SMALL, "narrow": NARROW_T5}
    if name in configs:
        return catalog.model_from_config(configs[name], id=name, source="test", task="seq2seq-lm")
    return model_named(name)


SEQ2SEQ: tuple[Varied, ...] = tuple(_Line(text=line) for line in LINES.strip().splitlines())
