"""The reader of the allocator, over a made-up allocator: what it resets, reads and claims to know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from planner.measure import reading as module
from planner.measure.reading import CudaReadings, workspace_bytes
from planner.spec import Training


class Allocator:
    """Blocks by address, with torch's statistics; stands in for torch.cuda."""

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.current = self.peak = 0
        self.resets = self.snapshots = self.emptied = 0

    def take(self, address: int, size: int) -> None:
        self.blocks[address] = size
        self.current += size
        self.peak = max(self.peak, self.current)

    def give(self, address: int) -> None:
        self.current -= self.blocks.pop(address)

    def memory_stats_as_nested_dict(self, _device: int) -> dict[str, Any]:
        allocated = {"all": {"current": self.current, "peak": self.peak}}
        reserved = {"all": {"current": 1000, "peak": 2000}}
        return {"allocated_bytes": allocated, "reserved_bytes": reserved, "num_alloc_retries": 3}

    def reset_peak_memory_stats(self) -> None:
        self.resets += 1
        self.peak = self.current

    def memory_snapshot(self) -> list[dict[str, Any]]:
        self.snapshots += 1
        free = {"address": 999, "size": 5000, "state": "inactive"}
        used = [{"address": a, "size": s, "state": "active_allocated"} for a, s in self.blocks.items()]
        return [{"blocks": [*used, free]}]

    def synchronize(self) -> None:
        pass

    def empty_cache(self) -> None:
        self.emptied += 1


class Tensor(torch.Tensor):
    """A tensor that says it is at an address of the made-up device."""

    address = 0
    is_cuda = True

    def untyped_storage(self) -> Any:
        return SimpleNamespace(data_ptr=lambda: self.address)


def tensor(address: int) -> Any:
    made = torch.zeros(1).as_subclass(Tensor)
    made.address = address
    return made


class Parameter:
    """What the reader uses of a parameter."""

    grad: Any = None
    hook: Any = None

    def register_post_accumulate_grad_hook(self, hook: Any) -> None:
        self.hook = hook

    def accumulate(self, address: int) -> None:
        self.grad = tensor(address)
        self.hook(self)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    allocator = Allocator()
    for name in (
        "memory_stats_as_nested_dict", "reset_peak_memory_stats", "memory_snapshot", "synchronize",
        "empty_cache",
    ):
        monkeypatch.setattr(module.torch.cuda, name, getattr(allocator, name))
    return allocator


class Run:
    """A made-up run of two parameters over the made-up allocator."""

    shared = False

    def __init__(self, device: Allocator) -> None:
        self.events: list[dict[str, Any]] = []
        self.device = device
        self.readings = CudaReadings(self._emit, lambda: 7777)
        self.trained = [Parameter(), Parameter()]
        self.setup = SimpleNamespace(training=Training())
        self.optimizer = SimpleNamespace(state={})
        self.net = SimpleNamespace(get_output_embeddings=lambda: None, get_input_embeddings=lambda: None)

    def _emit(self, event: str, **values: Any) -> None:
        if event == "phase":
            self.events.append(values)

    def prepare(self) -> None:
        with self.readings("load", None):
            self.device.take(1, 4000)
            self.device.take(2, 300)
            self.device.give(2)
        with self.readings("attach", None):
            self.device.take(3, 500)
        self.readings.follow(self)  # type: ignore[arg-type]

    def step(self, number: int, *, peak_after: int) -> None:
        """The peak of the backward pass comes after `peak_after` gradients."""
        with self.readings("forward", number):
            self.device.take(10, 900)
        with self.readings("backward", number):
            for index, parameter in enumerate(self.trained):
                self.device.take(50, 5000 if index == peak_after else 50)
                self.device.take(20 + index, 128 * (index + 1))
                parameter.accumulate(20 + index)
                self.device.give(50)
            if peak_after == 2:
                self.device.take(50, 5000)
                self.device.give(50)
            self.device.give(10)
        with self.readings("optimizer_step", number):
            if number == 1:
                self.device.take(30, 256)
                self.optimizer.state = {0: {"m": tensor(30), "step": torch.zeros(1)}}
            for index, parameter in enumerate(self.trained):
                parameter.grad = None
                self.device.give(20 + index)


