"""The benchmarks of the page in short: several sessions at once, and what a load, an input and idling cost.

Seconds are not held here, the machine may be shared: `python -m benchmarks.dashboard_budget` prints them.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import dashboard_budget, dashboard_soak

ROOT = Path(__file__).resolve().parents[2]


def printed(module: str, *words: str) -> dict[str, Any]:
    """The JSON object that a benchmark prints."""
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--json", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0, f"{found.get('errors')} in {found}"
    return found


@pytest.fixture(scope="module")
def tabs(chromium: str) -> None:
    """A browser that playwright can drive."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")


def test_six_sessions_at_once_see_no_error(tabs) -> None:
    found = printed("dashboard_soak", "--sessions", "6", "--browsers", "1", "--seconds", "15", "--think", "2")
    assert found["errors"] == []
    assert found["script_runs"] >= 5 * 2
    assert found["browser_inputs"] >= 1
    assert found["memory_end_mib"] < 600


def test_what_a_load_an_input_and_idling_cost(tabs) -> None:
    found = printed("dashboard_budget", "--inputs", "4")
    assert set(found) == set(dashboard_budget.BUDGET)
    assert found["idle_frames"] == 0, "an idle page runs its script again"
    assert found["load_kib"] < 12 * 1024  # 9.2 MiB seen, plotly.js is half of it
    assert found["again_kib"] < 1024, "a second visit reads the browser's cache"
    assert found["input_kib"] < 300  # 80 KiB seen
    assert found["rerun_ms"] < 600 * found["estimate_ms"]  # 166 times seen on an idle machine


def run(**values: Any) -> dashboard_soak.Run:
    """One run of the script, as a visitor saw it."""
    return dashboard_soak.Run(**{"verdict_s": 0.1, "finished_s": 0.2, **values})


class _Alive:
    """A server that runs."""

    class process:
        returncode = None

        @staticmethod
        def poll() -> None:
            """Still there."""


@pytest.mark.parametrize(
    "runs, memory, says",
    [
        ([run()], [100, 100, 100, 100, 100, 100], None),
        ([run(errors=["KeyError: x"])], [100] * 6, "KeyError: x"),
        ([run(verdict_s=None)], [100] * 6, "without a verdict"),
        ([run()], [100, 200, 200, 200, 201, 202], None),  # a cold start is no leak
        ([run()], [100, 120, 140, 160, 200, 230], "grew by 70 MiB"),
    ],
)
def test_the_soak_finds_errors_and_growth(runs, memory, says) -> None:
    import argparse

    given = argparse.Namespace(sessions=1, browsers=0, seconds=6)
    soak = dashboard_soak.Soak(runs=runs, memory=[(float(at), size << 20) for at, size in enumerate(memory)])
    errors = dashboard_soak.figures(soak, _Alive(), given)["errors"]
    assert errors == [] if says is None else says in errors[0]
