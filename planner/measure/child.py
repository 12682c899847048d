"""The measuring process: `python -m planner.measure.child` (imports torch).

Reads one job a line from standard input, {"job": "measure", "setup": ...} (or rehearse, simulate, device),
and writes events, one JSON object a line, to standard output, which no library can reach. A job ends with the
event "end". The process ends with its standard input: when the parent is gone, so is it.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from planner.errors import DeviceError, PlannerError
from planner.measure.device import refusal
from planner.process import answers, jobs
from planner.version import __version__

__all__ = ["import_libraries", "main", "serve", "started"]

_ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING")
_WORKSPACE_SETTINGS = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "TORCH_CUBLASLT_UNIFIED_WORKSPACE",
)
_PACKAGES = ("torch", "transformers", "peft", "accelerate")
_MOST_SKIPPED_STEPS = 20  # torch.amp.GradScaler halves its scale, 65,536, at each
_ALLOCATION_FAILED = ("out of memory", "alloc_failed", "allocation failed", "not enough memory")


def main() -> int:
    """Serve jobs until standard input ends."""
    emit = answers()
    try:
        import torch

        if "--cuda" in sys.argv and (reason := refusal(torch)):  # before the slow imports
            _refuse(emit, DeviceError(reason))
            emit("end")
            return DeviceError.exit_code
        import_libraries()
    except ModuleNotFoundError as error:
        wanted = f"{error.name} is not installed; run pip install 'vram-planner[simulate]'."
        _refuse(emit, PlannerError(f"measuring needs torch, transformers, peft and accelerate: {wanted}"))
        return 1
    emit("started", **started(torch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for job in jobs():
            serve(job, emit, torch)
            emit("end")
    return 0


def started(torch: Any) -> dict[str, Any]:
    """What a measuring process says of itself first."""
    return {"pid": os.getpid(), "seed": 0, "versions": _versions(torch), "environment": _environment()}


def import_libraries() -> None:
    """Everything a step needs, so that a waiting process starts at once. No CUDA context is made."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers

    import planner.training.run  # noqa: F401

    transformers.utils.logging.set_verbosity_error()


def serve(job: Mapping[str, Any], emit: Callable[..., None], torch: Any) -> None:
    """One job; what goes wrong becomes an event of one line."""
    try:
        if job["job"] == "simulate":
            _simulate(job, emit)
        elif job["job"] == "rehearse":
            _rehearse(job, emit, torch)
        elif job["job"] == "device":
            _open(emit, torch)
        else:
            _measure(job, emit, torch)
    except PlannerError as error:
        _refuse(emit, error)
    except Exception as error:
        import traceback

        traceback.print_exc()  # to standard error, which the parent keeps the end of
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        said = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        _refuse(emit, PlannerError(f"the training step failed while running ({said.rstrip('.')})."))


def _refuse(emit: Callable[..., None], error: PlannerError) -> None:
    emit("refused", error=_public_name(error), message=" ".join(str(error).split()))


def _public_name(error: PlannerError) -> str:
    """The nearest class of planner.errors: what the parent can raise again."""
    return next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == "planner.errors")


def _setup(job: Mapping[str, Any]) -> Any:
    from planner.spec import Setup

    return Setup.from_dict(job["setup"])


def _simulate(job: Mapping[str, Any], emit: Callable[..., None]) -> None:
    """The simulation of the setup with this process's libraries, on the device that is measured on."""
    from planner.allocator import AllocatorConfig
    from planner.record import Device
    from planner.simulate import simulate

    gpu = Device.from_dict(job["device"]).gpu if job.get("device") else None
    settings = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or ""
    config, rank = AllocatorConfig.parse(settings), job.get("rank")
    emit("report", report=simulate(_setup(job), gpu=gpu, allocator=config, rank=rank).to_dict())
    gc.collect()


def _rehearse(job: Mapping[str, Any], emit: Callable[..., None], torch: Any) -> None:
    """The same step on the CPU: kernels that only CUDA has give way to torch's own choice."""
    from planner.measure.reading import durations
    from planner.training.recipe import no_autocast
    from planner.training.runs import run_of

    setup = _setup(job)
    if setup.training.attention not in ("sdpa", "eager"):
        setup = setup.replace(attention="sdpa")
    torch.manual_seed(0)
    run = run_of(setup, torch.device("cpu"), partial(durations, emit), autocast=no_autocast)
    run.prepare()
    _emit_parameters(emit, run)
    _take_steps(run, int(job["steps"]), emit)
    emit("done")


def _open(emit: Callable[..., None], torch: Any) -> Any:
    """The CUDA device, told to the parent. Raises DeviceError."""
    from planner.measure.device import opened

    reason = refusal(torch)
    if reason:
        raise DeviceError(reason)
    found = opened(torch)
    emit(
        "device",
        **found.device.to_dict(),
        others_bytes=found.others_bytes,
        context_bytes=found.context_bytes,
        used_source=found.used_source,
    )
    return found


def _measure(job: Mapping[str, Any], emit: Callable[..., None], torch: Any) -> None:
    from planner.measure.locks import one_measurement

    with nullcontext() if job.get("local_rank") else one_measurement(), _group(job):
        _measure_alone(job, emit, torch)


