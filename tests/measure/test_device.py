"""Every way in which a CUDA device cannot be used is one clear line; no device is needed to say so."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from planner.errors import DeviceError
from planner.measure import device as module
from planner.measure.device import failure, opened, refusal, too_small
from planner.measure.nvml import DriverGpu, _MemoryV2, driver_gpus, driver_version
from planner.units import GIB
from tests.measure.made_up import DEVICE


def fake_torch(*, cuda: str | None = "13.0", hip: str | None = None, raises: str = "") -> Any:
    """A torch whose CUDA is as told."""

    def init() -> None:
        if raises:
            raise RuntimeError(raises)

    properties = SimpleNamespace(name="Card", uuid="1", major=9, minor=0, total_memory=80 * GIB)
    return SimpleNamespace(
        __version__="2.11.0",
        version=SimpleNamespace(cuda=cuda, hip=hip),
        cuda=SimpleNamespace(
            init=init,
            set_device=lambda _index: None,
            get_device_properties=lambda _index: properties,
            mem_get_info=lambda _index: (79 * GIB, 80 * GIB),
            memory_reserved=lambda _index: 0,
            get_arch_list=lambda: ["sm_80", "sm_90"],
        ),
    )


def test_a_torch_that_can_use_cuda_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert refusal(fake_torch()) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert refusal(fake_torch()) is None


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no CUDA: torch 2.11.0 is built without it" in str(refusal(fake_torch(cuda=None)))
    assert "ROCm" in str(refusal(fake_torch(cuda=None, hip="6.0")))
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU" in str(refusal(fake_torch()))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("The NVIDIA driver on your system is too old (found version 11040).", "too old for CUDA 13.0"),
        ("Found no NVIDIA driver on your system. Please check", "no NVIDIA driver was found"),
        ("No CUDA GPUs are available", "no CUDA device was found"),
        ("CUDA error: no kernel image is available for execution on the device", "sm_80, sm_90"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "holds it exclusively"),
        ("CUDA error: out of memory", "no memory left for a CUDA context"),
        ("something new\nwith a second line", "something new"),
        ("", "no reason given"),
    ],
)
def test_each_failure_of_cuda_has_its_line(said: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(module, "driver_gpus", tuple)
    line = failure(said, fake_torch())
    assert told in line
    assert "\n" not in line
    if said:
        with pytest.raises(DeviceError) as caught:
            opened(fake_torch(raises=said))
        assert (str(caught.value), caught.value.exit_code) == (line, 3)


def test_a_number_that_names_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = DriverGpu(name="Card", uuid="GPU-1", total_bytes=80 * GIB, used_bytes=0)
    monkeypatch.setattr(module, "driver_gpus", lambda: (gpu,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES='7' names no GPU" in failure("No CUDA GPUs are available", fake_torch())


def gpu_with(used_bytes: int) -> tuple[DriverGpu, ...]:
    return (DriverGpu(name="Card", uuid="GPU-1", total_bytes=80 * GIB, used_bytes=used_bytes),)


def test_memory_that_others_hold_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(module, "driver_gpus", lambda: gpu_with(5 * GIB))
    with pytest.raises(DeviceError, match=r"other processes hold 5\.0 GiB of Card"):
        opened(fake_torch())


def test_memory_that_is_just_given_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([5 * GIB, 5 * GIB, GIB, GIB + 500])
    monkeypatch.setattr(module, "driver_gpus", lambda: gpu_with(next(seen)))
    found = opened(fake_torch())
    assert (found.others_bytes, found.context_bytes) == (GIB, 500)
    assert found.used_source == "nvml"


def test_without_nvml_cuda_s_own_figure_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "driver_gpus", tuple)
    monkeypatch.setattr(module, "driver_version", lambda: None)
    found = opened(fake_torch())
    assert (found.others_bytes, found.context_bytes, found.used_source) == (None, None, "cudaMemGetInfo")
    assert found.device.total_bytes == 80 * GIB
    full = fake_torch()
    full.cuda.mem_get_info = lambda _index: (70 * GIB, 80 * GIB)
    with pytest.raises(DeviceError, match=r"hold 8\.0 GiB"):
        opened(full)


def test_a_device_that_cannot_hold_the_weights() -> None:
    assert too_small(DEVICE, DEVICE.total_bytes - 1, "x") is None
    assert "is too small" in str(too_small(DEVICE, DEVICE.total_bytes, "x"))


def test_the_driver_s_structure_is_nvml_s() -> None:
    """nvml.h: nvmlMemory_v2_t is an unsigned int and four unsigned long long; its version is 0x02000028."""
    assert ctypes.sizeof(_MemoryV2) | 2 << 24 == 0x02000028
    assert [name for name, _ in _MemoryV2._fields_] == ["version", "total", "reserved", "free", "used"]


def test_a_machine_without_a_driver_answers_nothing() -> None:
    if driver_version() is None:
        assert driver_gpus() == ()
    else:
        assert all(gpu.total_bytes > 0 for gpu in driver_gpus())
