"""Where records are kept: packaged ones, the user's own, uploads; JSON lines that are only ever appended."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.measure.locks import file_lock
from planner.record import Origin, Record

__all__ = [
    "Shelf",
    "Unreadable",
    "append",
    "append_line",
    "json_lines",
    "keep_upload",
    "merge",
    "own_file",
    "parsed",
    "read",
    "records_dir",
    "shelf",
]

PACKAGED = Path(__file__).parent / "recordings"
LONGEST_LINE_BYTES = 4 << 20  # a record takes some 8 KB; what is longer is none


@dataclass(frozen=True, kw_only=True, slots=True)
class Unreadable:
    """A line that is no record: `place` is file:line, `reason` says why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shelf:
    """The records of some files, in order, and the lines that were skipped."""

    records: tuple[Record, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()


def records_dir() -> Path:
    """The folder of the user's records: `PLANNER_RECORDS_DIR`, or the user's data folder."""
    own = os.environ.get("PLANNER_RECORDS_DIR")
    if own:
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "vram-planner"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "vram-planner" / "data"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "vram-planner"


def own_file() -> Path:
    """The file that `measure` appends to. Uploads go to the folder `uploads` beside it."""
    return records_dir() / "records.jsonl"


def shelf() -> Shelf:
    """Every record there is: packaged, the user's own, uploaded."""
    own = records_dir()
    return _joined(
        (_files(PACKAGED, "packaged"), _files(own, "own"), _files(own / "uploads", "uploaded"))
    )


def _files(folder: Path, origin: Origin) -> Shelf:
    try:
        paths = sorted(folder.glob("*.jsonl"))
    except OSError:
        return Shelf()
    return read(paths, origin=origin)


def read(paths: Iterable[Path], *, origin: Origin = "other") -> Shelf:
    """The records of these files; a line that is none is named and skipped. Raises PlannerError for a file
    that cannot be opened.
    """
    found = [parsed(_content(path), name=str(path), origin=origin) for path in paths]
    return _joined(found)


def parsed(content: bytes, *, name: str, origin: Origin = "other") -> Shelf:
    """The records of a file's content; `name` names it in the lines that are none."""
    records: list[Record] = []
    unreadable: list[Unreadable] = []
    for number, line in enumerate(content.split(b"\n"), 1):
        place = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            if len(line) > LONGEST_LINE_BYTES:
                raise PlannerError(f"longer than {LONGEST_LINE_BYTES >> 20} MiB")
            values = json.loads(line.decode("utf-8"))
            records.append(Record.from_dict(values, origin=origin, place=place))
        except PlannerError as error:
            unreadable.append(Unreadable(place=place, reason=str(error).rstrip(".")))
        except (ValueError, RecursionError):
            unreadable.append(Unreadable(place=place, reason="not a line of JSON"))
    return Shelf(records=tuple(records), unreadable=tuple(unreadable))


def keep_upload(content: bytes, name: str) -> tuple[int, Shelf]:
    """Keep the records of an uploaded file apart from the user's own; how many were new, what was read."""
    found = parsed(content, name=name, origin="uploaded")
    return _add(found, records_dir() / "uploads" / "records.jsonl"), found


def _joined(shelves: Sequence[Shelf]) -> Shelf:
    return Shelf(
        records=tuple(record for part in shelves for record in part.records),
        unreadable=tuple(line for part in shelves for line in part.unreadable),
    )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PlannerError(f"{path} cannot be read ({error.strerror}); name a file of records.") from None


def append(record: Record, path: Path | None = None) -> Path:
    """Append one record, durably and whole, to `path` (default: the user's own file). Raises PlannerError."""
    target = own_file() if path is None else path
    append_line(json.dumps(record.to_dict(), allow_nan=False), target)
    return target


def append_line(line: str, path: Path) -> None:
    """Append one line under the file's lock: written, flushed to the disk, read back; or nothing at all.

    A broken last line that a lost process left is closed first, so that it spoils no other. Raises
    PlannerError, with the file as it was, where the disk is full or the folder cannot be written.
    """
    data = line.encode("utf-8") + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    except OSError as error:
        raise PlannerError(f"{path} cannot be written ({error.strerror}); nothing was recorded.") from None
    try:
        with file_lock(handle):
            size = os.lseek(handle, 0, os.SEEK_END)
            if size and _at(handle, size - 1, 1) != b"\n":
                data = b"\n" + data
            try:
                _write(handle, data)
                os.fsync(handle)
                if _at(handle, size, len(data)) != data:
                    raise OSError(0, "what was written reads back differently")
            except OSError as error:
                os.ftruncate(handle, size)
                raise PlannerError(
                    f"{path} cannot be written ({error.strerror}); nothing was recorded, the records before "
                    "are untouched. Free some space and measure again."
                ) from None
    finally:
        os.close(handle)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects, each with a "setup", of a file of the planner's own; broken lines are left out."""
    found = []
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("setup"), dict):
                found.append(value)
    return found


def merge(sources: Sequence[Path], into: Path) -> tuple[int, Shelf]:
    """Append the records of `sources` that `into` does not have yet; how many were new, and what was read."""
    found = read(sources)
    return _add(found, into), found


def _add(found: Shelf, into: Path) -> int:
    """Append those that are new."""
    present = read([into]).records if into.exists() else ()
    known = {json.dumps(record.to_dict(), sort_keys=True) for record in present}
    added = 0
    for record in found.records:
        text = json.dumps(record.to_dict(), sort_keys=True)
        if text not in known:
            known.add(text)
            append(record, into)
            added += 1
    return added


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _at(handle: int, offset: int, size: int) -> bytes:
    os.lseek(handle, offset, os.SEEK_SET)
    return os.read(handle, size)
