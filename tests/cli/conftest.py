"""The real command line, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def command() -> Command:
    """Runs `python -m planner WORDS` offline and returns exit code and output."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONWARNINGS": "error"}
        return subprocess.run(
            [sys.executable, "-m", "planner", *words],
            capture_output=True,
            text=True,
            encoding="utf-8",
            cwd=ROOT,
            env=environment,
            timeout=60,
        )

    return run


@pytest.fixture(scope="session")
def answer(command: Command) -> Callable[..., dict[str, Any]]:
    """Runs `python -m planner WORDS --json`: one JSON object on stdout, and nothing on stderr."""

    def run(*words: str) -> dict[str, Any]:
        done = command(*words, "--json")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout.endswith("}\n")
        assert done.stdout.count("\n") == 1
        found = json.loads(done.stdout)
        assert found["schema"] == 1
        return found

    return run
