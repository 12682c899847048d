"""What NVIDIA's driver says about its GPUs, without a CUDA context and without torch.

Read from libnvidia-ml through ctypes; structures as in nvml.h of the driver's API reference. Where the
library is missing every answer is empty.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["DriverGpu", "driver_gpus", "driver_version"]

_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")
_TEXT_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE and NVML_DEVICE_UUID_V2_BUFFER_SIZE


class _MemoryV2(ctypes.Structure):
    """nvmlMemory_v2_t: `used` leaves out what the driver keeps for itself (`reserved`)."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("total", ctypes.c_ulonglong),
        ("reserved", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverGpu:
    """One GPU as the driver lists it; bytes. `used_bytes` counts all processes, this one included."""

    name: str
    uuid: str
    total_bytes: int
    used_bytes: int


def driver_version() -> str | None:
    """The driver's version, such as "580.65.06"; None without a driver."""
    with _library() as library:
        if library is None:
            return None
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        if library.nvmlSystemGetDriverVersion(text, ctypes.c_uint(_TEXT_BYTES)):
            return None
        return text.value.decode("utf-8", "replace")


def driver_gpus() -> tuple[DriverGpu, ...]:
    """Every GPU of the machine in PCI order; empty without a driver."""
    with _library() as library:
        count = ctypes.c_uint(0)
        if library is None or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return ()
        found = [_gpu(library, index) for index in range(count.value)]
        return tuple(gpu for gpu in found if gpu is not None)


def _gpu(library: ctypes.CDLL, index: int) -> DriverGpu | None:
    handle = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)):
        return None
    name, uuid = (ctypes.create_string_buffer(_TEXT_BYTES) for _ in range(2))
    memory = _MemoryV2(version=ctypes.sizeof(_MemoryV2) | 2 << 24)  # NVML_STRUCT_VERSION(Memory, 2)
    failed = (
        library.nvmlDeviceGetName(handle, name, ctypes.c_uint(_TEXT_BYTES))
        or library.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(_TEXT_BYTES))
        or library.nvmlDeviceGetMemoryInfo_v2(handle, ctypes.byref(memory))
    )
    if failed:
        return None
    return DriverGpu(
        name=name.value.decode("utf-8", "replace"),
        uuid=uuid.value.decode("utf-8", "replace"),
        total_bytes=memory.total,
        used_bytes=memory.used,
    )


@contextlib.contextmanager
def _library() -> Iterator[ctypes.CDLL | None]:
    """The library, initialized; None where it is missing, too old or refuses."""
    library = None
    for name in _LIBRARIES:
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name)
            break
    if library is None or not hasattr(library, "nvmlDeviceGetMemoryInfo_v2") or library.nvmlInit_v2():
        yield None
        return
    try:
        yield library
    finally:
        library.nvmlShutdown()
