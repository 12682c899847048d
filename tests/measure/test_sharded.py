"""Several ranks of one run: real processes over gloo on the CPU, ways to lose one, made-up measurements."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from planner import LoRA, Setup, Sharding, Training, simulate
from planner.errors import DeviceError, PlannerError
from planner.measure import together
from planner.measure.records import read
from planner.measure.single import record_of
from planner.measure.together import measure_together, rehearse_together
from planner.record import Prediction
from tests.measure.made_up import MIB, Events, phase, stream
from tests.measure.test_process import PHASES, gone
from tests.simulate.small import LLAMA, model_of

TRAINING = Training(
    micro_batch_size=1, seq_len=32, precision="fp32", gradient_accumulation_steps=2, clip_grad_norm=1.0
)
SHARDS = Setup(model=model_of(LLAMA), training=TRAINING, sharding=Sharding(num_gpus=2, sharding="fsdp"))
ROOT = Path(__file__).parents[2]


def ended(group: int) -> bool:
    """Whether the group is gone, at the latest a moment after its connection was."""
    ends_at = time.monotonic() + 10
    while not gone(group) and time.monotonic() < ends_at:
        time.sleep(0.05)
    return gone(group)


@pytest.mark.parametrize(("kind", "launcher"), [("fsdp", "torchrun"), ("ddp", "accelerate")])
def test_two_real_processes_take_the_same_step(kind: Any, launcher: str) -> None:
    heard: list[Mapping[str, Any]] = []
    setup = SHARDS.replace(sharding=kind, gradient_accumulation_steps=1)
    found = rehearse_together(setup, launcher=launcher, time_limit_s=120, on_event=heard.append)
    assert [each.rank for each in found.ranks] == [0, 1]
    for each in found.ranks:
        assert each.rehearsal is not None
        assert [one.name for one in each.rehearsal.phases] == PHASES
        assert each.rehearsal.parameters.total == setup.model.parameters
        assert each.record is None
        assert "bytes" not in json.dumps(each.to_dict())
    assert found.slowest.seconds == max(each.seconds for each in found.ranks)
    with pytest.raises(PlannerError, match="a rehearsal measures no memory"):
        _ = found.largest
    for event in heard:
        if event["event"] == "started":
            assert ended(event["pid"])


def test_a_killed_rank_ends_the_others_and_leaves_no_record() -> None:
    pids: dict[int, int] = {}

    def kill(event: Mapping[str, Any]) -> None:
        if event["event"] == "started":
            pids[event["rank"]] = event["pid"]
        if event["event"] == "enter" and event["name"] == "forward" and event["rank"] == 1:
            os.kill(pids[1], signal.SIGKILL)

    with pytest.raises(PlannerError) as caught:
        rehearse_together(SHARDS, time_limit_s=120, on_event=kill)
    said = str(caught.value)
    assert said.startswith("rank 1 of 2 was killed by SIGKILL")
    assert said.endswith("; the others were ended, nothing was recorded.")
    assert all(ended(pid) for pid in pids.values())


def test_without_a_gpu_every_rank_says_why(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "planner", "measure", "--model", "EleutherAI/pythia-70m", "--num-gpus", "2",
         "--sharding", "fsdp"],
        cwd=ROOT,
        env={**os.environ, "PLANNER_RECORDS_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == DeviceError.exit_code
    assert done.stderr.count("\n") == 1
    assert "no CUDA" in done.stderr or "no NVIDIA driver" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_that_takes_too_long_or_is_cancelled_is_ended() -> None:
    with pytest.raises(PlannerError, match="longer than 1 s and was ended"):
        rehearse_together(SHARDS, time_limit_s=1)
    with pytest.raises(PlannerError, match="cancelled; nothing was recorded"):
        rehearse_together(SHARDS, cancelled=lambda: True)


def test_an_interpreter_without_the_planner_is_named_in_one_line(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(PlannerError, match="2 of 2 ranks did not start or ended at once: no such module"):
        rehearse_together(SHARDS, python=str(python), time_limit_s=60)


RANK = """
import json, sys
from contextlib import nullcontext
import torch
from planner import Setup
from planner.training.group import real_group
from planner.training.recipe import no_autocast
from planner.training.runs import run_of

def shape(tensor):
    return list(getattr(tensor, "_local_tensor", tensor).shape)

with real_group("gloo"):
    found = []
    for flat in json.loads(sys.argv[2]):
        run = run_of(
            Setup.from_dict(flat), torch.device("cpu"), lambda *_: nullcontext(), autocast=no_autocast
        )
        run.prepare()
        gradients, optimize = [], run._optimize
        def noting(clip):
            gradients.extend(shape(p.grad) for p in run.trained)
            optimize(clip)
        run._optimize = noting
        run.step(1)
        states = [v for s in run.optimizer.state.values() for v in s.values() if v.dim()]
        found.append({
            "weights": [shape(p) for p in run.net.parameters()],
            "gradients": gradients,
            "states": [shape(v) for v in states],
        })
    rank = torch.distributed.get_rank()
    open(f"{sys.argv[1]}/{rank}.json", "w").write(json.dumps(found))
