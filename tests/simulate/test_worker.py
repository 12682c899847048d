"""The warm simulating process: its answers, its silence, and that it never outlives its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from planner.errors import TraceError
from planner.report import MemoryReport
from planner.simulate import simulate, worker
from planner.spec import LoRA, Setup, Training
from planner.units import GIB

ROOT = Path(__file__).resolve().parents[2]
SETUP = Setup(
    model="EleutherAI/pythia-70m", method=LoRA(lora_rank=4), training=Training(seq_len=32), gpu="t4"
)
LARGE = Setup(model="meta-llama/Llama-3.1-405B", training=Training(seq_len=64))  # several seconds of work


class Talk:
    """A worker and a conversation with it."""

    def __init__(self, *flags: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "planner.simulate.worker", *flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def hear(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def ask(self, number: int, setup: dict[str, Any]) -> None:
        """Send a job."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"id": number, "setup": setup}) + "\n")
        self.process.stdin.flush()

    def answer(self, number: int, setup: dict[str, Any]) -> list[dict[str, Any]]:
        """Everything it says to one job."""
        self.ask(number, setup)
        said = [self.hear()]
        while said[-1]["event"] == "phase":
            said.append(self.hear())
        return said


@pytest.fixture
def talk() -> Iterator[Callable[..., Talk]]:
    """`talk("--idle-s", "1")` starts a worker that ends with the test."""
    started: list[Talk] = []

    def start(*flags: str, **environment: str) -> Talk:
        started.append(Talk(*flags, **environment))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        one.process.stdin.close()
        one.process.stdout.close()


def test_it_answers_as_a_simulation_here_does_and_stays_warm(talk) -> None:
    child = talk()
    assert child.hear() == {"event": "ready", "pid": child.process.pid}
    said = child.answer(1, SETUP.to_dict())
    phases = [(line["phase"], line["step"]) for line in said[:-1]]
    step = ("forward", "backward", "optimizer_step")
    assert phases == [("load", None), ("attach", None), *((name, n) for n in (1, 2) for name in step)]
    expected = simulate(SETUP)
    assert said[-1]["event"] == "report"
    assert {line["id"] for line in said} == {1}
    report = MemoryReport.from_dict(said[-1]["report"])
    assert report.to_dict() == expected.to_dict()
    begins = said[-1]["begins"]
    assert [(name, n) for name, n, _ in begins] == phases
    starts = [at for _, _, at in begins]
    assert starts == sorted(starts)
    assert 0 <= starts[0] < starts[-1] <= report.timeline[-1][0]

    refused = child.answer(2, {"model": "params:7e9"})
    assert [line["event"] for line in refused] == ["failed"]
    assert "params:7e9" in refused[0]["message"]
    assert "unknown setting 'lora_rang'" in child.answer(3, {"model": "gpt2", "lora_rang": 1})[0]["message"]
    again = child.answer(4, SETUP.to_dict())
    assert again[-1]["report"] == said[-1]["report"], "the same to the byte, also the second time"

    child.ask(5, LARGE.to_dict())
    assert child.hear()["phase"] == "load"
    child.process.stdin.close()  # in the middle of a job
    assert child.process.wait(timeout=30) == 4


def test_it_ends_when_nothing_comes_for_a_while(talk) -> None:
    child = talk("--idle-s", "0.5")
    assert child.hear()["event"] == "ready"
    assert child.process.wait(timeout=30) == 0


def test_a_missing_library_is_named(talk, tmp_path) -> None:
    (tmp_path / "peft.py").write_text("raise ModuleNotFoundError('no peft', name='peft')\n")
    child = talk(PYTHONPATH=str(tmp_path))
    assert child.hear() == {"event": "missing", "package": "peft"}
    assert child.process.wait(timeout=20) == 1


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")],
    ids=["python", "torch"],
)
def test_running_out_of_main_memory_is_one_line_and_the_end(monkeypatch, error) -> None:
    def report(*_: object) -> None:
        try:
            raise error
        except Exception as cause:
            raise TraceError("aten.mm cannot be simulated") from cause  # as the simulation passes it on

    said: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(worker, "_report", report)
    fit = worker._serve({"id": 1, "setup": {}}, lambda event, **values: said.append((event, values)), 2 * GIB)
    assert not fit
    assert said == [
        ("failed", {"id": 1, "message": "the simulation needs more than 2.0 GiB of main memory."})
    ]


def test_an_unforeseen_error_is_one_line_and_not_the_end(monkeypatch) -> None:
    def report(*_: object) -> None:
        raise RuntimeError("shapes differ\nfile /srv/x.py")

    said: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(worker, "_report", report)
    assert worker._serve({"id": 1, "setup": {}}, lambda event, **values: said.append((event, values)), GIB)
    assert said[0][1]["message"] == (
        "the simulation failed (RuntimeError: shapes differ); choose another attention or method."
    )


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX's")
def test_it_ends_when_its_parent_is_killed() -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'planner.simulate.worker'], stdin=subprocess.PIPE,\n"
        "    stdout=subprocess.PIPE, start_new_session=True)\n"
        "print(child.stdout.readline().decode(), flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(json.loads(parent.stdout.readline())["pid"])
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the worker has outlived its parent")
