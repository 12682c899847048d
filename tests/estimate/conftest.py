"""The error table of estimate against simulation, printed at the end of the run."""

from __future__ import annotations

import pytest

_HEADER = f"{'setup':<62} {'simulated MiB':>13} {'peak':>8}  worst part, worst phase"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each compared setup, by the tests' recorded properties (pytest-xdist hands them on)."""
    rows = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        for name, value in getattr(report, "user_properties", ())
        if name == "estimate_against_simulation"
    ]
    if rows:
        terminalreporter.section("estimate against simulation, peak allocated memory")
        terminalreporter.write_line(_HEADER)
        for row in sorted(rows):
            terminalreporter.write_line(row)