"""


def test_a_simulated_rank_holds_what_a_real_one_holds(tmp_path: Path) -> None:
    from tests.simulate.test_sharded import Held

    setups = [
        SHARDS,
        SHARDS.replace(sharding="fsdp-grad-op", precision="bf16"),
        Setup(
            model=model_of(LLAMA, hidden_size=192, num_attention_heads=3, num_key_value_heads=3),
            method=LoRA(lora_rank=3, target_modules=("all-linear",)),
            training=TRAINING,
            sharding=SHARDS.sharding,
        ),
        SHARDS.replace(sharding="ddp"),
    ]
    (tmp_path / "rank.py").write_text(RANK)
    flat = json.dumps([setup.to_dict() for setup in setups])
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "rank.py"), str(tmp_path), flat],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        check=True, timeout=240, capture_output=True,
    )  # fmt: skip
    for rank in range(2):
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        for setup, found in zip(setups, real, strict=True):
            simulated = Held(setup, rank)
            assert [tuple(shape) for shape in found["weights"]] == simulated.shapes
            assert [tuple(shape) for shape in found["gradients"]] == simulated.gradients
            assert [tuple(shape) for shape in found["states"]] == simulated.states


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[int, Events]:
    """The events of four ranks, of which the third needs most and the second is slow."""
    ranks: dict[int, Events] = {}
    for rank in range(4):
        events = stream()
        if rank == 2:
            events[8] = phase("backward", 2, 57, 130, {"base_weights": 40})
        if rank == 1:
            events[4]["seconds"] = events[3]["seconds"] = 60.0
        ranks[rank] = events
    monkeypatch.setattr(together, "_events", lambda *_args, **_options: ranks)
    monkeypatch.setattr(together, "simulated", lambda *_args, **_options: Prediction(reason="none here"))
    return ranks


def test_one_record_a_rank_the_largest_and_the_slowest_named(
    made_up: dict[int, Events], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = measure_together(SHARDS.replace(num_gpus=4))
    assert (found.largest.rank, found.slowest.rank) == (2, 1)
    records = [each.record for each in found.ranks]
    assert [record.report.provenance["rank"] for record in records if record] == [0, 1, 2, 3]
    assert records[2] is not None
    assert records[2].report.peak_allocated_bytes == 130 * MIB
    assert records[2].report.notes[0] == "Rank 2 of 4, started by torchrun."

    from planner.cli import main

    monkeypatch.setenv("PLANNER_RECORDS_DIR", str(tmp_path))
    words = ["measure", "--model", "EleutherAI/pythia-70m", "--num-gpus", "4", "--sharding", "fsdp"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["largest_rank"], told["slowest_rank"]) == (2, 1)
    assert [each["peak_allocated_bytes"] for each in told["ranks"]] == [s * MIB for s in (100, 100, 130, 100)]
    assert told["peak_allocated_bytes"] == 130 * MIB
    assert len(read([tmp_path / "records.jsonl"]).records) == 4
    assert main([*words, "--no-record"]) == 0
    shown = capsys.readouterr().out
    assert "rank 2 is the largest" in shown
    assert "Rank 1 was the slowest" in shown


def test_ranks_that_could_not_go_on_have_no_record(made_up: dict[int, Events]) -> None:
    full = {"event": "out_of_memory", "phase": "backward", "requested_bytes": MIB, "device_free_bytes": 0,
            "allocated_bytes": 100 * MIB, "reserved_bytes": 120 * MIB}  # fmt: skip
    only = made_up.pop(3)
    made_up.clear()
    made_up[3] = [*only[:-1], full, only[-1]]
    found = measure_together(SHARDS.replace(num_gpus=4))
    assert [each.to_dict()["out_of_memory"] for each in found.ranks] == [True]


def test_a_rank_alone_needs_a_gpu_too() -> None:
    with pytest.raises(DeviceError, match=r"no CUDA|no NVIDIA driver"):
        record_of(SHARDS, alone=1, time_limit_s=120)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "0"], "rank 0 is one of several, and this setup has one GPU"),
        (["--rank", "2", "--num-gpus", "2", "--sharding", "ddp"], "from 0 to 1"),
        (["--rank", "0", "--num-gpus", "2", "--sharding", "ddp", "--rehearse"], "leave one out"),
        (["--rank", "0", "--num-gpus", "2", "--sharding", "ddp", "--precision", "fp16-mixed"], "not finite"),
        (["--launcher", "torchrun"], "this setup has one GPU"),
        (["--launcher", "mpi", "--num-gpus", "2", "--sharding", "ddp"], "torchrun, accelerate"),
        (["--trace", "x", "--num-gpus", "2", "--sharding", "ddp"], "--trace follows one device"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], said: str, capsys: Any) -> None:
    from planner.cli import main

    assert main(["measure", "--model", "EleutherAI/pythia-70m", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_public_measure_is_of_the_largest_rank(made_up: dict[int, Events]) -> None:
    from planner.measure import measure

    assert measure(SHARDS.replace(num_gpus=4)).peak_allocated_bytes == 130 * MIB
    assert simulate(SHARDS).source == "simulation"
