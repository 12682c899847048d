"""Small files kept between runs: configs fetched from the hub, weight inventories.

They live in `PLANNER_CACHE_DIR`, or in `vram-planner` under the user's cache folder. Losing them costs
time only: a file that cannot be read is made again, a folder that cannot be written is done without.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

__all__ = ["cache_dir", "keep_text", "kept_text"]


def cache_dir() -> Path:
    """The folder for kept files; it need not exist."""
    own = os.environ.get("PLANNER_CACHE_DIR")
    if own:
        return Path(own)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "vram-planner"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "vram-planner" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vram-planner"


def kept_text(name: str, most_bytes: int) -> str | None:
    """The text kept under `name` ("folder/file.json"), or None where there is none that can be read."""
    try:
        with (cache_dir() / name).open("rb") as file:
            data = file.read(most_bytes + 1)
        return data.decode("utf-8") if len(data) <= most_bytes else None
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home directory
        return None


def keep_text(name: str, text: str) -> None:
    """Keep `text` under `name`: written aside and renamed, so that no reader sees half of it."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        target = cache_dir() / name
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(aside, target)
        except BaseException:
            os.unlink(aside)
            raise
