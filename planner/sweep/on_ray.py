"""A sweep on a Ray cluster: Ray chooses the node and the GPU, and tries again what was lost with a worker.

Only the process that started the sweep writes; a task only answers. So a task that Ray runs twice leaves one
row, and one whose worker or node dies is run again.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from planner.errors import DeviceError, PlannerError
from planner.sweep.jobs import Job
from planner.sweep.process import Answering
from planner.sweep.rows import failed_row

__all__ = ["ray_rows"]

_TRIES_OF_RAY = 5  # of a task whose worker or node is lost
_TASKS_AHEAD = 4  # for each processor: enough to be scheduled, few enough to cancel
_POLL_SECONDS = 5.0
_CONNECT_SECONDS = 10.0

_answering: dict[tuple[str, float], Answering] = {}  # of this process, where it is one of Ray's


def ray_rows(
    chunks: Sequence[Sequence[Job]], verb: str, *, address: str, time_limit_s: float
) -> Generator[list[dict[str, Any]], None, None]:
    """Rows as they come from the cluster at `address` ("": RAY_ADDRESS, a running one, or one of its own).

    A simulation takes one CPU, a measurement one GPU. Raises PlannerError where Ray is not installed or
    cannot be reached, DeviceError where the cluster has no GPU to measure on.
    """
    ray = _connected(address)
    try:
        yield from _gathered(ray, chunks, verb, time_limit_s)
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise PlannerError(
            "ray is not installed; run pip install -r requirements-ray.txt, or leave --ray out."
        ) from None
    _check_reachable(address)
    package = str(Path(__file__).resolve().parents[1])
    try:
        ray.init(
            address=address or None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"py_modules": [package]},  # every node runs this very version
        )
    except Exception as error:
        said = str(error).strip().partition("\n")[0][:200]
        raise PlannerError(f"Ray cannot be used at {address or 'its usual address'} ({said}).") from None
    return ray


def _check_reachable(address: str) -> None:
    """Raises PlannerError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:
        return  # "", auto, ray://HOST:PORT
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PlannerError(
            f"no Ray cluster answers at {address} ({reason}); ray status shows where one runs."
        ) from None


def _gathered(
    ray: Any, chunks: Sequence[Sequence[Job]], verb: str, time_limit_s: float
) -> Generator[list[dict[str, Any]], None, None]:
    measuring = verb == "measure"
    resources = ray.cluster_resources()
    if measuring and not resources.get("GPU"):
        raise DeviceError("the Ray cluster has no GPU to measure on; add a node that has one.")
    task = ray.remote(
        num_cpus=1, num_gpus=1 if measuring else 0, max_retries=_TRIES_OF_RAY, retry_exceptions=False
    )(_task)
    ahead = max(1, _TASKS_AHEAD * int(resources.get("CPU", 1)))
    todo, pending = list(reversed(chunks)), dict[Any, Sequence[Job]]()
    try:
        while todo or pending:
            while todo and len(pending) < ahead:
                chunk = todo.pop()
                pending[task.remote(verb, list(chunk), time_limit_s)] = chunk
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=_POLL_SECONDS)
            for answer in ready:
                chunk = pending.pop(answer)
                try:
                    yield ray.get(answer)
                except ray.exceptions.RayError as error:
                    if isinstance(getattr(error, "cause", None), DeviceError):
                        raise DeviceError(str(error.cause)) from None
                    if len(chunk) > 1:  # one of them is at fault: each on its own
                        todo.extend([job] for job in reversed(chunk))
                    else:
                        reason = f"Ray lost its worker {1 + _TRIES_OF_RAY} times ({type(error).__name__})."
                        yield [failed_row(chunk[0], verb, reason)]
    finally:
        for answer in pending:
            ray.cancel(answer, force=True)


def _task(verb: str, jobs: Sequence[Job], time_limit_s: float) -> list[dict[str, Any]]:
    """In a process of Ray's: the rows of some jobs, by a warm process that stays for the next task."""
    key = (verb, time_limit_s)
    if key not in _answering:
        _answering[key] = Answering(verb, time_limit_s=time_limit_s)
    return list(_answering[key].rows(jobs))
