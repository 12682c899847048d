"""The measuring process: a rehearsal by the real one on the CPU, and every way in which it can be lost."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from planner import FullFineTuning, simulate
from planner.errors import DeviceError, ModelError, PlannerError
from planner.measure import measure
from planner.measure.probe import measured, rehearse, rehearsed, simulated
from planner.measure.process import Child
from planner.model import Model
from tests.measure.made_up import SETUP, VERSIONS

PHASES = ["load", "attach", *["forward", "backward", "optimizer_step"] * 2]


def gone(group: int) -> bool:
    """Whether no process of the group is left; one that only waits to be reaped is gone."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _parent, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            return False
    return True


@pytest.fixture(scope="module")
def child() -> Any:
    """One real process for several jobs."""
    with Child(cpu_only=True) as process:
        yield process
    assert gone(process.pid)


def test_a_rehearsal_runs_every_phase_and_claims_no_memory(child: Child) -> None:
    heard: list[Mapping[str, Any]] = []
    found = rehearsed(child, SETUP.replace(attention="efficient"), 120, on_event=heard.append)
    assert [phase.name for phase in found.phases] == PHASES
    assert [phase.step for phase in found.phases] == [None, None, 1, 1, 1, 2, 2, 2]
    assert all(phase.seconds > 0 for phase in found.phases)
    assert found.parameters.total == SETUP.model.parameters + found.parameters.added
    assert found.parameters.trainable == found.parameters.added > 0
    assert found.versions["torch"]
    assert "_bytes" not in json.dumps(found.to_dict())
    assert [event["name"] for event in heard if event["event"] == "enter"] == PHASES


def test_the_same_process_rehearses_full_fine_tuning_with_accumulation(child: Child) -> None:
    found = rehearsed(child, SETUP.replace(method=FullFineTuning(), gradient_accumulation_steps=2), 120)
    assert len(found.phases) == 2 + 2 * 5
    assert found.parameters.trainable == found.parameters.total


def test_the_child_s_simulation_is_the_simulation(child: Child) -> None:
    device = {"name": "NVIDIA H200", "capability": [9, 0], "total_bytes": 150_000_000_000, "driver": "580"}
    found = simulated(child, SETUP, 120, device=device)
    assert found.report is not None
    assert found.report.parts == simulate(SETUP, gpu="h200").parts


def test_a_model_that_cannot_be_built_is_refused_in_its_words(child: Child) -> None:
    config = '{"model_type": "gpt2", "n_embd": 10, "n_head": 3}'
    strange = SETUP.replace(method=FullFineTuning(), model=Model(id="mine/strange", config_json=config))
    with pytest.raises((ModelError, PlannerError)) as caught:
        rehearsed(child, strange, 120)
    assert "\n" not in str(caught.value)
    assert rehearsed(child, SETUP, 120).phases  # and the process serves on


def test_no_cuda_is_a_device_error_of_one_line(child: Child) -> None:
    with pytest.raises(DeviceError) as caught:
        measured(child, SETUP, 120)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_killed_in_the_middle() -> None:
    """kill -9 at the first phase: one line, the parent goes on, nothing of the process is left."""
    pids: list[int] = []

    def kill(event: Mapping[str, Any]) -> None:
        if event["event"] == "started":
            pids.append(event["pid"])
        if event["event"] == "enter":
            os.kill(pids[0], signal.SIGKILL)

    with pytest.raises(PlannerError, match=r"killed by SIGKILL \(in load\); nothing was recorded") as caught:
        rehearse(SETUP, on_event=kill)
    assert "\n" not in str(caught.value)
    assert gone(pids[0])


