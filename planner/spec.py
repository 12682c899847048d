"""What is asked: a model, a method, the training and a GPU, frozen and validated.

Every field has one spelling everywhere: here, as a command-line flag, as a JSON key, in the URL.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from planner.catalog.gpus import Gpu, gpu as gpu_named
from planner.errors import SetupError, nearest
from planner.model import Model
from planner.targets import PRESETS, adapted_weights, adapter_places, bias_tensors

__all__ = [
    "METHODS",
    "Adapter",
    "BitFit",
    "FullFineTuning",
    "LoRA",
    "Method",
    "PeftOfSize",
    "Setup",
    "Training",
]

Precision = Literal["fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed", "textbook"]
Optimizer = Literal["adamw", "adamw-fused", "sgd"]
Attention = Literal["sdpa", "flash", "efficient", "cudnn", "eager"]
LoRABias = Literal["none", "all", "lora_only"]
AdapterKind = Literal["houlsby", "pfeiffer"]

_HALF_ONLY = ("flash", "cudnn")  # torch: flash and cuDNN attention take fp16 and bf16 only
_FLASH_HEAD_LIMIT = 256  # aten/.../cuda/sdp_utils.cpp: check_head_dim_size_flash
_LARGEST = 10**9


@dataclass(frozen=True, kw_only=True)
class FullFineTuning:
    """Every parameter is trained."""

    name = "full"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adaptation, y = W x + (alpha / r) B A x (Hu et al. 2021, section 4.1).

    `lora_alpha` None is the usual 2 r. `target_modules` are names or suffixes as in peft, or a preset:
    `("attention",)` or `("all-linear",)`. Adapters are kept in fp32, as peft keeps them.
    """

    name = "lora"
    lora_rank: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("attention",)
    lora_bias: LoRABias = "none"

    def __post_init__(self) -> None:
        """Refuse what no model could take. Raises SetupError."""
        _whole("lora_rank", self.lora_rank)
        if self.lora_alpha is not None:
            _number("lora_alpha", self.lora_alpha, low=0.0, low_allowed=False)
        _number("lora_dropout", self.lora_dropout, low=0.0, high=1.0)
        _choice("lora_bias", self.lora_bias, get_args(LoRABias))
        object.__setattr__(self, "target_modules", _target_modules(self.target_modules))

    @property
    def alpha(self) -> float:
        """The alpha in use: the given one, or 2 r."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Bottleneck adapters h -> m -> h with biases and a residual connection.

    `houlsby`: two in a layer, after attention and after the MLP (Houlsby et al. 2019, figure 2);
    `pfeiffer`: one, after the MLP (Pfeiffer et al. 2020). The bottleneck is `adapter_size`, or
    h // `adapter_reduction_factor` where that is given instead.
    """

    name = "adapter"
    adapter_kind: AdapterKind = "pfeiffer"
    adapter_size: int | None = None
    adapter_reduction_factor: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no model could take. Raises SetupError."""
        _choice("adapter_kind", self.adapter_kind, get_args(AdapterKind))
        if self.adapter_size is not None and self.adapter_reduction_factor is not None:
            raise SetupError("give adapter_size or adapter_reduction_factor, not both.")
        if self.adapter_size is not None:
            _whole("adapter_size", self.adapter_size)
        if self.adapter_reduction_factor is not None:
            _number("adapter_reduction_factor", self.adapter_reduction_factor, low=1.0)

    def bottleneck(self, hidden_size: int) -> int:
        """Bottleneck size m for hidden size h; 64 where nothing is given (Houlsby et al. 2019)."""
        if self.adapter_reduction_factor is not None:
            return max(1, int(hidden_size / self.adapter_reduction_factor))
        return 64 if self.adapter_size is None else self.adapter_size


@dataclass(frozen=True, kw_only=True)
class BitFit:
    """Only the bias terms are trained (Ben Zaken et al. 2021)."""

    name = "bitfit"


@dataclass(frozen=True, kw_only=True)
class PeftOfSize:
    """A PEFT method of which only the number of trained parameters is known."""

    name = "peft"
    trainable_params: int

    def __post_init__(self) -> None:
        """Refuse numbers below 1. Raises SetupError."""
        _whole("trainable_params", self.trainable_params, high=10**15)


Method = FullFineTuning | LoRA | Adapter | BitFit | PeftOfSize
METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (FullFineTuning, LoRA, Adapter, BitFit, PeftOfSize)
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How one optimizer step is run. `b` = micro_batch_size, `s` = seq_len.

    `precision` is a recipe: `fp32`, `bf16` and `fp16` keep weights, gradients and AdamW's states in that
    type; `bf16-mixed` and `fp16-mixed` keep fp32 weights under autocast; `textbook` is 16-bit weights
    and gradients with fp32 states (2 + 2 + 8 bytes a parameter). `optimizer` `adamw` is
    torch.optim.AdamW's own default on CUDA (foreach). `attention` `sdpa` is torch's choice.
    """

    micro_batch_size: int = 1
    seq_len: int = 512
    gradient_accumulation_steps: int = 1
    precision: Precision = "bf16"
    optimizer: Optimizer = "adamw"
    activation_checkpointing: bool = False
    attention: Attention = "sdpa"
    clip_grad_norm: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no run could use. Raises SetupError."""
        for name in ("micro_batch_size", "seq_len", "gradient_accumulation_steps"):
            _whole(name, getattr(self, name))
        _choice("precision", self.precision, get_args(Precision))
        _choice("optimizer", self.optimizer, get_args(Optimizer))
        _choice("attention", self.attention, get_args(Attention))
        if not isinstance(self.activation_checkpointing, bool):
            raise SetupError(
                f"activation_checkpointing must be true or false, got {self.activation_checkpointing!r}."
            )
        if self.clip_grad_norm is not None:
            _number("clip_grad_norm", self.clip_grad_norm, low=0.0, low_allowed=False)
        if self.attention in _HALF_ONLY and self.precision == "fp32":
            raise SetupError(
                f"attention {self.attention} needs a 16-bit precision, got fp32; "
                "choose bf16 or bf16-mixed, or attention sdpa, efficient or eager."
            )


@dataclass(frozen=True, init=False)
class Setup:
    """One fine-tuning run to be planned.

    `model` is a Model, or a name to resolve (catalogue, Hugging Face id, path, params:7e9); `gpu` a Gpu,
    a name or a size such as "24GiB". Raises SetupError for a combination that makes no sense.
    """

    model: Model
    method: Method = field(default_factory=FullFineTuning)
    training: Training = field(default_factory=Training)
    gpu: Gpu | None = None

    def __init__(
        self,
        *,
        model: Model | str,
        method: Method | None = None,
        training: Training | None = None,
        gpu: Gpu | str | None = None,
    ) -> None:
        """Resolve names and validate."""
        if isinstance(model, str):
            from planner.catalog.resolve import resolve

            model = resolve(model)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "method", method or FullFineTuning())
        object.__setattr__(self, "training", training or Training())
        object.__setattr__(self, "gpu", gpu_named(gpu) if isinstance(gpu, str) else gpu)
        _check_method(self.model, self.method)
        _check_training(self.model, self.training)

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON values under the field names; `from_dict` gives an equal setup.

        A model that is not in the catalogue carries its `model_config` along.
        """
        from planner import catalog

        flat: dict[str, Any] = {"model": self.model.id}
        if self.model.config_json and self.model.id not in catalog.models():
            flat["model_config"] = self.model.config
        flat["method"] = self.method.name
        for part in (self.method, self.training):
            for item in dataclasses.fields(part):
                flat[item.name] = _json_value(item.name, getattr(part, item.name))
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
        training = Training(**{f.name: values.pop(f.name) for f in dataclasses.fields(Training) if f.name in values})
        if values:
            key = next(iter(values))
            raise SetupError(f"unknown setting {key!r}; {nearest(key, _all_keys())}")
        return cls(model=model, method=method, training=training, gpu=gpu)

    def replace(self, **changes: Any) -> Setup:
        """The same setup with flat keys changed: `setup.replace(micro_batch_size=2)`."""
        flat = {f.name for f in dataclasses.fields(self.training)}
        training = dataclasses.replace(self.training, **{k: v for k, v in changes.items() if k in flat})
        own = {f.name for f in dataclasses.fields(self.method)}
        method = changes.get("method") or dataclasses.replace(
            self.method, **{k: v for k, v in changes.items() if k in own}
        )
        unknown = set(changes) - flat - own - {"model", "method", "gpu"}
        if unknown:
            raise SetupError(f"unknown setting {min(unknown)!r}; {nearest(min(unknown), _all_keys())}")
        return Setup(
            model=changes.get("model", self.model),
            method=method,
            training=training,
            gpu=changes.get("gpu", self.gpu),
        )


