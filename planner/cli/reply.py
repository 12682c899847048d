"""What a verb returns: the JSON object, and how a person is shown the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Reply"]

_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Reply:
    """`answer` holds JSON values; `show` prints tables on a console (imports rich, late)."""

    answer: Mapping[str, Any]
    show: Callable[[Console], None]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, with the schema's number first."""
        return {"schema": _SCHEMA, **self.answer}
