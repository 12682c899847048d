"""Predictions written down before their setups were measured: one line of JSON a setup."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import PlannerError, SetupError
from planner.record import Prediction, setup_key

__all__ = ["Foretold", "foretold", "line_of"]

_SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What was predicted for one setup on one GPU, and when (ISO 8601, UTC). `set` names the matrix."""

    setup: Mapping[str, Any]
    gpu: str
    date: str
    estimate: Prediction
    simulation: Prediction
    set: str = ""

    @property
    def key(self) -> str:
        """The setup's key, as records have it."""
        return setup_key(self.setup)


def line_of(prediction: Foretold) -> str:
    """One line of JSON, without the line's end."""
    return json.dumps(
        {
            "schema": _SCHEMA,
            "set": prediction.set,
            "date": prediction.date,
            "gpu": prediction.gpu,
            "setup": dict(prediction.setup),
            "estimate": prediction.estimate.to_dict(),
            "simulation": prediction.simulation.to_dict(),
        },
        allow_nan=False,
    )


def foretold(path: Path) -> dict[str, Foretold]:
    """The predictions of a file by their setup's key; the first line of a setup counts.

    Raises SetupError, naming the line, for a file that cannot be read or a line that is no prediction.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise SetupError(f"{path} cannot be read ({reason}); give a file of predictions.") from None
    found: dict[str, Foretold] = {}
    for number, line in enumerate(lines, 1):
        try:
            prediction = _parsed(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, PlannerError):
            raise SetupError(
                f"{path}, line {number} is no prediction; python -m benchmarks.predictions writes them."
            ) from None
        found.setdefault(prediction.key, prediction)
    return found


def _parsed(values: Mapping[str, Any]) -> Foretold:
    if values["schema"] != _SCHEMA:
        raise ValueError(values["schema"])
    return Foretold(
        setup=dict(values["setup"]),
        gpu=str(values["gpu"]),
        date=str(values["date"]),
        set=str(values["set"]),
        estimate=Prediction.from_dict(values["estimate"]),
        simulation=Prediction.from_dict(values["simulation"]),
    )
