"""Waiting for a page in a real browser."""

from __future__ import annotations

from collections.abc import Callable


def settle(page) -> None:
    """Wait until the script has run and the figures are drawn."""
    page.wait_for_timeout(150)
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=60_000)
    page.wait_for_timeout(150)


def eventually(page, holds: Callable[[], bool], what: str) -> None:
    """Wait up to ten seconds until something holds."""
    for _ in range(100):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not within ten seconds: {what}")
