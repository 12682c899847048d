"""Measure: the real training step on a CUDA device, in a process of its own, and its records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.report import MemoryReport
    from planner.spec import Setup

__all__ = ["measure"]


def measure(setup: Setup, **options: Any) -> MemoryReport:
    """The memory of the training step of `setup` on a CUDA device; see `planner.measure.probe.measure`."""
    from planner.measure.probe import measure as measured

    return measured(setup, **options)
