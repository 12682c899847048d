"""A sweep on this machine: some warm processes, each with a thread that feeds it."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Generator, Sequence
from typing import Any

from planner.sweep.jobs import Job
from planner.sweep.process import Answering

__all__ = ["local_rows", "usual_workers"]

Rows = list[dict[str, Any]]


def usual_workers(verb: str) -> int:
    """One for each processor this process may use; one where there is a GPU to be measured on."""
    if verb == "measure":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_rows(
    chunks: Sequence[Sequence[Job]],
    verb: str,
    *,
    workers: int,
    time_limit_s: float,
    command: list[str] | None = None,
) -> Generator[Rows, None, None]:
    """Rows as they come, some at a time, from `workers` processes that end with the iterator.

    Raises what a worker met: DeviceError where nothing can be measured.
    """
    todo: queue.SimpleQueue[Sequence[Job]] = queue.SimpleQueue()
    for chunk in chunks:
        todo.put(chunk)
    done: queue.SimpleQueue[Rows | BaseException | None] = queue.SimpleQueue()
    answering = [
        Answering(verb, time_limit_s=time_limit_s, command=command) for _ in range(min(workers, len(chunks)))
    ]
    threads = [threading.Thread(target=_work, args=(one, todo, done), daemon=True) for one in answering]
    for thread in threads:
        thread.start()
    try:
        left = len(threads)
        while left:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for one in answering:
            one.close()
        for thread in threads:
            thread.join()


def _work(
    one: Answering,
    todo: queue.SimpleQueue[Sequence[Job]],
    done: queue.SimpleQueue[Rows | BaseException | None],
) -> None:
    """A thread's life: take a chunk, hand its rows on, until there is none."""
    try:
        while True:
            done.put(list(one.rows(todo.get_nowait())))
    except queue.Empty:
        done.put(None)
    except BaseException as error:
        done.put(error)
    finally:
        one.close()
