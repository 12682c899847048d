"""Any architecture that transformers builds: its weights, counted by a child process on `meta`.

The child is `planner.training.inventory`, the only part that imports torch. Its answer is kept on disk under
the hash of the config and the version of transformers, so a model is built once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any, get_args

from planner.catalog.cache import keep_text, kept_text
from planner.catalog.config_file import shown
from planner.errors import ModelError
from planner.model import AttentionShape, Kind, Model, Role, Task, WeightTensor

__all__ = ["inventoried_model"]

_FORMAT = 2  # of the kept files; raise it when the child's answer changes
_MOST_ANSWER_BYTES = 64 << 20
_PATIENCE_SECONDS = 120.0
_DROPPED = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PYTHONSTARTUP")


def inventoried_model(
    config: Mapping[str, Any],
    *,
    id: str,
    source: str,
    task: Task | None = None,
    patience_seconds: float = _PATIENCE_SECONDS,
) -> Model:
    """The Model of a config.json outside the closed-form families; its `architecture` is None.

    Takes some seconds the first time, for torch and transformers. Raises ModelError in one line where they
    are not installed or cannot build it, where it would need remote code, or after `patience_seconds`.
    """
    request = json.dumps({"config": config, "task": task}, sort_keys=True, separators=(",", ":"))
    key = f"{_FORMAT} {_version('transformers')} {request}"
    kept_name = f"inventories/{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}.json"
    kept = kept_text(kept_name, _MOST_ANSWER_BYTES)
    model = None if kept is None else _model(kept, config, id=id, source=source)
    if model is not None:
        return model
    answer = _answer(request, shown(id), patience_seconds)
    model = _model(answer, config, id=id, source=source)
    if model is None:
        raise ModelError(f"{shown(id)}: {_failure(answer)}")
    keep_text(kept_name, answer)
    return model


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _model(answer: str, config: Mapping[str, Any], *, id: str, source: str) -> Model | None:
    """The model an answer describes; None for one that is an error, incomplete or damaged."""
    try:
        found = json.loads(answer)
        tensors = tuple(_tensor(entry) for entry in found["tensors"])
        if found["task"] not in get_args(Task) or not tensors:
            return None
        model = Model(
            id=id,
            task=found["task"],
            config_json=json.dumps(config, sort_keys=True, separators=(",", ":")),
            tensors=tensors,
            max_positions=None if found["max_positions"] is None else int(found["max_positions"]),
            source=source,
            built_attention=_attention(found["attention"]),
        )
        return model if model.parameters == found["parameters"] else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _tensor(entry: Mapping[str, Any]) -> WeightTensor:
    if entry["role"] not in get_args(Role) or entry["kind"] not in get_args(Kind):
        raise ValueError(f"unknown role or kind: {entry['role']}, {entry['kind']}")
    return WeightTensor(
        name=str(entry["name"]),
        shape=tuple(int(size) for size in entry["shape"]),
        role=entry["role"],
        kind=entry["kind"],
        layers=tuple(int(layer) for layer in entry["layers"]),
        tied_to=None if entry["tied_to"] is None else str(entry["tied_to"]),
    )


def _attention(entry: Mapping[str, Any]) -> AttentionShape:
    return AttentionShape(
        fused=bool(entry["fused"]),
        head_dims=tuple((int(queries), int(values)) for queries, values in entry["head_dims"]),
        window=None if entry["window"] is None else int(entry["window"]),
        dropout=float(entry["dropout"]),
    )


def _failure(answer: str) -> str:
    """The end of the error sentence for an answer that is no inventory."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        error = json.loads(answer).get("error")
        if isinstance(error, str):
            return " ".join(error.split())
    return "its weights could not be counted: the process that builds it on the meta device failed."


def _answer(request: str, label: str, patience_seconds: float) -> str:
    """What the child prints. Raises ModelError; leaves no process behind."""
    for package in ("torch", "transformers"):
        if util.find_spec(package) is None:
            raise ModelError(
                f"{label}: counting its weights needs {package}, which is not installed; install torch and "
                "transformers, or choose a model of the catalogue."
            )
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "planner.training.inventory"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        start_new_session=True,
    )
    try:
        output, _ = child.communicate(request.encode("utf-8", "surrogatepass"), timeout=patience_seconds)
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"{label}: counting its weights took longer than {patience_seconds:.0f} s; "
            "choose a smaller model."
        ) from None
    finally:
        _end(child)
    return output.decode("utf-8", "replace")


def _environment() -> dict[str, str]:
    """The child's: no GPU, no network, no token, one thread, and this very package first."""
    environment = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    package_home = str(Path(__file__).resolve().parents[2])
    paths = [package_home, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONIOENCODING": "utf-8",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "USE_TF": "0",
    }
    return environment


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill the child's whole process group where it still runs, and wait for it."""
    if child.poll() is None:
        with contextlib.suppress(OSError):
            if os.name == "posix":
                os.killpg(child.pid, signal.SIGKILL)
            else:
                child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
