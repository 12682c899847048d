"""Waiting for a page in a real browser."""

from __future__ import annotations

from collections.abc import Callable


def settle(page) -> None:
    """Wait until the script has run and the figures are drawn."""
    page.wait_for_timeout(150)
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=60_000)
    page.wait_for_timeout(150)


def eventually(page, holds: Callable[[], bool], what: str) -> None:
    """Wait up to a minute until something holds: how fast it is belongs to the benchmarks."""
    for _ in range(600):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not within a minute: {what}")