def test_every_phase_is_reset_and_read(device: Allocator) -> None:
    run = Run(device)
    run.prepare()
    load, attach = run.events
    assert (device.resets, device.emptied) == (2, 1)
    assert (load["allocated_bytes"], load["peak_allocated_bytes"]) == (4000, 4300)
    assert (attach["allocated_bytes"], attach["peak_allocated_bytes"]) == (4500, 4500)
    assert (load["reserved_bytes"], load["peak_reserved_bytes"], load["retries"]) == (1000, 2000, 3)
    assert load["device_used_bytes"] == 7777
    assert load["known"] == attach["known"] == {"base_weights": 4000}


@pytest.mark.parametrize(("peak_after", "gradients"), [(0, 0), (1, 128), (2, 384)])
def test_gradients_that_were_there_at_the_peak(device: Allocator, peak_after: int, gradients: int) -> None:
    run = Run(device)
    run.prepare()
    run.step(1, peak_after=peak_after)
    backward = next(e for e in run.events if e["name"] == "backward")
    assert backward["known"] == {
        "base_weights": 4000, "adapter_weights": 500, "gradients": gradients, "optimizer_states": 0,
    }


def test_states_are_claimed_from_the_step_after_the_one_that_makes_them(device: Allocator) -> None:
    run = Run(device)
    run.prepare()
    for number in (1, 2):
        run.step(number, peak_after=0)
    steps = [event["known"] for event in run.events if event["name"] == "optimizer_step"]
    assert "optimizer_states" not in steps[0]
    assert steps[1]["optimizer_states"] == 256  # the counter on the CPU is none of the device's
    assert [known["gradients"] for known in steps] == [384, 384]
    forward = [event["known"] for event in run.events if event["name"] == "forward"]
    assert [known["gradients"] for known in forward] == [0, 0]
    assert [known["optimizer_states"] for known in forward] == [0, 256]


def test_gradients_of_earlier_micro_batches_count(device: Allocator) -> None:
    run = Run(device)
    run.prepare()
    with run.readings("backward", 1):
        device.take(20, 128)
        run.trained[0].accumulate(20)
    with run.readings("forward", 1):
        device.take(10, 900)
    with run.readings("backward", 1):
        device.take(50, 5000)
        run.trained[0].accumulate(20)
    assert [event["known"].get("gradients") for event in run.events[2:]] == [0, 128, 128]


def test_a_peak_at_the_very_beginning_has_the_gradients_of_that_moment(device: Allocator) -> None:
    run = Run(device)
    run.prepare()
    with run.readings("backward", 1):
        device.take(20, 128)
        run.trained[0].accumulate(20)
    device.take(50, 5000)
    with run.readings("backward", 1):
        device.give(50)
        device.take(21, 256)
        run.trained[1].accumulate(21)
    assert run.events[-1]["known"]["gradients"] == 128


def test_a_peak_between_two_phases_is_not_lost(device: Allocator) -> None:
    run = Run(device)
    run.prepare()
    device.take(60, 10_000)
    device.give(60)
    run.step(1, peak_after=0)
    assert [event["between_peak_bytes"] for event in run.events] == [0, 0, 14_500, 0, 0]


def test_a_phase_that_fails_is_read_all_the_same(device: Allocator) -> None:
    run = Run(device)

    def fail() -> None:
        with run.readings("load", None):
            device.take(1, 4000)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    (load,) = run.events
    assert (load["failed"], load["peak_allocated_bytes"], load["known"]) == (True, 4000, {})


def test_in_a_trace_every_snapshot_is_labelled(device: Allocator) -> None:
    run = Run(device)
    run.readings.tracing = True
    run.prepare()
    run.step(1, peak_after=0)
    assert len(run.readings.snapshots) == device.snapshots
    assert run.readings.snapshots[:3] == ["begin load", "end load", "begin attach"]
    assert "blocks backward" in run.readings.snapshots


def test_the_workspace_is_what_clearing_it_gives_back(
    device: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.take(70, 8_519_680)
    monkeypatch.setattr(
        module.torch._C, "_cuda_clearCublasWorkspaces", lambda: device.give(70), raising=False
    )
    assert workspace_bytes() == 8_519_680
    monkeypatch.delattr(module.torch._C, "_cuda_clearCublasWorkspaces")
    assert workspace_bytes() is None
