"""How several GPUs share one training step: DDP, PyTorch's FSDP2 or DeepSpeed's ZeRO, frozen and validated.

The words follow accelerate 1.15: `fsdp` is `fully_shard` with resharding after the forward pass,
`fsdp-grad-op` without it, `hsdp` shards within a node and replicates over the nodes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from planner.checks import choice, whole
from planner.errors import SetupError

if TYPE_CHECKING:
    from planner.model import Model
    from planner.spec import Method, Training

__all__ = ["CpuOffload", "Sharding", "ShardingKind", "check_sharding"]

ShardingKind = Literal["none", "ddp", "fsdp", "fsdp-grad-op", "hsdp", "zero1", "zero2", "zero3"]
CpuOffload = Literal["none", "optimizer", "parameters"]
ReduceDtype = Literal["fp32", "bf16", "fp16"]

_FSDP = ("fsdp", "fsdp-grad-op", "hsdp")
_TAKES_SHARDS = ("adamw", "adamw-fused", "adamw-single", "sgd", "sgd-momentum")  # torch's own, elementwise
_HALF = ("bf16", "fp16")
_USUAL_NODE = 8  # GPUs of a DGX, an HGX board and the large cloud instances
_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_MOST_GPUS = 100_000


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """GPUs of one training run and what each of them holds.

    `gpus_per_node` None: 8, or `num_gpus` where that is less. `cpu_offload` `parameters` takes gradients
    and optimizer states along. `reduce_dtype` (FSDP): the type gradients are reduced in; None: the type that
    the step computes in, as accelerate sets it. `prefetch` (FSDP): units gathered ahead explicitly, in
    forward and backward; None: FSDP2's own, one ahead in the backward pass. `shard_unit` (FSDP): the
    module class that is gathered as one; None: the model's layer class. Raises SetupError.
    """

    num_gpus: int = 1
    gpus_per_node: int | None = None
    sharding: ShardingKind = "none"
    cpu_offload: CpuOffload = "none"
    reduce_dtype: ReduceDtype | None = None
    prefetch: int | None = None
    shard_unit: str | None = None

    def __post_init__(self) -> None:
        """Refuse what no launcher could start."""
        whole("num_gpus", self.num_gpus, high=_MOST_GPUS)
        if self.gpus_per_node is not None:
            whole("gpus_per_node", self.gpus_per_node, high=_MOST_GPUS)
        choice("sharding", self.sharding, get_args(ShardingKind))
        choice("cpu_offload", self.cpu_offload, get_args(CpuOffload))
        if self.reduce_dtype is not None:
            choice("reduce_dtype", self.reduce_dtype, get_args(ReduceDtype))
        if self.prefetch is not None:
            whole("prefetch", self.prefetch, high=1000)
        if self.shard_unit is not None and not _is_class_name(self.shard_unit):
            raise SetupError(
                f"shard_unit must be the name of a module class, such as LlamaDecoderLayer, "
                f"got {self.shard_unit!r}."
            )
        _check_gpus(self)
        _check_options(self)

    @property
    def is_distributed(self) -> bool:
        """Whether more than one GPU takes part."""
        return self.sharding != "none"

    @property
    def is_fsdp(self) -> bool:
        """Whether PyTorch's `fully_shard` runs it."""
        return self.sharding in _FSDP

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's stage, 0 for all others."""
        return int(self.sharding[-1]) if self.sharding.startswith("zero") else 0

    @property
    def reshard_after_forward(self) -> bool:
        """Whether a unit's gathered weights are freed between forward and backward pass."""
        return self.sharding in ("fsdp", "hsdp", "zero3")

    @property
    def per_node(self) -> int:
        """GPUs used in each node."""
        return min(self.gpus_per_node or _USUAL_NODE, self.num_gpus)

    @property
    def nodes(self) -> int:
        """Machines."""
        return -(-self.num_gpus // self.per_node)

    @property
    def shard_ranks(self) -> int:
        """Ranks over which one copy is split: 1 under DDP, a node's under HSDP, else all."""
        if self.sharding in ("none", "ddp"):
            return 1
        return self.per_node if self.sharding == "hsdp" else self.num_gpus


def check_sharding(sharding: Sharding, model: Model, method: Method, training: Training) -> None:
    """Refuse what the libraries cannot run together. Raises SetupError."""
    if not sharding.is_distributed:
        return
    trains_wide = method.name == "full" and any(tensor.wide for tensor in model.tensors)
    if sharding.is_fsdp and training.precision == "fp16" and trains_wide:
        raise SetupError(
            f"FSDP2 wants one type for all that a unit trains, with precision fp16 {model.id} keeps some of "
            "its weights in fp32; choose fp16-mixed or bf16, or sharding ddp."
        )
    kind = sharding.sharding
    if training.precision == "textbook":
        raise SetupError(
            f"precision textbook is a sum for one GPU, sharding {kind} runs a library's recipe; "
            "choose bf16, bf16-mixed or fp32."
        )
    if method.name == "qlora" and kind != "ddp":
        raise SetupError(
            f"sharding {kind} is not covered with method qlora: bitsandbytes' packed weights are not "
            "split like others; choose sharding ddp, or method lora."
        )
    if training.optimizer not in _TAKES_SHARDS and kind != "ddp":
        raise SetupError(
            f"optimizer {training.optimizer} is not covered on the shards of sharding {kind}: its states are "
            "made for whole tensors; choose adamw or adamw-fused, or sharding ddp."
        )
    if sharding.is_fsdp and getattr(method, "lora_bias", "none") != "none" and training.precision in _HALF:
        raise SetupError(
            f"FSDP2 wants one type for all that a unit trains, with precision {training.precision} peft's "
            "adapters are fp32 beside 16-bit biases; choose lora_bias none, or precision bf16-mixed."
        )
    if training.zero_grad != "none" and kind != "ddp":
        raise SetupError(
            f"zero_grad {training.zero_grad} is not covered with sharding {kind}, where every step makes its "
            "gradients anew; choose zero_grad none, or sharding ddp."
        )
    if sharding.zero_stage and training.precision in ("bf16", "fp16"):
        raise SetupError(
            f"DeepSpeed keeps fp32 weights and states beside 16-bit ones, precision {training.precision} "
            f"has none; choose {training.precision}-mixed, or sharding fsdp."
        )


def _check_gpus(asked: Sharding) -> None:
    kind, number = asked.sharding, asked.num_gpus
    if kind == "none" and number > 1:
        raise SetupError(
            f"num_gpus {number:,} needs a sharding that says what each GPU holds, got none; choose ddp, "
            "fsdp, fsdp-grad-op, hsdp, zero1, zero2 or zero3."
        )
    if kind != "none" and number == 1:
        raise SetupError(
            f"sharding {kind} needs at least 2 GPUs, got num_gpus 1; give more, or sharding none."
        )
    if kind == "hsdp" and number <= asked.per_node:
        raise SetupError(
            f"sharding hsdp replicates over nodes, and {number} GPUs with {asked.per_node} per node are one "
            "node; choose fsdp, more num_gpus, or fewer gpus_per_node."
        )
    if number % asked.per_node:
        below, above = number - number % asked.per_node, number + -number % asked.per_node
        raise SetupError(
            f"num_gpus {number:,} does not fill nodes of {asked.per_node} GPUs; "
            f"give {below:,} or {above:,}, or another gpus_per_node."
        )
    if kind == "hsdp" and asked.per_node == 1:
        raise SetupError(
            "sharding hsdp splits the model within a node, and a node of 1 GPU has nothing to split; "
            "choose fsdp or ddp, or more gpus_per_node."
        )


def _check_options(asked: Sharding) -> None:
    kind, offload = asked.sharding, asked.cpu_offload
    if offload != "none" and kind in ("none", "ddp"):
        raise SetupError(
            f"cpu_offload {offload} needs a sharding that moves shards to the host, {kind} has none; "
            "choose fsdp, zero2 or zero3."
        )
    if offload == "optimizer" and asked.is_fsdp:
        raise SetupError(
            f"FSDP offloads parameters, gradients and optimizer states together, got cpu_offload optimizer "
            f"with sharding {kind}; choose cpu_offload parameters, or zero2."
        )
    if offload == "parameters" and asked.zero_stage in (1, 2):
        raise SetupError(
            f"DeepSpeed offloads parameters in stage 3 only, got sharding {kind}; choose cpu_offload "
            "optimizer, or zero3."
        )
    for name in ("reduce_dtype", "prefetch", "shard_unit"):
        value = getattr(asked, name)
        if value is not None and not asked.is_fsdp:
            raise SetupError(
                f"{name} belongs to FSDP, got {value} with sharding {kind}; leave it out, or choose fsdp."
            )


def _is_class_name(text: object) -> bool:
    return isinstance(text, str) and _CLASS_NAME.fullmatch(text) is not None
