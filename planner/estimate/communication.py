"""Bytes that one rank sends in one optimizer step.

Letters: P parameters, T trained ones, N ranks. A ring's reduce-scatter or all-gather of X bytes moves
X (N - 1) / N a rank, an all-reduce both of them (Rajbhandari et al. 2020, arXiv 1910.02054, section 7: 2 T
for DDP and ZeRO 1 and 2, 2 P + T for ZeRO 3; Zhao et al. 2023, arXiv 2304.11277, section 3.2, for FSDP).
"""

from __future__ import annotations

from planner.estimate.parameters import parameters
from planner.estimate.recipes import RECIPES, recipe_of
from planner.estimate.shards import pieces
from planner.spec import Setup

__all__ = ["communication_bytes"]

_REDUCED_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def communication_bytes(setup: Setup) -> int:
    """Bytes that one rank sends in a step; 0 on one GPU. Left out: the loss, norms of clipped gradients.

    Weights are gathered for every micro batch, gradients reduced after the last one. FSDP gathers twice where
    it reshards after the forward pass, once where it does not; HSDP reduces its shards over the nodes, too.
    """
    sharding = setup.sharding
    if not sharding.is_distributed:
        return 0
    gathered, reduced, updated = _sizes(setup)
    if sharding.sharding == "ddp":
        return _ring(2 * reduced, sharding.num_gpus)
    if sharding.zero_stage in (1, 2):
        return _ring(reduced + updated, sharding.num_gpus)
    times = setup.training.gradient_accumulation_steps * (2 if sharding.reshard_after_forward else 1)
    ranks = sharding.shard_ranks
    within = _ring(times * gathered + reduced, ranks)
    if sharding.sharding != "hsdp":
        return within
    return within + _ring(2 * reduced // ranks, sharding.nodes)


def _ring(size_bytes: int, ranks: int) -> int:
    return size_bytes * (ranks - 1) // ranks


def _sizes(setup: Setup) -> tuple[int, int, int]:
    """Bytes of all weights as they are gathered, of all gradients as reduced, of all trained weights."""
    reduce_dtype = setup.sharding.reduce_dtype
    used = recipe_of(setup)
    if setup.model.is_bare:
        counts, base = parameters(setup), setup.model.parameters
        trained_added = min(counts.added, counts.trainable)
        gathered = base * used.base + counts.added * used.adapter
        trained = (counts.trainable - trained_added) * used.base + trained_added * used.adapter
        reduced = counts.trainable * _REDUCED_BYTES[reduce_dtype] if reduce_dtype else trained
        return gathered, reduced, trained
    found = pieces(setup)
    gathered = sum([p.numel * p.gathered_element_bytes for p in found])
    trained = sum([p.numel * p.gathered_element_bytes for p in found if p.trained])
    reduced = trained
    if reduce_dtype:
        reduced = sum([p.numel for p in found if p.trained]) * _REDUCED_BYTES[reduce_dtype]
    if setup.sharding.sharding == "ddp":
        held = RECIPES[setup.training.precision]
        reduced = sum([p.numel * (held.adapter if p.added else held.base) for p in found if p.trained])
    return gathered, reduced, trained
