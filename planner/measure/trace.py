"""The allocator's real history, reduced to plain events (no torch, no pickle)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.record import Device
from planner.simulate.events import Event

__all__ = ["Trace", "reduced", "trace_from"]

SCHEMA = 1
_OUR_FRAMES = ("planner/training/run.py", "planner/measure/")
_KEPT_FRAMES = 3


def reduced(entries: Iterable[Mapping[str, Any]], labels: Sequence[str]) -> dict[str, Any]:
    """The history of `torch.cuda.memory._snapshot()` as JSON values.

    `events`: [1, block, bytes, phase, site] for a block taken, [-1, block] for one given back; blocks are
    numbered as they are taken, bytes are those asked for. `phases` names the phase numbers. `labels` say what
    each snapshot of the history was taken for: those that begin and end phases mark them. `segments`: [1 or
    -1, bytes] of what the device gave and got back, at the event with that number.
    """
    phases: list[str] = [""]
    marks = iter(labels)
    events: list[list[Any]] = []
    segments: list[list[int]] = []
    alive: dict[int, int] = {}
    blocks = 0
    now = 0
    for entry in entries:
        action = entry["action"]
        if action == "snapshot":
            kind, _, name = next(marks, "").partition(" ")
            if kind == "begin":
                phases.append(name)
                now = len(phases) - 1
            elif kind == "end":
                now = 0
        elif action == "alloc":
            blocks += 1
            alive[entry["addr"]] = blocks
            events.append([1, blocks, entry["size"], now, _site(entry.get("frames", ()))])
        elif action == "free_completed" and entry["addr"] in alive:
            events.append([-1, alive.pop(entry["addr"])])
        elif action in ("segment_alloc", "segment_map", "segment_free", "segment_unmap"):
            sign = 1 if action in ("segment_alloc", "segment_map") else -1
            segments.append([len(events), sign * entry["size"]])
    return {"phases": phases, "events": events, "segments": segments}


def _site(frames: Iterable[Mapping[str, Any]]) -> str:
    """The innermost lines of Python, ours left out, paths cut to the package."""
    kept = []
    for frame in frames:
        path = str(frame.get("filename", "")).replace("\\", "/")
        if not path.endswith(".py") or any(own in path for own in _OUR_FRAMES):
            continue
        short = path.rpartition("site-packages/")[2] if "site-packages/" in path else path.rpartition("/")[2]
        kept.append(f"{short}:{frame.get('line')} {frame.get('name')}")
        if len(kept) == _KEPT_FRAMES:
            break
    return " < ".join(kept)


class Trace:
    """A kept trace: `setup`, `device` and `versions` as JSON values, and `events` in order."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        """From a trace file's JSON object. Raises KeyError, TypeError or ValueError for anything else."""
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}")
        self.setup: Mapping[str, Any] = content["setup"]
        self.device = Device.from_dict(content["device"])
        self.versions: Mapping[str, Any] = content["versions"]
        names = [str(name) for name in content["phases"]]
        sizes: dict[int, int] = {}
        events: list[Event] = []
        for entry in content["events"]:
            block = int(entry[1])
            if entry[0] < 0:
                events.append(Event(block=block, size_bytes=sizes[block], freed=True))
                continue
            sizes[block] = int(entry[2])
            name, _, step = names[entry[3]].partition(" ")
            events.append(
                Event(
                    block=block,
                    size_bytes=sizes[block],
                    freed=False,
                    phase=name,
                    step=int(step) if step else None,
                    site=str(entry[4]),
                )
            )
        self.events = tuple(events)


def trace_from(path: Path) -> Trace:
    """A trace that `measure --trace` wrote. Raises PlannerError for any other file."""
    try:
        return Trace(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise PlannerError(f"{path} cannot be read ({error.strerror}); name a trace.") from None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PlannerError(f"{path} is no trace of measure --trace ({error}).") from None
