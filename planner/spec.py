"""What is asked: a model, a method, the training and a GPU, frozen and validated.

Every field has one spelling everywhere: here, as a command-line flag, as a JSON key, in the URL.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from planner.attention import HALF_ONLY, Attention, check_attention, check_kernel
from planner.batching import Batching, check_batch, check_batching
from planner.catalog.gpus import Gpu, gpu as gpu_named
from planner.checkpointing import check_checkpointing
from planner.checks import choice, number, whole
from planner.errors import SetupError, nearest
from planner.liger import Kernels
from planner.losses import NOT_COVERED, Loop, Loss, check_loss, check_step
from planner.method_checks import check_method, check_qlora
from planner.methods import (
    METHODS,
    Adapter,
    BitFit,
    FullFineTuning,
    LoRA,
    Method,
    PeftConfig,
    PeftOfSize,
    QLoRA,
)
from planner.model import Model
from planner.optimizers import Optimizer, ZeroGrad, check_optimizer
from planner.sharding import Sharding, check_sharding
from planner.targets import PRESETS

__all__ = [
    "METHODS",
    "Adapter",
    "BitFit",
    "FullFineTuning",
    "LoRA",
    "Method",
    "PeftConfig",
    "PeftOfSize",
    "QLoRA",
    "Setup",
    "Sharding",
    "Training",
]

Precision = Literal["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed", "textbook"]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one optimizer step is run. `b` = micro_batch_size, `s` = seq_len.

    `precision` is a recipe: `fp32`, `bf16` and `fp16` keep weights, gradients and AdamW's states in that
    type; `bf16-mixed` and `fp16-mixed` keep fp32 weights under autocast; `textbook` is 16-bit weights
    and gradients with fp32 states (2 + 2 + 8 bytes a parameter). `optimizer` `adamw` is
    torch.optim.AdamW's own default on CUDA (foreach), `adamw-single` its loop over single tensors; `-8bit`
    and `-32bit` are bitsandbytes', `adafactor` transformers' (fixed learning rate), all as in HF Trainer.
    `activation_checkpointing` makes every `checkpoint_every`-th layer again from its input, which waits on
    the host under `checkpoint_offload`. `attention` `sdpa` is torch's choice. `zero_grad` `zero` is
    zero_grad(set_to_none=False): gradients stay. `loop` `plain` holds the logits to the end of the step, HF's
    `trainer` does not; `loss` `chunked` has few, `liger` is liger_kernel's fused loss, `kernels` `liger` its
    norms, gated activations, rotary positions.
    `batching`: samples all of `seq_len` tokens, `padded` to it with a mask, or `packed` into a row [1, b s].
    """

    micro_batch_size: int = 1
    seq_len: int = 512
    gradient_accumulation_steps: int = 1
    precision: Precision = "bf16"
    optimizer: Optimizer = "adamw"
    activation_checkpointing: bool = False
    checkpoint_every: int = 1
    checkpoint_offload: bool = False
    attention: Attention = "sdpa"
    clip_grad_norm: float | None = None
    zero_grad: ZeroGrad = "none"
    loop: Loop = "plain"
    loss: Loss = "full"
    kernels: Kernels = "torch"
    batching: Batching = "full"

    def __post_init__(self) -> None:
        """Refuse what no run could use. Raises SetupError."""
        for name in ("micro_batch_size", "seq_len", "gradient_accumulation_steps"):
            whole(name, getattr(self, name))
        choice("precision", self.precision, get_args(Precision))
        choice("optimizer", self.optimizer, get_args(Optimizer))
        choice("attention", self.attention, get_args(Attention))
        choice("zero_grad", self.zero_grad, get_args(ZeroGrad))
        check_step(self)
        check_batch(self)
        check_checkpointing(self)
        if self.clip_grad_norm is not None:
            number("clip_grad_norm", self.clip_grad_norm, low=0.0, low_allowed=False)
        check_optimizer(self)
        if self.attention in HALF_ONLY and self.precision == "fp32":
            raise SetupError(
                f"attention {self.attention} needs a 16-bit precision, got fp32; "
                "choose bf16 or bf16-mixed, or attention sdpa, efficient or eager."
            )