def _method(values: dict[str, Any]) -> Method:
    """Take the method's keys out of `values` and build it."""
    name = values.pop("method", None) or ("peft" if "trainable_params" in values else "full")
    if not isinstance(name, str) or name not in METHODS:
        raise SetupError(f"unknown method {name!r}; {nearest(str(name), METHODS)}")
    if values.get("trainable_params") is not None:
        name = "peft"
    cls = METHODS[name]
    fields = {f.name for f in dataclasses.fields(cls)}
    if name == "peft" and values.get("trainable_params") is None:
        raise SetupError("method peft needs trainable_params, such as 4e6.")
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
    weights = adapted_weights(model, method.target_modules)
    if not weights:
        raise SetupError(
            f"target_modules {', '.join(method.target_modules)} matches no linear layer of {model.id}; "
            "name the layers instead."
        )
    if method.lora_bias == "all" and not bias_tensors(model):
        raise SetupError(f"lora_bias all trains bias terms, and {model.id} has none; use none.")
    smallest = min(weights, key=lambda t: min(t.shape))
    if method.lora_rank > min(smallest.shape):
        raise SetupError(
            f"lora_rank {method.lora_rank} is above the smallest target matrix of {model.id} "
            f"({smallest.module.rpartition('.')[2]}, {smallest.shape[0]} x {smallest.shape[1]}); "
            f"give at most {min(smallest.shape)}."
        )


