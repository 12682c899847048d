"""What is asked: a model, a method, the training and a GPU, frozen and validated.

Every field has one spelling everywhere: here, as a command-line flag, as a JSON key, in the URL.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from planner.batching import Batching, check_batch, check_batching
from planner.catalog.gpus import Gpu, gpu as gpu_named
from planner.checks import choice, number, whole
from planner.errors import SetupError, nearest
from planner.kernels import HALF_ONLY, Attention, check_attention
from planner.liger import Kernels
from planner.losses import NOT_COVERED, Loop, Loss, check_loss, check_step
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
from planner.targets import PRESETS, adapter_places, adapts_experts, bias_tensors, lora_targets

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

_QLORA_PRECISIONS = ("bf16", "fp16", "bf16-mixed", "fp16-mixed")  # bitsandbytes computes in 16 bits
_OWN_LINEARS = ("falcon",)  # transformers, integrations/bitsandbytes.py: exactly nn.Linear is exchanged


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one optimizer step is run. `b` = micro_batch_size, `s` = seq_len.

    `precision` is a recipe: `fp32`, `bf16` and `fp16` keep weights, gradients and AdamW's states in that
    type; `bf16-mixed`, `fp16-mixed` fp32 weights under autocast; `textbook` 2 + 2 + 8 bytes. `optimizer`
    `adamw` is torch's default (foreach), `adamw-single` its loop over single tensors; `-8bit` bitsandbytes',
    `adafactor` transformers' (fixed learning rate). `attention` `sdpa` is torch's choice. `zero_grad` `zero`:
    gradients stay. `loop` `plain` holds the logits to the end of the step, HF's `trainer` does not; `loss`
    `chunked` has few, `liger` fuses. `kernels`: what computes norms, gated activations, rotary positions.
    `batching`: samples all of `seq_len` tokens, `padded` to it with a mask, or `packed` into a row [1, b s].
    """

    micro_batch_size: int = 1
    seq_len: int = 512
    gradient_accumulation_steps: int = 1
    precision: Precision = "bf16"
    optimizer: Optimizer = "adamw"
    activation_checkpointing: bool = False
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
        if not isinstance(self.activation_checkpointing, bool):
            raise SetupError(
                f"activation_checkpointing must be true or false, got {self.activation_checkpointing!r}."
            )
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
        _check_method(self.model, self.method)
        _check_training(self.model, self.method, self.training)
        check_loss(self.training, self.model, self.method, shared=self.sharding.is_distributed)
        check_batching(self.model, self.method, self.training)
        if isinstance(self.method, QLoRA):
            _check_qlora(self.model, self.method, self.training)
        check_sharding(self.sharding, self.method, self.training)

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


def _check_method(model: Model, method: Method) -> None:
    if isinstance(method, FullFineTuning):
        return
    if isinstance(method, PeftOfSize):
        if method.trainable_params > model.parameters:
            raise SetupError(
                f"trainable_params {method.trainable_params:,} is more than the model's "
                f"{model.parameters:,} parameters; give a smaller number."
            )
        return
    if model.is_bare:
        raise SetupError(
            f"method {method.name} needs the model's layers, and {model.id} is only a number of parameters; "
            "give --trainable-params, or a model's id or config.json."
        )
    if isinstance(method, PeftConfig):
        return  # peft itself holds it against the model
    if isinstance(method, LoRA):
        _check_lora(model, method)
    elif isinstance(method, BitFit):
        if not bias_tensors(model):
            raise SetupError(
                f"BitFit trains bias terms, and {model.id} has none; choose lora or adapter."
            )
    else:
        _check_adapter(model, method)


def _check_lora(model: Model, method: LoRA) -> None:
    targets = lora_targets(model, method.target_modules)
    if not targets:
        raise SetupError(
            f"target_modules {', '.join(method.target_modules)} matches no linear layer of {model.id}; "
            "name the layers instead."
        )
    widest = max((target.weight for target in targets), key=lambda t: min(t.shape[-2:]))
    limit = min(widest.shape[-2:])
    if method.lora_rank > limit:  # gates of h x 1 and the like take any rank, as in peft
        raise SetupError(
            f"lora_rank {method.lora_rank} is above every target matrix of {model.id} (the largest is "
            f"{widest.module.rpartition('.')[2]}, {widest.shape[-2]} x {widest.shape[-1]}); "
            f"give at most {limit}."
        )
    if method.lora_dropout and adapts_experts(model, method.target_modules):
        raise SetupError(
            f"lora_dropout {method.lora_dropout:g} with experts among the targets is refused by peft; "
            "use lora_dropout 0, or attention as target_modules."
        )


def _check_qlora(model: Model, method: QLoRA, training: Training) -> None:
    if model.config.get("model_type") in _OWN_LINEARS:
        raise SetupError(
            f"method qlora finds nothing to quantize in {model.id}: its linear layers are of a class of its "
            "own, which transformers leaves as it is; choose lora."
        )
    if method.lora_bias != "none":
        raise SetupError(
            f"lora_bias {method.lora_bias} is not covered with qlora: bitsandbytes changes the type of a "
            "layer's bias while it runs; use lora_bias none, or method lora."
        )
    if training.precision not in _QLORA_PRECISIONS:
        raise SetupError(
            f"method qlora computes in 16 bits over quantized weights, precision {training.precision} does "
            f"not; choose {', '.join(_QLORA_PRECISIONS)}."
        )
    if training.attention in HALF_ONLY and not training.precision.endswith("-mixed"):
        raise SetupError(
            f"attention {training.attention} takes 16-bit numbers, and qlora with precision "
            f"{training.precision} attends in fp32; choose bf16-mixed, or attention sdpa, efficient or eager."
        )


def _check_adapter(model: Model, method: Adapter) -> None:
    if model.architecture is None:
        raise SetupError(
            f"where bottleneck adapters go in {model.id} is not known; choose lora, bitfit or full."
        )
    hidden = model.architecture.hidden_size
    if method.bottleneck(hidden) > hidden:
        raise SetupError(
            f"adapter_size {method.bottleneck(hidden)} is above the hidden size of {model.id}; "
            f"give at most {hidden}."
        )
    if not adapter_places(model, model.architecture.mlp_output):
        raise SetupError(f"{model.id} has no module {model.architecture.mlp_output} to put an adapter after.")


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
