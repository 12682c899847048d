"""What every test may rely on: the repository's root, a quiet environment, the command, a browser.

No test sees the user's own Hugging Face cache or token, nor settings of the planner's environment.
"""

from __future__ import annotations

import gc
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent

# Before any test imports huggingface_hub, which reads these once, at import.
_CACHE = tempfile.mkdtemp(prefix="vram-planner-tests-")
os.environ["HF_HOME"] = os.path.join(_CACHE, "huggingface")
os.environ["PLANNER_CACHE_DIR"] = os.path.join(_CACHE, "planner")
os.environ["PLANNER_RECORDS_DIR"] = os.path.join(_CACHE, "records")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE", "PLANNER_ALLOW_MEASURE"):
    os.environ.pop(_name, None)

PlannerCommand = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_finish() -> None:
    """What is imported lives as long as the process: later garbage collections pass it by."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tables whose rows the tests of this run recorded."""
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    recorded = [item for report in reports for item in getattr(report, "user_properties", ())]
    for name, (title, header) in TABLES.items():
        rows = sorted(row for key, row in recorded if key == name)
        if rows:
            terminalreporter.section(title)
            terminalreporter.write_line(header)
            for row in rows:
                terminalreporter.write_line(row)


def pytest_unconfigure() -> None:
    """The caches die with the run."""
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def planner_command() -> PlannerCommand:
    """`planner_command("estimate", "--model", "gpt2")` runs it in a process of its own, exit code `code`."""

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        answer = subprocess.run(
            [sys.executable, "-m", "planner", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert answer.returncode == code, f"{arguments}: {answer.returncode}\n{answer.stdout}{answer.stderr}"
        return answer

    return run


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium; skips where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on this machine; install it with: apt-get install chromium")


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
