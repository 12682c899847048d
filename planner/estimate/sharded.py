"""The estimate of one rank among several: DDP's copy, FSDP2's chunks, DeepSpeed's slices.

Rank 0 is meant, whose chunks of what does not divide evenly are the largest.
"""

from __future__ import annotations

from dataclasses import replace

from planner.estimate.fsdp import fsdp_report
from planner.estimate.resident import resident
from planner.estimate.zero import zero_report
from planner.report import MemoryReport
from planner.sharding import Sharding
from planner.spec import Setup

__all__ = ["ddp_report", "nccl_bytes", "sharded_report"]

# NCCL's buffers for one communicator, (usual, largest): on the card, outside torch. Usual: 4 A100 with
# NVLink, 544 MB between two and 688 MB among more (NVIDIA/nccl issue 964). Largest: 1.6 GB (NVIDIA/nccl issue
# 864, where the maintainers say that it grows with channels and communicators, and beyond 2 nodes no more
# with the number of ranks).
_NCCL_PAIR_BYTES = 544 * 10**6
_NCCL_BYTES = 688 * 10**6
_NCCL_LARGEST_BYTES = 1_600 * 10**6


def sharded_report(setup: Setup, alone: MemoryReport | None = None) -> MemoryReport:
    """The report of rank 0 of a setup with several GPUs; DDP adds to `alone`, the same run on one."""
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


def ddp_report(setup: Setup, alone: MemoryReport) -> MemoryReport:
    """One GPU's report with DDP's buckets beside it, from the wrapping on.

    Buckets are flat copies of all gradients (`gradient_as_bucket_view`, off by default, would do without):
    torch 2.13, csrc/distributed/c10d/reducer.cpp, `initialize_buckets`.
    """
    buckets = resident(setup).gradients_bytes
    phases = tuple(
        phase
        if phase.name == "load"
        else replace(
            phase,
            allocated_bytes=phase.allocated_bytes + buckets,
            peak_allocated_bytes=phase.peak_allocated_bytes + buckets,
        )
        for phase in alone.phases
    )
    return replace(
        alone,
        setup=setup.to_dict(),
        parts=replace(alone.parts, gradients=alone.parts.gradients + buckets),
        phases=phases,
        provenance={**alone.provenance, "rank": 0},
    )
