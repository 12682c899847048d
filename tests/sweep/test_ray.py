"""A sweep on a real Ray cluster of two nodes: a worker is killed, a node is lost, and no row is."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GRID = """
verb = "simulate"
[[group]]
model = "EleutherAI/pythia-160m"
method = ["lora", "full"]
micro_batch_size = [1, 2, 3, 4, 5, 6]
seq_len = [16, 32, 48]
"""
SETUPS = 36


@pytest.fixture(scope="module")
def cluster() -> Iterator[subprocess.Popen[str]]:
    """The process that holds both nodes."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed; pip install -r requirements-ray.txt")
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("two_nodes.py"))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    yield process
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(timeout=60)
    finally:
        process.kill()
        assert process.stdout is not None
        process.stdout.close()


def started(address: str, grid: Path, out: Path) -> subprocess.Popen[str]:
    """`planner sweep` on the cluster."""
    words = ["sweep", str(grid), "--out", str(out), "--ray", address, "--json"]
    return subprocess.Popen(
        [sys.executable, "-m", "planner", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines(out: Path) -> list[str]:
    """The journal's lines."""
    path = out / "journal.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(what: Callable[[], bool], sweep: subprocess.Popen[str], seconds: float = 60) -> None:
    """Until it is so, while the sweep runs."""
    ends_at = time.monotonic() + seconds
    while not what():
        assert sweep.poll() is None, sweep.communicate()
        assert time.monotonic() < ends_at
        time.sleep(0.02)


def parents() -> dict[int, tuple[int, str]]:
    """Process id -> (its parent's, its command line), of all that run."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(path.name)] = parent, (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
    return found


def busy_workers(root: int) -> list[int]:
    """Ray's worker processes below `root` that run a task of ours: Ray writes its name into their title."""
    every = parents()

    def below(pid: int) -> bool:
        while pid in every and pid != root:
            pid = every[pid][0]
        return pid == root

    return [pid for pid, (_, words) in every.items() if words.startswith("ray::_task") and below(pid)]


def test_no_row_is_lost_and_none_is_twice(cluster: subprocess.Popen[str], tmp_path: Path) -> None:
    assert cluster.stdout is not None
    assert cluster.stdin is not None
    address = cluster.stdout.readline().strip()
    assert ":" in address
    grid, out = tmp_path / "grid.toml", tmp_path / "out"
    grid.write_text(GRID)

    sweep = started(address, grid, out)
    wait_for(lambda: len(lines(out)) >= 4, sweep)
    wait_for(lambda: bool(busy_workers(cluster.pid)), sweep)
    killed = busy_workers(cluster.pid)[0]
    os.kill(killed, signal.SIGKILL)  # in the middle of a task
    at_kill = len(lines(out))
    assert at_kill < SETUPS - 4
    wait_for(lambda: len(lines(out)) >= at_kill + 4, sweep)
    assert killed not in busy_workers(cluster.pid)
    cluster.stdin.write("remove\n")  # the second node with all it runs
    cluster.stdin.flush()
    assert cluster.stdout.readline().strip() == "removed"
    assert len(lines(out)) < SETUPS
    said, words = sweep.communicate(timeout=150)
    assert sweep.returncode == 0, words

    answer = json.loads(said)
    assert (answer["setups"], answer["done"], answer["failed"], answer["left"]) == (SETUPS, SETUPS, 0, 0)
    rows = [json.loads(line) for line in lines(out)]
    assert len(rows) == SETUPS
    assert len({row["key"] for row in rows}) == SETUPS
    assert {row["state"] for row in rows} == {"done"}
    places = {row["place"] for row in rows}
    assert any(not place.endswith(f":{killed}") for place in places), places  # others did the rest
    peaks = {(r["setup"]["method"], r["setup"]["micro_batch_size"], r["setup"]["seq_len"]): r for r in rows}
    same = {key: row["found"]["peak_allocated_bytes"] for key, row in peaks.items() if key[1] * key[2] == 96}
    assert len({peak for key, peak in same.items() if key[0] == "full"}) == 1  # 6 x 16, 3 x 32, 2 x 48 tokens


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed; pip install -r requirements-ray.txt")
    grid = tmp_path / "grid.toml"
    grid.write_text('[[group]]\nmodel = "openai-community/gpt2"\n')
    sweep = started("127.0.0.1:1", grid, tmp_path / "out")
    said, words = sweep.communicate(timeout=120)
    assert (sweep.returncode, said) == (1, "")
    assert words.startswith("planner: no Ray cluster answers at 127.0.0.1:1 (")
    assert words.count("\n") == 1
