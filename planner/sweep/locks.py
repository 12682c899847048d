"""Who may write a sweep's folder, and who may measure on this machine: one at a time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from planner.errors import PlannerError
from planner.measure.locks import file_lock

__all__ = ["folder_alone", "one_at_a_time"]


@contextlib.contextmanager
def folder_alone(folder: Path) -> Iterator[None]:
    """Hold a sweep's folder, made where there is none. Raises PlannerError where another sweep holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise PlannerError(
            f"--out {folder} cannot be written ({error.strerror}); give another folder."
        ) from None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, handle)
        try:
            stack.enter_context(file_lock(handle, wait=False))
        except OSError:
            raise PlannerError(
                f"another sweep writes into {folder}; wait for it, or give another --out."
            ) from None
        yield


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other worker of a sweep measures on this machine."""
    path = Path(tempfile.gettempdir()) / f"vram-planner-sweep-{os.getuid() if os.name == 'posix' else 0}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        with file_lock(handle):
            yield
    finally:
        os.close(handle)
