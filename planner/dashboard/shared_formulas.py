"""The formulas of the parts that several GPUs hold otherwise than one: chunks, slices, buckets."""

from __future__ import annotations

from collections.abc import Callable

from planner.dashboard.words import peak_place
from planner.estimate.recipes import RECIPES, recipe_of
from planner.report import MemoryReport
from planner.spec import Setup
from planner.units import gib

__all__ = ["shared_writers"]

Writer = Callable[[Setup, MemoryReport], tuple[str, str, str]]

_CHUNKS = r"\sum_{%s} %s \left\lceil \tfrac{d_0}{N} \right\rceil \tfrac{|W|}{d_0}"
_FSDP2 = "torch/distributed/fsdp/_fully_shard/_fsdp_param.py; every chunk is held against it by a test"
_STATES = {"sgd": 0, "sgd-momentum": 1}  # AdamW's are 2
_DEEPSPEED = "Rajbhandari et al. 2020, arXiv 1910.02054, section 5; DeepSpeed 0.19, runtime/zero"


def shared_writers(setup: Setup) -> dict[str, Writer]:
    """Part -> its formula, for the parts that this sharding changes."""
    sharding = setup.sharding
    if sharding.is_fsdp:
        return {
            "base_weights": _fsdp_base,
            "adapter_weights": _fsdp_adapter,
            "gradients": _fsdp_gradients,
            "optimizer_states": _fsdp_states,
            "temporaries": _fsdp_temporaries,
        }
    if sharding.zero_stage:
        return {
            "base_weights": _zero_base,
            "gradients": _zero_gradients,
            "optimizer_states": _zero_states,
            "temporaries": _zero_temporaries,
        }
    return {"gradients": _ddp_gradients} if sharding.is_distributed else {}


def _where(setup: Setup) -> str:
    return "the host's memory" if setup.sharding.cpu_offload == "parameters" else "each GPU"


def _fsdp_base(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    element, ranks = RECIPES[setup.training.precision].base, setup.sharding.shard_ranks
    return (
        _CHUNKS % ("W", "e_w"),
        f"Of each weight, P = {setup.model.parameters:,} parameters in all, {_where(setup)} holds 1 / N of "
        f"the rows, rounded up: N = {ranks:,}, e_w = {element} bytes.",
        _FSDP2,
    )


def _fsdp_adapter(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    element, added = RECIPES[setup.training.precision].adapter, report.parameters.added
    return (
        _CHUNKS % (r"\mathrm{added}\ W", "e_a"),
        f"{added:,} parameters that the method adds, e_a = {element} bytes. A matrix of fewer rows than GPUs "
        "is padded: each holds a row.",
        _FSDP2,
    )


def _fsdp_gradients(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    return (
        _CHUNKS % (r"\mathrm{trained}\ W", "e_w"),
        f"{report.parameters.trainable:,} trained parameters; a unit's shards are views of what its "
        "reduce-scatter left. Whole gradients of the unit that runs backward count as temporaries; those "
        "that wait for the last micro batch count here.",
        "torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, foreach_reduce",
    )


def _fsdp_states(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    return (
        _CHUNKS % (r"\mathrm{trained}\ W", f"{_STATES.get(setup.training.optimizer, 2)} e_w"),
        f"{setup.training.optimizer} over the rows that this GPU holds: states in the shards' type.",
        "torch/optim, over DTensor's local tensors",
    )


def _fsdp_temporaries(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    return (
        r"\max_k \left( U_k + A_{k-1} + g_k + R_{k+1} \right) + \mathrm{tail}",
        "U_k the gathered weights of the unit that runs, A_{k-1} the all-gather's output of the next one, "
        "g_k its whole gradients, R_{k+1} the reduce-scatter's input of the one before, and the head's unit, "
        f"which stays gathered. At the peak, in {peak_place(report)}: {gib(report.parts.temporaries)}.",
        "torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py; units as accelerate 1.15 cuts them",
    )


def _zero_base(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    element, stage = recipe_of(setup).base, setup.sharding.zero_stage
    return (
        r"\tfrac{e_w P}{N}" if stage == 3 else "e_w P",
        f"P = {setup.model.parameters:,} parameters of e_w = {element} bytes"
        + (f", divided by N = {setup.sharding.shard_ranks:,}." if stage == 3 else ", whole on each GPU."),
        _DEEPSPEED,
    )


def _zero_gradients(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    stage = setup.sharding.zero_stage
    return (
        "e_g T" if stage == 1 else r"\tfrac{e_g T}{N}",
        f"T = {report.parameters.trainable:,} trained parameters of e_g = {recipe_of(setup).base} bytes"
        + (", whole in stage 1." if stage == 1 else f", divided by N = {setup.sharding.shard_ranks:,}."),
        _DEEPSPEED,
    )


def _zero_states(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    return (
        r"\tfrac{(4 + 4 n)\, T}{N}",
        f"fp32 weights and n = {_STATES.get(setup.training.optimizer, 2)} states for each of "
        f"T = {report.parameters.trainable:,} trained parameters, divided by "
        f"N = {setup.sharding.shard_ranks:,}.",
        _DEEPSPEED,
    )


def _zero_temporaries(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    live = r" + e_w \min(P, 10^9)" if setup.sharding.zero_stage == 3 else ""
    return (
        r"5 \cdot 10^8\, e_g" + live,
        "DeepSpeed's bucket of gradients on their way"
        + (", and the gathered weights that it keeps for their next use" if live else "")
        + f"; what one layer's backward pass makes. At the peak: {gib(report.parts.temporaries)}.",
        "DeepSpeed 0.19, runtime/zero/config.py: reduce_bucket_size, stage3_max_live_parameters",
    )


def _ddp_gradients(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    return (
        r"2 \sum_{\mathrm{trained}\ W} e_g\, |W|",
        f"{report.parameters.trainable:,} trained parameters: their gradients, and DDP's buckets, flat "
        "copies of all of them that stay from the wrapping on.",
        "torch/csrc/distributed/c10d/reducer.cpp, initialize_buckets",
    )
