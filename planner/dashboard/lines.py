"""What another process said, made fit for the page: one short line in which no path of the server stands."""

from __future__ import annotations

import re

__all__ = ["LONGEST", "public_line"]

LONGEST = 300
_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/'\":,;()]+/)+([^\s/'\":,;()]*)")


def public_line(text: str) -> str:
    """One line of at most 300 characters; of an absolute path only its last name is left."""
    line = _PATH.sub(r"\1", " ".join(text.split()))
    return line if len(line) <= LONGEST else line[: LONGEST - 3].rstrip() + "..."
