"""What becomes of a simulated step on a card that is too small for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.advise.fits import context_bytes, verdict
from planner.report import MemoryReport
from planner.simulate.run import simulate
from planner.spec import Setup
from planner.units import gib

__all__ = ["simulated_on_gpu"]


def simulated_on_gpu(setup: Setup, **options: Any) -> MemoryReport:
    """`simulate(setup, **options)`; where it does not fit the setup's GPU, with the request that fails there.

    The step is then simulated a second time on a device of that size (its capacity without the CUDA
    context), where the allocator gives cached memory back before it gives up. The report keeps the
    peaks of the whole step; `out_of_memory` and a note say where the card would stop it.
    """
    report = simulate(setup, **options)
    gpu = setup.gpu
    if gpu is None or verdict(report, gpu).word != "does not fit":
        return report
    limit_bytes = verdict(report, gpu).capacity_bytes - context_bytes(gpu)[0]
    again = simulate(setup, limit_bytes=max(limit_bytes, 1), rank=options.get("rank"))
    failure = again.out_of_memory
    if failure is None:
        note = f"On {gpu.name} the step just runs: when the card is full, cached memory is given back."
    else:
        place = f" of {failure.module}" if failure.module else ""
        note = (
            f"On {gpu.name} it stops in {failure.phase.replace('_', ' ')}, at {failure.op}{place}: "
            f"{gib(failure.requested_bytes)} asked for, {gib(failure.free_bytes)} free."
        )
    return dataclasses.replace(report, out_of_memory=failure, notes=(*report.notes, note))
