"""Waiting for a page in a real browser."""

from __future__ import annotations

from collections.abc import Callable

import pytest


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


def wide(page) -> int:
    """By how much the page scrolls sideways."""
    return page.evaluate(
        "Math.max(document.documentElement.scrollWidth - window.innerWidth, "
        "(e => e.scrollWidth - e.clientWidth)(document.querySelector('[data-testid=stMain]')))"
    )


def serious_findings(page) -> list[str]:
    """What axe-core calls serious or critical on the page; skips where axe is not installed."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    return [
        f"{one['id']}: {one['help']} | {node['html'][:160]} | {node.get('failureSummary', '')[:200]}"
        for one in axe.Axe().run(page).response["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
