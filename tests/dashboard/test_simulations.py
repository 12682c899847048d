"""The queue of simulations: one process for everybody, and every way in which it can end. Without torch."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from planner.compare import full_of
from planner.dashboard import simulations as module
from planner.dashboard.simulations import Simulated, Simulations, key_of
from planner.dashboard.worker import Worker
from planner.errors import PlannerError
from planner.estimate import estimate
from planner.spec import LoRA, Setup

STAND_IN = [sys.executable, str(Path(__file__).parent / "stand_in_worker.py")]
SETUP = Setup(model="openai-community/gpt2", method=LoRA(target_modules=("c_attn",)), gpu="t4")
EXITS, KILLED, HANGS, REFUSES, BABBLES, IDLES = (SETUP.replace(seq_len=n) for n in range(101, 107))


def eventually(holds: Callable[[], object], what: str) -> None:
    """Wait up to a minute."""
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError(f"not within a minute: {what}")


def gone(pid: int) -> bool:
    """Whether no such process runs (a zombie does not run)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture
def queue() -> Iterator[Simulations]:
    """A queue before a stand-in process."""
    made = Simulations(start=lambda: Worker(STAND_IN), time_limit_s=20, most_kept=3, most_waiting=2)
    yield made
    made.close()


def end_of(queue: Simulations, setup: Setup, visitor: str = "anna") -> Simulated:
    """Ask and wait."""
    queue.ask(setup, visitor)
    eventually(lambda: (one := queue.of(setup)) is None or not one.active, "an end")
    found = queue.of(setup)
    assert found is not None
    return found


def test_a_simulation_comes_from_the_process_and_is_kept(queue) -> None:
    assert queue.of(SETUP) is None
    assert queue.pid is None
    found = end_of(queue, SETUP)
    assert found.state == "done"
    assert found.report is not None
    assert found.report.source == "simulation"
    assert found.report.parts == estimate(SETUP).parts
    assert found.begins == (("forward", 1, 0), ("backward", 1, 1))
    pid = queue.pid
    assert pid not in (None, os.getpid())
    assert queue.ask(SETUP, "bert").state == "done"
    assert end_of(queue, full_of(SETUP)).state == "done"
    assert queue.pid == pid, "the process stays warm"


def test_a_gpu_of_the_same_capability_needs_no_second_run(queue) -> None:
    end_of(queue, SETUP.replace(gpu="rtx-4090"))
    found = queue.of(SETUP.replace(gpu="l40s"))
    assert found is not None
    assert found.report is not None
    assert found.report.setup["gpu"] == "l40s"
    assert queue.of(SETUP) is None  # another capability: other workspaces and attention kernels
    assert key_of(SETUP.replace(gpu="24GiB")) != key_of(SETUP)


def test_only_the_latest_results_are_kept(queue) -> None:
    for seq_len in (8, 16, 24, 32):
        end_of(queue, SETUP.replace(seq_len=seq_len))
    assert [queue.of(SETUP.replace(seq_len=n)) is not None for n in (8, 16, 24, 32)] == [
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("setup", "line"),
    [
        (EXITS, "the simulating process ended with exit code 3. Try again."),
        (KILLED, "killed (SIGKILL); the machine may have run out of main memory. Try again."),
        (REFUSES, "model.py cannot be simulated"),
        (IDLES, "the simulating process ended. Try again."),
    ],
    ids=["exits", "killed", "refuses", "idles"],
)
def test_a_failure_is_one_line_without_a_path_and_the_next_job_runs(queue, setup, line) -> None:
    found = end_of(queue, setup)
    assert found.state == "failed"
    assert found.reason.endswith(line)
    assert "/srv" not in found.reason
    assert "\n" not in found.reason
    assert end_of(queue, SETUP).state == "done"


def test_a_failed_simulation_can_be_asked_for_again(queue) -> None:
    assert end_of(queue, EXITS).state == "failed"
    assert queue.ask(EXITS, "anna").active


def test_nonsense_on_its_output_is_passed_over(queue) -> None:
    assert end_of(queue, BABBLES).state == "done"


def test_it_takes_no_longer_than_its_limit() -> None:
    queue = Simulations(start=lambda: Worker(STAND_IN), time_limit_s=0.5)
    try:
        assert end_of(queue, SETUP).state == "done"  # from now on the process is ready
        found = end_of(queue, HANGS)
        assert found.state == "failed"
        assert "longer than 0.5 s" in found.reason
        assert queue.pid is None
    finally:
        queue.close()


def test_cancel_ends_the_process_and_the_next_job_starts_another(queue) -> None:
    queue.ask(HANGS, "anna")
    eventually(lambda: queue.of(HANGS).phase == "forward", "its first phase")
    assert queue.of(HANGS).share > 0
    pid = queue.pid
    queue.cancel(HANGS, "anna")
    eventually(lambda: gone(pid), "the end of the process")
    eventually(lambda: queue.of(HANGS) is None, "no trace of it")
    assert end_of(queue, SETUP).state == "done"
    assert queue.pid != pid


def test_what_another_session_wants_as_well_is_not_cancelled(queue) -> None:
    queue.ask(HANGS, "anna")
    queue.ask(HANGS, "bert")
    eventually(lambda: queue.of(HANGS).state == "running", "its start")
    queue.cancel(HANGS, "anna")
    time.sleep(0.4)
    assert queue.of(HANGS).state == "running"
    queue.leave("bert")
    eventually(lambda: queue.of(HANGS) is None, "its end")


def test_jobs_wait_in_order_and_not_too_many(queue) -> None:
    queue.ask(HANGS, "anna")
    eventually(lambda: queue.of(HANGS).state == "running", "its start")
    assert queue.ask(SETUP, "bert").ahead == 1
    assert queue.ask(full_of(SETUP), "bert").ahead == 2
    with pytest.raises(PlannerError, match="2 simulations are waiting already"):
        queue.ask(SETUP.replace(seq_len=8), "carl")
    queue.forget_waiting("bert")
    assert queue.of(SETUP) is None
    assert queue.of(HANGS).state == "running"


def test_the_process_ends_with_the_last_visitor(queue) -> None:
    end_of(queue, SETUP, "anna")
    queue.ask(SETUP, "bert")
    pid = queue.pid
    queue.leave("anna")
    assert not gone(pid)
    queue.leave("bert")
    eventually(lambda: gone(pid), "the end of the process")
    assert queue.of(SETUP).state == "done", "the results stay"
    assert end_of(queue, full_of(SETUP)).state == "done", "and it starts again"


def test_leaving_in_the_middle_of_a_job_ends_it(queue) -> None:
    queue.ask(HANGS, "anna")
    eventually(lambda: queue.of(HANGS).phase, "its first phase")
    pid = queue.pid
    queue.leave("anna")
    eventually(lambda: gone(pid), "the end of the process")


def test_closing_ends_the_process_and_answers_no_more(queue) -> None:
    queue.ask(HANGS, "anna")
    eventually(lambda: queue.of(HANGS).phase, "its first phase")
    pid = queue.pid
    queue.close()
    assert gone(pid)
    queue.close()


def test_the_queue_imports_no_torch() -> None:
    assert not {"torch", "streamlit"} & set(vars(module))


def test_a_program_that_is_not_there_is_one_line() -> None:
    queue = Simulations(start=lambda: Worker(["/nowhere/python"]))
    try:
        found = end_of(queue, SETUP)
        assert found.reason == "the simulation cannot be started (No such file or directory)."
    finally:
        queue.close()
