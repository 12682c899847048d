"""The matrix of setups, and its runner: resumable, within its budget, one record after the other."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from planner import Setup, estimate
from planner.accuracy import family
from planner.errors import DeviceError, PlannerError, SetupError
from planner.measure import runner
from planner.measure.answer import readings
from planner.measure.matrix import Matrix, matrix_from
from planner.measure.records import append_line, read
from planner.measure.runner import Outcome, run_matrix
from planner.record import Prediction
from planner.report import MemoryReport, Parameters, Parts
from tests.measure.made_up import DEVICE, MIB, SETUP, stream

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    return matrix_from(ROOT / "benchmarks" / "matrix.toml")


def test_the_matrix_is_wide_enough(matrix: Matrix) -> None:
    setups = matrix.setups
    assert matrix.name == "matrix"
    assert len(setups) >= 150
    assert {family(setup.to_dict()) for setup in setups} >= {
        "bert", "bloom", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi3",
        "qwen2", "qwen3",
    }
    assert {setup.method.name for setup in setups} >= {"full", "lora", "adapter", "bitfit"}
    training = [setup.training for setup in setups]
    assert {t.precision for t in training} >= {"fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed"}
    assert {t.optimizer for t in training} >= {"adamw", "adamw-fused", "sgd"}
    assert {t.attention for t in training} >= {"sdpa", "flash", "efficient", "cudnn", "eager"}
    assert {t.activation_checkpointing for t in training} == {True, False}
    assert {t.gradient_accumulation_steps for t in training} >= {1, 4}
    assert len({t.micro_batch_size for t in training}) >= 3
    assert len({t.seq_len for t in training}) >= 4
    ranks = {setup.method.lora_rank for setup in setups if setup.method.name == "lora"}
    assert len(ranks) >= 4
    sizes = [setup.model.parameters / 1e9 for setup in setups]
    assert min(sizes) < 0.2
    assert 13 < max(sizes) < 16


def test_the_small_ones_come_first_and_none_twice(matrix: Matrix) -> None:
    needed = [estimate(setup).peak_allocated_bytes for setup in matrix.setups]
    assert needed == sorted(needed)
    assert len({json.dumps(setup.to_dict()) for setup in matrix.setups}) == len(matrix.setups)


def test_every_setup_survives_its_json(matrix: Matrix) -> None:
    for setup in matrix.setups:
        assert Setup.from_dict(json.loads(json.dumps(setup.to_dict()))) == setup


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("set = 1", "has no"),
        ("[[group]\n", "is no TOML"),
        ('[[group]]\nmodel = "openai-community/gpt2"\nseqlen = 3', "group 1: unknown setting 'seqlen'"),
        ('[[group]]\nmodel = "openai-community/gpt2"\nseq_len = [16, 99999]', "group 1: seq_len 99,999"),
        ("[[group]]\nseq_len = 16", "group 1: model is missing"),
    ],
)
def test_a_wrong_matrix_is_refused_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(SetupError, match=told) as caught:
        matrix_from(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SetupError, match="cannot be read"):
        matrix_from(tmp_path / "none.toml")


# --- the runner, with measuring and simulating replaced by what is made up -------------------------------

SETUPS = tuple(SETUP.replace(seq_len=size) for size in (16, 32, 64))
MADE_UP = Matrix(name="made-up", setups=SETUPS)
Measured = Callable[[Setup, float], Any]


def simulation(setup: Setup, reserved_mib: int = 130) -> MemoryReport:
    return MemoryReport(
        source="simulation",
        setup=setup.to_dict(),
        parameters=Parameters(total=70, trainable=7),
        parts=Parts(base_weights=100 * MIB),
        phases=(),
        peak_phase="load",
        peak_reserved_bytes=reserved_mib * MIB,
    )


class FakeDevice:
    """What the runner starts and asks, without any process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[int] = []
        self.limits: list[float] = []
        self.reserved_mib: dict[int, int] = {}
        self.act: Measured = lambda setup, limit: None
        monkeypatch.setattr(runner, "_children", self._children)
        monkeypatch.setattr(runner, "simulations", self._simulations)
        monkeypatch.setattr(runner, "measured", self._measured)
        found = {**DEVICE.to_dict(), "others_bytes": 100 * MIB, "context_bytes": 400 * MIB}
        monkeypatch.setattr(runner, "device_event", lambda _child, _limit: found)

    @contextlib.contextmanager
    def _children(self, _python: Any, *, cpu_only: bool) -> Iterator[Callable[[], None]]:
        yield lambda: None

    @contextlib.contextmanager
    def _simulations(self, jobs: Any, **_options: Any) -> Iterator[Callable[[int, float], Prediction | None]]:
        def predict(number: int, _seconds: float) -> Prediction:
            setup = jobs[number][0]
            reserved = self.reserved_mib.get(setup.training.seq_len, 130)
            return Prediction(report=simulation(setup, reserved))

        yield predict

    def _measured(self, _child: None, setup: Setup, limit_s: float) -> Any:
        self.measured.append(setup.training.seq_len)
        self.limits.append(limit_s)
        self.act(setup, limit_s)
        return readings(stream())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


