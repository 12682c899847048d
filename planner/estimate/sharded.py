"""The estimate of one rank among several: DDP's copy, FSDP2's chunks, DeepSpeed's slices.

Rank 0 is meant, whose chunks of what does not divide evenly are the largest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, pairwise

from planner.estimate.fsdp import fsdp_report
from planner.estimate.rank_report import with_load
from planner.estimate.recipes import recipe_of
from planner.estimate.resident import resident
from planner.estimate.rounding import block_bytes
from planner.estimate.zero import zero_report
from planner.model import Model
from planner.report import MemoryReport, Parts
from planner.sharding import Sharding
from planner.spec import QLoRA, Setup
from planner.units import MIB

__all__ = ["ddp_report", "nccl_bytes", "sharded_report"]

# NCCL's buffers for one communicator, (usual, largest): on the card, outside torch. Usual: 4 A100 with
# NVLink, 544 MB between two and 688 MB among more (NVIDIA/nccl issue 964). Largest: 1.6 GB (NVIDIA/nccl issue
# 864, where the maintainers say that it grows with channels and communicators, and beyond 2 nodes no more
# with the number of ranks).
_NCCL_PAIR_BYTES = 544 * 10**6
_NCCL_BYTES = 688 * 10**6
_NCCL_LARGEST_BYTES = 1_600 * 10**6
_BROADCAST_BYTES = 250 * MIB


def sharded_report(setup: Setup, alone: MemoryReport | None = None) -> MemoryReport:
    """The report of rank 0 of a setup with several GPUs; DDP adds to `alone`, the same run's steps on one."""
    if setup.sharding.is_fsdp:
        report = fsdp_report(setup)
    elif setup.sharding.zero_stage:
        report = zero_report(setup)
    else:
        assert alone is not None  # the caller knows the kind
        report = ddp_report(setup, alone)
    return replace(report, nccl_bytes=nccl_bytes(setup.sharding))


def nccl_bytes(sharding: Sharding) -> tuple[int, int]:
    """What NCCL takes for its communicators on one card: (usual, largest) bytes; HSDP has two of them."""
    communicators = 2 if sharding.sharding == "hsdp" else 1
    usual = _NCCL_PAIR_BYTES if sharding.num_gpus == 2 else _NCCL_BYTES
    return communicators * usual, communicators * _NCCL_LARGEST_BYTES


def _broadcast_bytes(setup: Setup) -> int:
    """What DDP copies weights to when it is made, so that all ranks start alike.

    Tensors are put together until 250 MiB are reached, and two such flat copies are on their way at a time
    (nn/parallel/distributed.py, `broadcast_bucket_size`; csrc/distributed/c10d/comm.cpp). Left out: QLoRA's.
    """
    if isinstance(setup.method, QLoRA):
        return 0
    element = recipe_of(setup).base
    buckets, open_bytes = [0], 0
    for numel in _numels(setup.model):
        open_bytes += numel * element
        if open_bytes >= _BROADCAST_BYTES:
            buckets.append(block_bytes(open_bytes))
            open_bytes = 0
    buckets.append(block_bytes(open_bytes))
    return max([one + other for one, other in pairwise(buckets)])


def _numels(model: Model) -> Iterator[int]:
    """Elements of the base's parameters in their order, layer after layer."""
    own = [tensor for tensor in model.tensors if not tensor.tied_to]
    for layered, group in groupby(own, key=lambda tensor: bool(tensor.layers)):
        tensors = list(group)
        if not layered:
            yield from (tensor.numel for tensor in tensors)
        for layer in sorted({layer for tensor in tensors for layer in tensor.layers}):
            yield from (tensor.numel for tensor in tensors if layer in tensor.layers)


def ddp_report(setup: Setup, alone: MemoryReport) -> MemoryReport:
    """One GPU's report with DDP's buckets beside it, from the wrapping on.

    Buckets are flat copies of all gradients (`gradient_as_bucket_view`, off by default, would do without):
    torch 2.13, csrc/distributed/c10d/reducer.cpp, `initialize_buckets`.
    """
    kept = resident(setup)
    buckets = kept.gradients_bytes
    weights = kept.base_weights_bytes + kept.adapter_weights_bytes
    first = weights + _broadcast_bytes(setup)
    phases = tuple(
        phase
        if phase.name == "load"
        else replace(
            phase,
            allocated_bytes=phase.allocated_bytes + buckets,
            peak_allocated_bytes=max(
                phase.peak_allocated_bytes + buckets, first if phase.name == "attach" else 0
            ),
        )
        for phase in alone.phases
    )
    if first > alone.peak_allocated_bytes + buckets:  # a tiny batch over a frozen model
        return replace(
            alone,
            setup=setup.to_dict(),
            parts=Parts(
                base_weights=kept.base_weights_bytes,
                adapter_weights=kept.adapter_weights_bytes,
                temporaries=first - weights,
            ),
            phases=phases,
            peak_phase="attach",
            provenance={**alone.provenance, "rank": 0},
        )
    report = replace(
        alone,
        setup=setup.to_dict(),
        parts=replace(alone.parts, gradients=alone.parts.gradients + buckets),
        phases=phases,
        provenance={**alone.provenance, "rank": 0},
    )
    return with_load(report)