def _group(job: Mapping[str, Any]) -> AbstractContextManager[None]:
    """One rank measured alone stands among imagined ones."""
    if job.get("alone") is None:
        return nullcontext()
    from planner.training.group import imagined_group

    return imagined_group(_setup(job).sharding.num_gpus, int(job["alone"]))


def _measure_alone(job: Mapping[str, Any], emit: Callable[..., None], torch: Any) -> None:
    """Load, attach and `steps` optimizer steps on cuda:0, read phase by phase."""
    from planner.measure.device import failure, too_small
    from planner.measure.reading import CudaReadings, workspace_bytes
    from planner.training.runs import run_of

    setup = _setup(job)
    found = _open(emit, torch)
    readings = CudaReadings(emit, found.used_bytes)
    run = run_of(setup, torch.device("cuda:0"), readings)
    weight_bytes = sum(p.numel() * p.element_size() for p in run.net.parameters())
    weight_bytes //= setup.sharding.shard_ranks
    reason = too_small(found.device, weight_bytes, setup.model.id)
    if reason:
        raise DeviceError(reason)
    asked = _asked_when_full(torch)
    torch.manual_seed(0)
    gc.collect()
    gc.disable()  # as in the simulation: a collection in the middle frees what no step can count on
    if job.get("trace"):
        readings.tracing = True
        torch.cuda.memory._record_memory_history(context="alloc", stacks="python")
    prepared = False
    try:
        run.prepare()
        readings.follow(run)
        _emit_parameters(emit, run)
        prepared = True
        _take_steps(run, int(job["steps"]), emit)
    except RuntimeError as error:
        if not prepared:
            emit("parameters", total=sum(p.numel() for p in run.net.parameters()), trainable=0, added=0)
        if "no kernel image" in str(error):
            raise DeviceError(failure(str(error), torch)) from None
        if not _is_out_of_memory(error, torch):
            raise
        _emit_out_of_memory(emit, torch, readings.phase[0], asked)
    if job.get("trace"):
        _keep_trace(job["trace"], readings.snapshots, setup, found, torch)
    workspace = workspace_bytes()
    if workspace is not None:
        emit("workspace", workspace_bytes=workspace)
    if readings.paged_bytes:
        emit("paged", paged_bytes=readings.paged_bytes)
    emit("done")


def _take_steps(run: Any, steps: int, emit: Callable[..., None]) -> None:
    """`steps` optimizer steps that changed the weights; gradient scaling skips those that overflow."""
    number = taken = 0
    while taken < steps and number < steps + _MOST_SKIPPED_STEPS:
        number += 1
        before = run.scaler.get_scale() if run.scaler else 0.0
        run.step(number)
        taken += not run.scaler or run.scaler.get_scale() >= before
    if number > steps:
        emit("note", text=f"Gradient scaling skipped {number - taken} of {number} steps.")


def _emit_parameters(emit: Callable[..., None], run: Any) -> None:
    total = sum(p.numel() for p in run.net.parameters())
    trained = sum(p.numel() for p in run.trained)
    emit("parameters", total=total, trainable=trained, added=total - run.setup.model.parameters)


def _asked_when_full(torch: Any) -> dict[str, int]:
    """Filled with the exact request and what was free, at the moment the allocator gives up."""
    asked: dict[str, int] = {}

    def observe(_device: int, requested: int, _total: int, free: int) -> None:
        asked.update(requested_bytes=int(requested), device_free_bytes=int(free))
        stats = torch.cuda.memory_stats_as_nested_dict(0)
        asked["allocated_bytes"] = int(stats["allocated_bytes"]["all"]["current"])
        asked["reserved_bytes"] = int(stats["reserved_bytes"]["all"]["current"])

    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is not None:
        attach(observe)
    return asked


def _is_out_of_memory(error: RuntimeError, torch: Any) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error).casefold() for words in _ALLOCATION_FAILED)


def _emit_out_of_memory(emit: Callable[..., None], torch: Any, phase: str, asked: dict[str, int]) -> None:
    found = {"requested_bytes": 0, "device_free_bytes": 0, "allocated_bytes": 0, "reserved_bytes": 0} | asked
    emit("out_of_memory", phase=phase, **found)


def _keep_trace(path: str, labels: list[str], setup: Any, found: Any, torch: Any) -> None:
    """The allocator's history as plain JSON; see planner.measure.trace."""
    from planner.measure.trace import reduced

    snapshot = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(enabled=None)
    traces = snapshot["device_traces"]
    kept = {
        "schema": 1,
        "setup": setup.to_dict(),
        "device": found.device.to_dict(),
        "versions": _versions(torch),
        **reduced(traces[0] if traces else [], labels),
    }
    aside = f"{path}.part"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(kept, file, separators=(",", ":"))
    os.replace(aside, path)


def _versions(torch: Any) -> dict[str, str]:
    from importlib import metadata, util

    found = (name for name in ("bitsandbytes", "liger_kernel") if util.find_spec(name))
    versions = {name: metadata.version(name) for name in (*_PACKAGES, *found)}
    versions["torch"] = torch.__version__
    versions["cuda"] = str(torch.version.cuda)
    versions["planner"] = __version__
    versions["python"] = ".".join(str(part) for part in sys.version_info[:3])
    return versions


def _environment() -> dict[str, str]:
    names = (*_ALLOCATOR_SETTINGS, *_WORKSPACE_SETTINGS)
    return {name: os.environ[name] for name in names if name in os.environ}


if __name__ == "__main__":
    sys.exit(main())