def test_every_setup_is_recorded_with_both_predictions(fake: FakeDevice, tmp_path: Path) -> None:
    heard: list[Outcome] = []
    run = run_matrix(MADE_UP, tmp_path, budget_s=60, on_outcome=heard.append)
    assert fake.measured == [16, 32, 64]
    assert (run.count("recorded"), run.present, run.left) == (3, 0, 0)
    found = read([tmp_path / "records.jsonl"])
    assert found.records == run.records
    assert [record.setup["seq_len"] for record in found.records] == [16, 32, 64]
    for record in found.records:
        assert record.set == "made-up"
        assert record.estimate.report is not None
        assert record.simulation.report is not None
    assert heard == list(run.outcomes)
    assert "measured 0.1 GiB" in heard[0].words or "measured 0.10 GiB" in heard[0].words


def test_a_record_is_on_the_disk_before_the_next_run_begins(fake: FakeDevice, tmp_path: Path) -> None:
    lines: list[int] = []

    def count(_setup: Setup, _limit: float) -> None:
        path = tmp_path / "records.jsonl"
        lines.append(len(read([path]).records) if path.exists() else 0)

    fake.act = count
    run_matrix(MADE_UP, tmp_path, budget_s=60)
    assert lines == [0, 1, 2]


def test_what_is_recorded_is_not_run_again(fake: FakeDevice, tmp_path: Path) -> None:
    run_matrix(Matrix(name="made-up", setups=SETUPS[:1]), tmp_path, budget_s=60)
    run = run_matrix(MADE_UP, tmp_path, budget_s=60)
    assert fake.measured == [16, 32, 64]
    assert (run.present, run.count("recorded"), len(run.records)) == (1, 2, 3)


def test_a_record_of_another_device_does_not_count(
    fake: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_matrix(MADE_UP, tmp_path, budget_s=60)
    other = {**DEVICE.to_dict(), "name": "Other", "others_bytes": None, "context_bytes": None}
    monkeypatch.setattr(runner, "device_event", lambda _child, _limit: other)
    assert run_matrix(MADE_UP, tmp_path, budget_s=60).count("recorded") == 3


def test_the_budget_ends_a_call_and_the_next_goes_on(fake: FakeDevice, tmp_path: Path) -> None:
    fake.act = lambda setup, limit: time.sleep(0.3)
    run = run_matrix(MADE_UP, tmp_path, budget_s=0.2)
    assert (run.count("recorded"), run.left) == (1, 2)
    assert max(fake.limits) <= 0.2  # a run may take what is left of the budget, no more
    assert run_matrix(MADE_UP, tmp_path, budget_s=60).count("recorded") == 2


def test_a_run_cut_by_the_budget_is_no_failure(fake: FakeDevice, tmp_path: Path) -> None:
    def cut(_setup: Setup, limit: float) -> None:
        time.sleep(limit)
        raise PlannerError("the run took longer and was ended.")

    fake.act = cut
    run = run_matrix(MADE_UP, tmp_path, budget_s=0.2)
    assert (run.outcomes, run.left) == ((), 3)
    assert not (tmp_path / "failures.jsonl").exists()


def test_what_the_device_cannot_hold_is_skipped_unless_asked(fake: FakeDevice, tmp_path: Path) -> None:
    """1000 MiB of memory, 100 of others; the runs show a context of 500."""
    fake.reserved_mib = {16: 100, 32: 401, 64: 400}
    run = run_matrix(MADE_UP, tmp_path, budget_s=60)
    assert [outcome.state for outcome in run.outcomes] == ["recorded", "skipped", "recorded"]
    assert "on Imaginary GPU" in run.outcomes[1].words
    assert run_matrix(MADE_UP, tmp_path, budget_s=60, try_all=True).count("recorded") == 1


def test_failures_are_kept_apart_and_tried_last(fake: FakeDevice, tmp_path: Path) -> None:
    def fail(setup: Setup, _limit: float) -> None:
        if setup.training.seq_len == 16:
            raise PlannerError("the measuring process was killed by SIGKILL.")

    fake.act = fail
    run = run_matrix(MADE_UP, tmp_path, budget_s=60)
    assert [outcome.state for outcome in run.outcomes] == ["failed", "recorded", "recorded"]
    assert len(read([tmp_path / "records.jsonl"]).records) == 2
    (failure,) = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert "SIGKILL" in failure["reason"]
    append_line("half", tmp_path / "failures.jsonl")
    fake.act = lambda setup, limit: None
    more = Matrix(name="made-up", setups=(*SETUPS, SETUP.replace(seq_len=128)))
    assert [o.setup.training.seq_len for o in run_matrix(more, tmp_path, budget_s=60).outcomes] == [128, 16]


def test_a_device_that_refuses_one_setup_is_asked_for_the_next(fake: FakeDevice, tmp_path: Path) -> None:
    def refuse(setup: Setup, _limit: float) -> None:
        if setup.training.seq_len == 32:
            raise DeviceError("Imaginary GPU is too small.")

    fake.act = refuse
    run = run_matrix(MADE_UP, tmp_path, budget_s=60)
    assert [outcome.state for outcome in run.outcomes] == ["recorded", "skipped", "recorded"]


def test_a_full_disk_ends_the_run_at_once(
    fake: FakeDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_record: Any, path: Path) -> None:
        raise PlannerError(f"{path} cannot be written (No space left on device); nothing was recorded.")

    monkeypatch.setattr(runner, "append", full)
    with pytest.raises(PlannerError, match="No space left"):
        run_matrix(MADE_UP, tmp_path, budget_s=60)
    assert fake.measured == [16]
