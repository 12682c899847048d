"""Simulations of many setups at once, ahead of the moment they are asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from planner.measure.probe import simulated
from planner.measure.process import Child
from planner.record import Prediction
from planner.spec import Setup

__all__ = ["Job", "simulations"]

Job = tuple[Setup, Mapping[str, Any] | None]  # a setup and the device it is simulated for
_MOST_PROCESSES = 6


@contextmanager
def simulations(
    jobs: Sequence[Job], *, time_limit_s: float, python: str | None = None
) -> Iterator[Callable[[int, float], Prediction | None]]:
    """Start simulating all jobs in order, in some processes; all of them end with the block.

    Gives a function of (number of the job, seconds to wait at most): its prediction, or None where it did
    not come in time.
    """
    own = threading.local()
    started: list[Child] = []
    over = threading.Event()

    def simulation(job: Job) -> Prediction:
        setup, device = job
        if over.is_set():
            return Prediction(reason="cancelled")
        if getattr(own, "child", None) is None:
            own.child = Child(python=python, cpu_only=True)
            started.append(own.child)
        found = simulated(own.child, setup, time_limit_s, device=device, cancelled=over.is_set)
        if found.report is None:  # a process that died or was ended simulates nothing more
            own.child.close()
            own.child = None
        return found

    pool = ThreadPoolExecutor(max_workers=max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2)))
    futures = [pool.submit(simulation, job) for job in jobs]

    def predict(number: int, seconds: float) -> Prediction | None:
        try:
            return futures[number].result(timeout=max(0.0, seconds))
        except TimeoutError:
            return None

    try:
        yield predict
    finally:
        over.set()
        pool.shutdown(wait=True, cancel_futures=True)
        for child in started:
            child.close()
