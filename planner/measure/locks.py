"""Locks between processes, on files: they end with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from planner.errors import DeviceError

__all__ = ["file_lock", "one_measurement"]


@contextlib.contextmanager
def file_lock(handle: int, *, wait: bool = True) -> Iterator[None]:
    """Hold the open file `handle` for this process alone; without `wait`, OSError where another has it."""
    _take(handle, wait=wait)
    try:
        yield
    finally:
        _release(handle)


@contextlib.contextmanager
def one_measurement() -> Iterator[None]:
    """At most one measurement at a time on this machine. Raises DeviceError where another one runs."""
    path = Path(tempfile.gettempdir()) / "vram-planner-measure.lock"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError:  # somebody else's file that may not be opened: measure without the lock
        yield
        return
    try:
        try:
            _take(handle, wait=False)
        except OSError:
            raise DeviceError(
                "another measurement is running on this machine; wait for it to end, or cancel it."
            ) from None
        yield
    finally:
        os.close(handle)


if sys.platform == "win32":
    import msvcrt

    def _take(handle: int, *, wait: bool) -> None:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)

    def _release(handle: int) -> None:
        os.lseek(handle, 0, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _take(handle: int, *, wait: bool) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _release(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_UN)