def _check_adapter(model: Model, method: Adapter) -> None:
    if model.architecture is None:
        raise SetupError(
            f"where bottleneck adapters go in {model.id} is not known; choose lora, bitfit or full."
        )
    hidden = model.architecture.hidden_size
    if method.bottleneck(hidden) > hidden:
        raise SetupError(
            f"adapter_size {method.bottleneck(hidden)} is above the hidden size of {model.id}; give at most {hidden}."
        )
    if not adapter_places(model, model.architecture.mlp_output):
        raise SetupError(f"{model.id} has no module {model.architecture.mlp_output} to put an adapter after.")


def _check_training(model: Model, training: Training) -> None:
    if model.max_positions is not None and training.seq_len > model.max_positions:
        raise SetupError(
            f"seq_len {training.seq_len:,} is beyond the {model.max_positions:,} positions of {model.id}; "
            f"give at most {model.max_positions}."
        )
    known = model.architecture
    if known and training.attention == "flash" and known.head_dim > _FLASH_HEAD_LIMIT:
        raise SetupError(
            f"attention flash takes heads of up to {_FLASH_HEAD_LIMIT}, {model.id} has {known.head_dim}; "
            "choose sdpa, efficient or eager."
        )


def _whole(name: str, value: Any, *, low: int = 1, high: int = _LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise SetupError(f"{name} must be a whole number of at least {low}, got {value!r}.")
    if value > high:
        raise SetupError(f"{name} must be at most {high:,}, got {value:,}.")


def _number(
    name: str, value: Any, *, low: float, high: float = math.inf, low_allowed: bool = True
) -> None:
    bounds = f"from {low:g}" if low_allowed else f"above {low:g}"
    if math.isfinite(high):
        bounds += f" and below {high:g}"
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value < low
        or value >= high
        or (value == low and not low_allowed)
    ):
        raise SetupError(f"{name} must be a number {bounds}, got {value!r}.")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SetupError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def _target_modules(given: Any) -> tuple[str, ...]:
    names = given.split(",") if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise SetupError(f"target_modules must be module names or a preset, got {given!r}.")
    cleaned = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not cleaned:
        raise SetupError(
            f"target_modules is empty; name modules such as q_proj,v_proj, or a preset: {', '.join(PRESETS)}."
        )
    if len(cleaned) > 1 and set(cleaned) & set(PRESETS):
        raise SetupError(
            f"target_modules {','.join(cleaned)} mixes a preset with names; give one preset, or names only."
        )
    return cleaned


def _json_value(name: str, value: Any) -> Any:
    if name == "target_modules":
        return value[0] if len(value) == 1 and value[0] in PRESETS else list(value)
    return value


def _all_keys() -> set[str]:
    classes = (Training, *METHODS.values())
    return {"model", "method", "gpu"} | {f.name for cls in classes for f in dataclasses.fields(cls)}
