"""The CUDA device of the measuring process: opened, or refused in one line with what to do."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

from planner.errors import DeviceError
from planner.measure.nvml import driver_gpus, driver_version
from planner.record import Device
from planner.units import GIB, gib

__all__ = ["CudaDevice", "failure", "opened", "refusal", "too_small"]

OTHERS_BYTES = 2 * GIB  # GUESS: what a desktop and its browser may hold; more disturbs a measurement
_OWN_CONTEXT_BYTES = 2 * GIB  # GUESS: above any CUDA context; used only where there is no NVML
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class CudaDevice:
    """cuda:0 as it was found. `uuid` is NVML's; `others_bytes` was used before this process came (None where
    the driver cannot be asked); `context_bytes` is what the empty context took.
    """

    device: Device
    uuid: str
    others_bytes: int | None
    context_bytes: int | None

    def used_bytes(self) -> int:
        """Memory of the device in use by everyone, now: NVML's figure, or CUDA's total minus free."""
        if self.others_bytes is not None:
            for gpu in driver_gpus():
                if gpu.uuid == self.uuid:
                    return gpu.used_bytes
        import torch

        free, total = torch.cuda.mem_get_info(0)
        return int(total - free)

    @property
    def used_source(self) -> str:
        """Who gave `used_bytes`."""
        return "cudaMemGetInfo" if self.others_bytes is None else "nvml"


def refusal(torch: Any) -> str | None:
    """Why this torch can use no CUDA device, without touching one; None where nothing speaks against it."""
    version = torch.__version__
    if getattr(torch.version, "hip", None):
        return f"torch {version} is built for ROCm, and a measurement needs CUDA; install a CUDA build."
    if torch.version.cuda is None:
        return (
            f"no CUDA: torch {version} is built without it; install a CUDA build of torch on a machine with "
            "an NVIDIA GPU, or run planner simulate, which needs none."
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU; unset it, or name one, such as 0."
    return None


def opened(torch: Any) -> CudaDevice:
    """A context on cuda:0. Raises DeviceError: no driver, too old, hidden, not supported, in use."""
    before = _used_before()
    try:
        torch.cuda.init()
        torch.cuda.set_device(0)
        properties = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(failure(str(error), torch)) from None
    uuid = f"GPU-{getattr(properties, 'uuid', '')}"
    others = before.get(uuid)
    name = str(properties.name)
    held = others if others is not None else max(0, total - free - _OWN_CONTEXT_BYTES)
    if held > OTHERS_BYTES:
        raise DeviceError(
            f"other processes hold {gib(held)} of {name}; end them (nvidia-smi lists them), or hide this GPU "
            "with CUDA_VISIBLE_DEVICES and measure on another."
        )
    found = CudaDevice(
        device=Device(
            name=name,
            capability=(int(properties.major), int(properties.minor)),
            total_bytes=int(properties.total_memory),
            driver=driver_version() or "unknown",
        ),
        uuid=uuid,
        others_bytes=others,
        context_bytes=None,
    )
    context = None if others is None else max(0, found.used_bytes() - others - torch.cuda.memory_reserved(0))
    return CudaDevice(device=found.device, uuid=uuid, others_bytes=others, context_bytes=context)


def _used_before() -> dict[str, int]:
    """Memory in use on each GPU by uuid; waits a little for a process that is just giving its memory back."""
    ends_at = time.monotonic() + _PATIENCE_SECONDS
    while True:
        used = {gpu.uuid: gpu.used_bytes for gpu in driver_gpus()}
        if all(size <= OTHERS_BYTES for size in used.values()) or time.monotonic() > ends_at:
            return used
        time.sleep(0.25)


def failure(message: str, torch: Any) -> str:
    """One line for what CUDA's initialization said: what was found, and what to do."""
    first = next((line.strip() for line in message.splitlines() if line.strip()), "no reason given")
    folded = message.casefold()
    if "too old" in folded:
        installed = driver_version()
        found = f"driver {installed}" if installed else "the NVIDIA driver"
        return (
            f"{found} is too old for CUDA {torch.version.cuda}, which torch {torch.__version__} wants; "
            "update the driver, or install a torch built for an older CUDA."
        )
    if "no nvidia driver" in folded or "insufficient for cuda" in folded:
        return "no NVIDIA driver was found; install it, or run planner simulate, which needs no GPU."
    if "no cuda gpus" in folded or "no cuda-capable device" in folded or "invalid device ordinal" in folded:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None and driver_gpus():
            return f"CUDA_VISIBLE_DEVICES={visible!r} names no GPU of this machine; unset it, or name one."
        return "no CUDA device was found on this machine; run planner simulate, which needs no GPU."
    if "no kernel image" in folded:
        return (
            f"this GPU is not among those torch {torch.__version__} was built for "
            f"({', '.join(torch.cuda.get_arch_list())}); install a build for it."
        )
    if "busy or unavailable" in folded:
        return "the GPU is busy: another process holds it exclusively; end that process and try again."
    if "out of memory" in folded:
        return "the GPU has no memory left for a CUDA context; end the processes that hold it (nvidia-smi)."
    return f"the CUDA device cannot be used ({first.rstrip('.')}); nvidia-smi shows whether the driver works."


def too_small(device: Device, weight_bytes: int, model: str) -> str | None:
    """Why a device cannot hold even the base weights; None where it can."""
    if weight_bytes < device.total_bytes:
        return None
    return (
        f"{device.name} is too small: it has {gib(device.total_bytes)}, and the weights of {model} take "
        f"{gib(weight_bytes)}; choose a smaller model, a 16-bit precision or a larger GPU."
    )
