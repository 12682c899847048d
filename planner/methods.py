"""The fine-tuning methods, frozen and validated on their own; `Setup` holds them against the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from planner.checks import choice, number, whole
from planner.errors import SetupError
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
]

LoRABias = Literal["none", "all", "lora_only"]
Quantization = Literal["nf4", "nf4-double", "int8"]
AdapterKind = Literal["houlsby", "pfeiffer"]


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
        whole("lora_rank", self.lora_rank)
        if self.lora_alpha is not None:
            number("lora_alpha", self.lora_alpha, low=0.0, low_allowed=False)
        number("lora_dropout", self.lora_dropout, low=0.0, high=1.0)
        choice("lora_bias", self.lora_bias, get_args(LoRABias))
        object.__setattr__(self, "target_modules", _target_modules(self.target_modules))

    @property
    def alpha(self) -> float:
        """The alpha in use: the given one, or 2 r."""
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


@dataclass(frozen=True, kw_only=True)
class QLoRA(LoRA):
    """LoRA over linear layers that bitsandbytes holds quantized (Dettmers et al. 2023, section 3).

    `nf4` is 4 bits with an fp32 scale for each 64 numbers, `nf4-double` quantizes the scales too, `int8` is
    8 bits with a scale for each row (LLM.int8). All that is not quantized is fp32, as
    peft.prepare_model_for_kbit_training makes it; `precision` is the type that quantized products are
    computed in, `-mixed` with autocast over the rest, as HF Trainer's `bf16=True`.
    """

    name = "qlora"
    quantization: Quantization = "nf4"

    def __post_init__(self) -> None:
        """Refuse what no model could take. Raises SetupError."""
        super().__post_init__()
        choice("quantization", self.quantization, get_args(Quantization))


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
        choice("adapter_kind", self.adapter_kind, get_args(AdapterKind))
        if self.adapter_size is not None and self.adapter_reduction_factor is not None:
            raise SetupError("give adapter_size or adapter_reduction_factor, not both.")
        if self.adapter_size is not None:
            whole("adapter_size", self.adapter_size)
        if self.adapter_reduction_factor is not None:
            number("adapter_reduction_factor", self.adapter_reduction_factor, low=1.0)

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
        whole("trainable_params", self.trainable_params, high=10**15)


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Any method that the peft library knows, from its adapter_config.json.

    `peft_config_json` is the file's JSON object, canonical. `simulate` and `measure` run peft itself;
    formulas know LoRA with most of its options, DoRA, IA3, LN, prompt and prefix tuning.
    """

    name = "peft"
    peft_config_json: str

    def __post_init__(self) -> None:
        """Refuse what is not a peft configuration. Raises SetupError."""
        try:
            values = json.loads(self.peft_config_json)
        except (TypeError, ValueError) as error:
            raise SetupError(f"peft_config is not JSON ({error}); give peft's adapter_config.json.") from None
        if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
            raise SetupError(
                "peft_config has no peft_type; give the adapter_config.json that peft's save_pretrained "
                "writes."
            )
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        object.__setattr__(self, "peft_config_json", canonical)

    @property
    def values(self) -> dict[str, Any]:
        """The configuration as a fresh dictionary."""
        return dict(json.loads(self.peft_config_json))


Method = FullFineTuning | LoRA | QLoRA | Adapter | BitFit | PeftOfSize | PeftConfig
METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (FullFineTuning, LoRA, QLoRA, Adapter, BitFit, PeftOfSize)
}


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