def test_the_process_ends_with_its_parent() -> None:
    """The parent is killed in the middle of a run; the child notices and is gone."""
    code = (
        "import sys\nfrom planner import *\nfrom planner.measure.probe import rehearse\n"
        "s = Setup(model='openai-community/gpt2', training=Training(seq_len=1024, micro_batch_size=8))\n"
        "rehearse(s, on_event=lambda e: print(e.get('pid') or e['event'], flush=True))\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ}
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "enter\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(400):
        if gone(pid):
            break
        time.sleep(0.1)
    assert gone(pid)


def test_a_job_that_says_nothing_ends_with_standard_input() -> None:
    code = (
        "import sys, time\nfrom planner.measure import child\n"
        "child.import_libraries = lambda: None\n"
        "child._serve = lambda *_: time.sleep(60)\n"
        "sys.exit(child.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input='{"job": "measure", "setup": {}}\n', capture_output=True,
        text=True, timeout=50, check=False, cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 4


# --- a stand-in for the process, to lose it in every way without waiting for torch ----------------------


def stand_in(tmp_path: Path, script: str) -> str:
    """An interpreter that runs this instead of the measuring process."""
    path = tmp_path / "python"
    started = json.dumps({"event": "started", "pid": 0, "seed": 0, "versions": VERSIONS, "environment": {}})
    text = f"#!{sys.executable}\nimport os, sys, time\nprint({started!r}, flush=True)\n{script}\n"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


LOAD = 'print(\'{"event": "enter", "name": "load", "step": null}\', flush=True)\n'


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    python = stand_in(tmp_path, LOAD + "os.fork()\ntime.sleep(600)")
    began = time.monotonic()
    with Child(python=python) as process:
        with pytest.raises(PlannerError, match=r"longer than 4 s \(in load\) and was ended") as caught:
            list(process.events(time_limit_s=4))
        assert gone(process.pid)  # what it had started as well
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 60


def test_a_run_can_be_cancelled(tmp_path: Path) -> None:
    python = stand_in(tmp_path, LOAD + "time.sleep(600)")
    seen: list[Any] = []
    with pytest.raises(PlannerError, match="cancelled; nothing was recorded"):
        measure(SETUP, python=python, on_event=seen.append, cancelled=lambda: len(seen) == 2)
    assert [event["event"] for event in seen] == ["started", "enter"]


def test_a_listener_that_raises_ends_the_run(tmp_path: Path) -> None:
    script = "open(sys.argv[0] + '.pid', 'w').write(str(os.getpid()))\n" + LOAD + "time.sleep(600)"
    python = stand_in(tmp_path, script)

    def stop(event: Mapping[str, Any]) -> None:
        if event["event"] == "enter":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(SETUP, python=python, on_event=stop)
    assert gone(int(Path(python + ".pid").read_text()))


def test_a_crash_is_told_with_the_last_line_of_its_standard_error(tmp_path: Path) -> None:
    python = stand_in(tmp_path, LOAD + "sys.stderr.write('first\\nlibfoo: no such symbol\\n')\nsys.exit(7)")
    with pytest.raises(PlannerError, match=r"exit code 7 \(in load\): libfoo: no such symbol"):
        measure(SETUP, python=python)


def test_rubbish_and_half_a_line_on_the_stream_are_passed_over(tmp_path: Path) -> None:
    good = '{"event": "phase", "name": "load"}'
    script = f"print('rubbish')\nprint({good!r})\nsys.stdout.write('{{\"event\": \"pha')\nsys.stdout.flush()"
    with Child(python=stand_in(tmp_path, script)) as process:
        heard: list[str] = []
        with pytest.raises(PlannerError, match="exit code 0"):
            heard.extend(event["event"] for event in process.events(time_limit_s=30))
        assert heard == ["started", "phase"]


def test_a_missing_interpreter_is_one_line() -> None:
    with pytest.raises(PlannerError, match="cannot be started"):
        measure(SETUP, python="/nowhere/python")


def test_what_libraries_print_does_not_reach_the_stream() -> None:
    """The child moves standard output away before any library is imported; C code's prints included."""
    code = (
        "import os, sys\nfrom planner.measure import child\n"
        "child.import_libraries = lambda: (print('python'), os.write(1, b'from C\\n'))\n"
        "sys.exit(child.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="", capture_output=True, text=True, timeout=120, check=True,
        cwd=Path(__file__).parents[2],
    )
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["started"]
    assert "from C" in done.stderr
