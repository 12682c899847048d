"""Simulate: the real training step, op by op, on tensors without storage, through CUDA's allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.catalog.gpus import Gpu
    from planner.report import MemoryReport
    from planner.spec import Setup

__all__ = ["simulate", "simulate_step"]


def simulate(setup: Setup, **options: Any) -> MemoryReport:
    """The memory of the training step of `setup`, simulated; see `planner.simulate.run.simulate`."""
    from planner.simulate.run import simulate as simulated

    return simulated(setup, **options)


def simulate_step(
    build: Callable[[], Any], step: Callable[[Any], Any], *, gpu: Gpu | str | None = None, **options: Any
) -> MemoryReport:
    """The memory of anyone's own training step; see `planner.simulate.own_step.simulated_own_step`."""
    from planner.simulate.own_step import simulated_own_step as simulated

    return simulated(build, step, gpu=gpu, **options)
