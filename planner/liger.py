"""What liger_kernel replaces in which model: norms, gated activations, rotary positions, experts.

Source: liger_kernel 0.8.5, transformers/monkey_patch.py, what each `apply_liger_kernel_to_*` does to a model
that is there already, with the switches that are on by default; HF Trainer applies it so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.errors import SetupError
from planner.methods import LoRA, Method, PeftConfig
from planner.model import Model
from planner.peft_targets import file_adapts_experts
from planner.targets import adapts_experts

__all__ = [
    "LIGER_VERSION",
    "REPLACED",
    "Kernels",
    "Replaced",
    "adapted_experts",
    "adapted_norm",
    "check_kernels",
    "fuses_experts",
    "liger_switches",
    "replaced",
]

Kernels = Literal["torch", "liger"]

LIGER_VERSION = "0.8.5"  # the liger_kernel whose source the forms and the formulas follow

# The switches of transformers/monkey_patch.py for text models beside those of the loss.
_KERNEL_SWITCHES = ("rope", "rms_norm", "layer_norm", "swiglu", "geglu", "relu_squared")

_BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_AFTER_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_SANDWICH_NORMS = (*_BLOCK_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Replaced:
    """What is replaced in one model type, by default.

    `norms` are the modules of a layer whose RMSNorm is replaced; the last norm always is. `in_place`: its
    backward pass writes over the gradient that comes in, `last_in_place` that of the last norm.
    `offset` is added to the weight; `single` multiplies by it in fp32. `gate`: what becomes of gate and up,
    "" where it stays; `fused_gate_up`: both come out of one layer. `rotary`: positions are replaced.
    """

    norms: tuple[str, ...] = _BLOCK_NORMS
    in_place: bool = True
    last_in_place: bool = True
    offset: float = 0.0
    single: bool = False
    gate: Literal["silu", "gelu", "experts", ""] = "silu"
    fused_gate_up: bool = False
    rotary: bool = True

    @property
    def head_norms(self) -> bool:
        """Whether the norms of queries and keys are replaced."""
        return _HEAD_NORMS[0] in self.norms


_GEMMA2 = Replaced(
    norms=_SANDWICH_NORMS, in_place=False, last_in_place=False, offset=1.0, single=True, gate="gelu"
)
_OLMO2 = Replaced(norms=_AFTER_NORMS, in_place=False)  # norms of queries and keys stay as they are

REPLACED: dict[str, Replaced] = {
    "exaone4": Replaced(norms=(*_AFTER_NORMS, *_HEAD_NORMS), in_place=False, last_in_place=False),
    "gemma": Replaced(offset=1.0, single=True, gate="gelu"),
    "gemma2": _GEMMA2,
    "gemma3_text": Replaced(
        norms=(*_SANDWICH_NORMS, *_HEAD_NORMS),
        in_place=False,
        last_in_place=False,
        offset=1.0,
        single=True,
        gate="gelu",
    ),
    "glm4": Replaced(
        norms=(*_BLOCK_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
        in_place=False,
        last_in_place=False,
        fused_gate_up=True,
        rotary=False,
    ),
    "granite": Replaced(),
    "hunyuan_v1_dense": Replaced(),
    "llama": Replaced(),
    "ministral": Replaced(),
    "mistral": Replaced(),
    "mixtral": Replaced(gate="experts"),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "phi3": Replaced(fused_gate_up=True),
    "qwen2": Replaced(),
    "qwen3": Replaced(norms=(*_BLOCK_NORMS, *_HEAD_NORMS)),
    "qwen3_moe": Replaced(norms=(*_BLOCK_NORMS, *_HEAD_NORMS), gate="experts"),
    "smollm3": Replaced(),
}
"""By model type: those of text alone. Left out: gpt_oss, Nemotron, Qwen3-Next, HunYuan MoE and DeepSeek."""

_SILU = ("silu", "swish")


def replaced(kernels: str, model: Model) -> Replaced | None:
    """What `kernels` replaces in the model; None where nothing."""
    return REPLACED.get(str(model.config.get("model_type"))) if kernels == "liger" else None


def liger_switches(kernels: str, loss: str) -> dict[str, bool]:
    """liger_kernel_config for a choice of kernels and loss; a model type passes over switches it lacks.

    Kernels are left to each model type's defaults. Liger's loss on logits that are there is never on (it is
    by default for Granite).
    """
    losses = {"fused_linear_cross_entropy": loss == "liger", "cross_entropy": False}
    return losses if kernels == "liger" else {**losses, **dict.fromkeys(_KERNEL_SWITCHES, False)}


def fuses_experts(kernels: str, model: Model) -> bool:
    """Whether Liger's kernels run a mixture of experts."""
    what = replaced(kernels, model)
    return what is not None and what.gate == "experts"


def check_kernels(kernels: str, model: Model, method: Method, *, shared: bool) -> None:
    """Refuse Liger's kernels where the library has none or would train something else. Raises SetupError."""
    if kernels == "torch" or model.is_bare:
        return
    kind = str(model.config.get("model_type"))
    if model.task != "causal-lm" or kind not in REPLACED:
        raise SetupError(
            f"kernels liger is covered for causal language models that liger_kernel {LIGER_VERSION} has "
            f"kernels for, and {model.id} ({kind}) is none of them; choose kernels torch."
        )
    act = model.config.get("hidden_act", "silu")
    if REPLACED[kind].gate in ("silu", "experts") and act not in _SILU:
        raise SetupError(
            f"kernels liger computes silu whatever the model's activation is, and {model.id} has {act}; "
            "choose kernels torch."
        )
    _check_method(model, method)
    if fuses_experts("liger", model) and _has_dense_layers(model):
        raise SetupError(
            f"kernels liger looks for experts in every layer, and {model.id} has layers without; the library "
            "stops there, so choose kernels torch."
        )
    if shared:
        raise SetupError(
            "kernels liger is covered on one GPU only; choose kernels torch or leave --num-gpus out."
        )


def _has_dense_layers(model: Model) -> bool:
    """Qwen3-MoE: transformers 5.23, models/qwen3_moe/modeling_qwen3_moe.py, Qwen3MoeDecoderLayer."""
    config = model.config
    return bool(config.get("mlp_only_layers")) or config.get("decoder_sparse_step", 1) != 1


def _check_method(model: Model, method: Method) -> None:
    """What the library would pass over. Raises SetupError."""
    if isinstance(method, PeftConfig) and method.values["peft_type"] == "LN_TUNING":
        raise adapted_norm(model.id)
    if not fuses_experts("liger", model):
        return
    if isinstance(method, PeftConfig):
        wrapped = file_adapts_experts(model, method.values)
    else:
        wrapped = isinstance(method, LoRA) and adapts_experts(model, method.target_modules)
    if wrapped:
        raise adapted_experts(model.id)


def adapted_norm(model: str) -> SetupError:
    """Why a norm that peft has wrapped is refused: the kernel reads the wrapper's `weight`, the frozen one.

    peft 0.21, tuners/tuners_utils.py, `BaseTunerLayer.weight`.
    """
    return SetupError(
        f"kernels liger reads the frozen weight of a norm of {model} and passes over what a method puts "
        "there, so that it would never be trained; choose kernels torch."
    )


def adapted_experts(model: str) -> SetupError:
    """Why experts that peft has wrapped are refused: the library gives its forward pass to the wrapper.

    peft 0.21, tuners/lora/layer.py, `ParamWrapper`, which has no `gate_up_proj`.
    """
    return SetupError(
        f"kernels liger takes the experts of {model} for its own, and LoRA around them breaks that; "
        "leave the experts out of target_modules, or choose kernels torch."
    )