@dataclass(frozen=True, init=False)
class Setup:
    """One fine-tuning run to be planned.

    `model` is a Model, or a name to resolve (catalogue, Hugging Face id, path, params:7e9); `gpu` a Gpu,
    a name or a size such as "24GiB"; `sharding` says how several of them share the run. Raises
    SetupError for a combination that makes no sense.
    """

    model: Model
    method: Method = field(default_factory=FullFineTuning)
    training: Training = field(default_factory=Training)
    gpu: Gpu | None = None
    sharding: Sharding = field(default_factory=Sharding)

    def __init__(
        self,
        *,
        model: Model | str,
        method: Method | None = None,
        training: Training | None = None,
        gpu: Gpu | str | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        """Resolve names and validate."""
        if isinstance(model, str):
            from planner.catalog.resolve import resolve

            model = resolve(model)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "method", method or FullFineTuning())
        object.__setattr__(self, "training", training or Training())
        object.__setattr__(self, "gpu", gpu_named(gpu) if isinstance(gpu, str) else gpu)
        object.__setattr__(self, "sharding", sharding or Sharding())
        check_method(self.model, self.method)
        _check_training(self.model, self.method, self.training)
        check_loss(self.training, self.model, self.method, shared=self.sharding.is_distributed)
        check_batching(self.model, self.method, self.training)
        if isinstance(self.method, QLoRA):
            check_qlora(self.model, self.method, self.training)
        check_sharding(self.sharding, self.model, self.method, self.training)
        check_kernel(self.model, self.method, self.training, self.gpu)

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON values under the field names; `from_dict` gives an equal setup.

        A model that is not in the catalogue carries its `model_config` along.
        """
        from planner import catalog

        flat: dict[str, Any] = {"model": self.model.id}
        if self.model.config_json and self.model.id not in catalog.models():
            flat["model_config"] = self.model.config
        flat["method"] = self.method.name
        shared = () if self.sharding == Sharding() else (self.sharding,)  # one GPU says nothing of it
        for part in (self.method, self.training, *shared):
            for item in dataclasses.fields(part):
                key = item.name.removesuffix("_json")
                flat[key] = _json_value(item.name, getattr(part, item.name))
        if self.gpu is not None:
            flat["gpu"] = self.gpu.name
        return flat

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> Setup:
        """A setup from flat keys; missing keys take their defaults. Raises SetupError."""
        values = dict(flat)
        text = values.pop("model", None)
        if not isinstance(text, str) or not text:
            raise SetupError("model is missing; give a model's id, a path to a config.json, or params:7e9.")
        config = values.pop("model_config", None)
        if config is not None:
            from planner.catalog.resolve import resolve

            model: Model | str = resolve(text, config_text=json.dumps(config))
        else:
            model = text
        gpu = values.pop("gpu", None)
        method = _method(values)
        training = Training(**_taken(Training, values))
        sharding = Sharding(**_taken(Sharding, values))
        if values:
            key = next(iter(values))
            raise SetupError(NOT_COVERED.get(key) or f"unknown setting {key!r}; {nearest(key, _all_keys())}")
        return cls(model=model, method=method, training=training, gpu=gpu, sharding=sharding)

    def replace(self, **changes: Any) -> Setup:
        """The same setup with flat keys changed: `setup.replace(micro_batch_size=2)`."""
        flat = {f.name for f in dataclasses.fields(self.training)}
        training = dataclasses.replace(self.training, **{k: v for k, v in changes.items() if k in flat})
        own = {f.name for f in dataclasses.fields(self.method)}
        method = changes.get("method") or dataclasses.replace(
            self.method, **{k: v for k, v in changes.items() if k in own}
        )
        shared = {f.name for f in dataclasses.fields(self.sharding)}
        sharding = dataclasses.replace(self.sharding, **{k: v for k, v in changes.items() if k in shared})
        unknown = set(changes) - flat - own - shared - {"model", "method", "gpu"}
        if unknown:
            raise SetupError(f"unknown setting {min(unknown)!r}; {nearest(min(unknown), _all_keys())}")
        return Setup(
            model=changes.get("model", self.model),
            method=method,
            training=training,
            gpu=changes.get("gpu", self.gpu),
            sharding=sharding,
        )


def _taken(cls: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Take the keys of one class's fields out of `values`."""
    return {f.name: values.pop(f.name) for f in dataclasses.fields(cls) if f.name in values}


def _method(values: dict[str, Any]) -> Method:
    """Take the method's keys out of `values` and build it."""
    name = values.pop("method", None) or ("peft" if "trainable_params" in values else "full")
    if name == "peft" and "peft_config" in values:
        return PeftConfig(peft_config_json=json.dumps(values.pop("peft_config")))
    if not isinstance(name, str) or name not in METHODS:
        raise SetupError(f"unknown method {name!r}; {nearest(str(name), METHODS)}")
    if values.get("trainable_params") is not None:
        name = "peft"
    cls = METHODS[name]
    fields = {f.name for f in dataclasses.fields(cls)}
    if name == "peft" and values.get("trainable_params") is None:
        raise SetupError(
            "method peft needs trainable_params, such as 4e6, or an adapter_config.json as peft:PATH."
        )
    foreign = {f.name for other in METHODS.values() for f in dataclasses.fields(other)} - fields
    for key in sorted(foreign & set(values)):
        raise SetupError(f"{key} does not belong to method {name}; leave it out or choose another method.")
    return cls(**{key: values.pop(key) for key in sorted(fields & set(values))})


def _check_training(model: Model, method: Method, training: Training) -> None:
    if model.max_positions is not None and training.seq_len > model.max_positions:
        raise SetupError(
            f"seq_len {training.seq_len:,} is beyond the {model.max_positions:,} positions of {model.id}; "
            f"give at most {model.max_positions}."
        )
    check_attention(model, training, trains_all=isinstance(method, FullFineTuning))


def _json_value(name: str, value: Any) -> Any:
    if name == "peft_config_json":
        return json.loads(value)
    if name == "target_modules":
        return value[0] if len(value) == 1 and value[0] in PRESETS else list(value)
    return value


def _all_keys() -> set[str]:
    classes = (Training, Sharding, *METHODS.values())
    own = {"model", "method", "gpu", "peft_config"}
    return own | {f.name for cls in classes for f in dataclasses.fields(cls)}
