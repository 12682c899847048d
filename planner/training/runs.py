"""Which run a setup is: of one device, or of one rank among several."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from planner.spec import Setup
from planner.training.run import PhaseHook, TrainingRun

__all__ = ["run_of"]


def run_of(setup: Setup, device: torch.device, phases: PhaseHook, **options: Any) -> TrainingRun:
    """The run of a setup on this device; of one rank where several take part, whose process group must stand.

    Raises SetupError where there is none, and for DeepSpeed's stages, which are not run here.
    """
    if not setup.sharding.is_distributed or not dist.is_initialized():
        return TrainingRun(setup, device, phases, **options)
    from planner.training.sharded_run import ShardedRun  # torch.distributed.fsdp takes a second to import

    return ShardedRun(setup, device, phases, **options)
