"""What a method needs of a model, refused in one line before anything is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.attention import HALF_ONLY
from planner.batching import PREFIX_METHODS, PROMPT_METHODS
from planner.errors import SetupError
from planner.methods import (
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
from planner.targets import adapter_places, adapts_experts, bias_tensors, lora_targets

if TYPE_CHECKING:
    from planner.spec import Training

__all__ = ["check_method", "check_qlora"]

_QLORA_PRECISIONS = ("bf16", "fp16", "bf16-mixed", "fp16-mixed")  # bitsandbytes computes in 16 bits
_PROMPT_TASKS = {"causal-lm": "CAUSAL_LM", "seq2seq-lm": "SEQ_2_SEQ_LM"}
_OWN_LINEARS = ("falcon",)  # transformers, integrations/bitsandbytes.py: exactly nn.Linear is exchanged


def check_method(model: Model, method: Method) -> None:
    """Refuse a method that the model has nothing for. Raises SetupError."""
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
    if isinstance(method, PeftConfig):  # whatever else it says, peft itself holds it against the model
        _check_prompts(model, method.values)
    elif isinstance(method, LoRA):
        _check_lora(model, method)
    elif isinstance(method, BitFit):
        if not bias_tensors(model):
            raise SetupError(f"BitFit trains bias terms, and {model.id} has none; choose lora or adapter.")
    else:
        _check_adapter(model, method)


def _check_prompts(model: Model, values: dict[str, Any]) -> None:
    """Refuse vectors before the samples where peft would say nothing, and the first forward pass would fail.

    peft 0.21, utils/other.py (`_prepare_prompt_learning_config`: widths and heads by the model's config) and
    peft_model.py (a class for each task).
    """
    kind = str(values["peft_type"]).upper()
    if kind not in PROMPT_METHODS:
        return
    task = _PROMPT_TASKS.get(model.task)
    if task is None:
        raise SetupError(
            f"peft puts {kind}'s vectors before the samples of causal and of sequence-to-sequence language "
            f"models, and {model.id} is neither; choose lora."
        )
    if values.get("task_type") not in (None, task):
        raise SetupError(
            f"{model.id} needs task_type {task} under {kind}, the file says {values['task_type']}; change it "
            "there, or leave it out."
        )
    known = model.architecture
    if kind in PREFIX_METHODS:
        single = known is not None and known.family == "falcon" and known.num_key_value_heads == 1
        if single and values.get("num_attention_heads") is None:
            raise SetupError(
                f"peft makes {kind}'s keys for every head of {model.id}, which has a single key head; choose "
                "lora or prompt tuning."
            )
        return
    widths = {t.out_features for t in model.tensors if t.role == "embedding"}
    width = values.get("token_dim") or (known.hidden_size if known else None)
    if isinstance(width, int) and widths and width not in widths:
        raise SetupError(
            f"peft makes {kind}'s vectors {width:,} wide, and the embeddings of {model.id} have "
            f"{min(widths):,}; choose lora or prefix tuning."
        )


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


def check_qlora(model: Model, method: QLoRA, training: Training) -> None:
    """Refuse what bitsandbytes or its arithmetic does not take. Raises SetupError."""
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
