"""One rank of a measured run: `python -m planner.measure.rank`, started by torchrun or accelerate launch.

It calls the one who started it over a local connection, gets the job from there and tells its events there,
one JSON object at a time, as `planner.measure.child` does. When the connection ends in the middle of the job,
so does this process: no rank outlives the one who asked.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from functools import partial
from multiprocessing.connection import Client, Connection
from typing import Any

from planner.errors import DeviceError
from planner.measure.child import import_libraries, serve, started
from planner.measure.device import failure, refusal
from planner.measure.nvml import driver_version
from planner.measure.ranks import ADDRESS, KEY

__all__ = ["main"]

_LOST_PARENT = 4


def main() -> int:
    """Serve the one job."""
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    connection = Client(os.environ[ADDRESS], authkey=bytes.fromhex(os.environ.pop(KEY)))
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    _send(connection, {"rank": rank, "pid": os.getpid()})
    job = json.loads(connection.recv_bytes())
    over = threading.Event()
    threading.Thread(target=_watch, args=(connection, over), daemon=True).start()
    on_cpu = job["job"] == "rehearse"
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if on_cpu else _own_gpu(local_rank)
    import torch

    import_libraries()
    from planner.training.group import real_group

    emit = partial(_emit, connection)
    emit("started", **started(torch))
    reason = None if on_cpu else refusal(torch) or _no_gpu(torch)
    if on_cpu:  # FSDP2 asks for an accelerator's stream where a unit was gathered ahead in vain
        setattr(torch.accelerator, "current_stream", torch.cpu.current_stream)  # noqa: B010 - another type
    if reason:
        emit("refused", error="DeviceError", message=reason)
        emit("end")
        over.wait()
        return DeviceError.exit_code
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with real_group("gloo" if on_cpu else "nccl"):
            serve({**job, "local_rank": local_rank}, emit, torch)
            emit("end")
            over.wait()  # destroying a group that others still use would end them
    return 0


def _no_gpu(torch: Any) -> str | None:
    """Why this rank finds no GPU, asked without a CUDA context; None where it finds one."""
    if torch.cuda.device_count():
        return None
    return failure("no NVIDIA driver" if driver_version() is None else "no CUDA GPUs", torch)


def _own_gpu(local_rank: int) -> str:
    """The rank's GPU of those that are visible: in its process it is cuda:0."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[local_rank].strip() if local_rank < len(visible) else str(local_rank)


def _emit(connection: Connection, event: str, **values: Any) -> None:
    _send(connection, {"event": event, **values})


def _send(connection: Connection, values: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(values, allow_nan=False).encode())


def _watch(connection: Connection, over: threading.Event) -> None:
    """The only thing that is said after the job is that all ranks are done."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(_LOST_PARENT)
    over.set()


if __name__ == "__main__":
    sys.exit(main())
