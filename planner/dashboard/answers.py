"""From the inputs to the reports that the page shows: translation only, no arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.advise import Verdict, verdict, verdicts
from planner.catalog.gpus import Gpu
from planner.compare import Comparison, comparison, full_of
from planner.dashboard import state
from planner.dashboard.fields import method_fields, sharding_fields, training_fields
from planner.dashboard.links import DEFAULTS
from planner.dashboard.models import resolved
from planner.dashboard.words import SOURCE_TITLES, method_title
from planner.errors import PlannerError
from planner.estimate import estimate
from planner.report import MemoryReport
from planner.spec import METHODS, FullFineTuning, Setup, Sharding, Training

__all__ = ["Answer", "LabelledReport", "answer", "cards", "current_setup", "setup_of"]

LabelledReport = tuple[str, MemoryReport]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Everything the page says about one setup.

    `rows` are the bars, top first: a label such as "LoRA, predicted" and its report. `verdict` is None
    without a GPU; `measured` where a CUDA device produced a report of exactly this setup.
    """

    setup: Setup
    comparison: Comparison
    verdict: Verdict | None
    rows: tuple[LabelledReport, ...]
    measured: MemoryReport | None = None

    @property
    def chosen(self) -> MemoryReport:
        """The predicted report of the chosen method."""
        return self.comparison.chosen

    @property
    def prediction_error(self) -> float | None:
        """The prediction's share above (or below, negative) the measured peak; None where not measured."""
        if self.measured is None:
            return None
        return self.chosen.peak_allocated_bytes / self.measured.peak_allocated_bytes - 1

    @property
    def is_full(self) -> bool:
        """Whether full fine-tuning itself was chosen."""
        return isinstance(self.setup.method, FullFineTuning)


def setup_of(flat: Mapping[str, Any], config_text: str = "") -> Setup:
    """The setup of the sidebar's values. Raises SetupError or ModelError, in one line."""
    model = resolved(str(flat["model"]), config_text)
    name = str(flat.get("method", "full"))
    own = {field.name: flat[field.name] for field in method_fields(name) if field.name in flat}
    training = {field.name: flat[field.name] for field in training_fields() if field.name in flat}
    sharding = {field.name: flat[field.name] for field in sharding_fields() if field.name in flat}
    return Setup(
        model=model,
        method=METHODS[name](**own),
        training=Training(**training),
        gpu=flat.get("gpu"),
        sharding=Sharding(**sharding),
    )


def current_setup() -> tuple[Setup, str | None]:
    """The setup to show and, where the inputs make no sense, the line that says why.

    Then the setup is the last one that made sense; at a session's start, the page's own.
    """
    try:
        setup = setup_of(state.asked(), state.config_text())
    except PlannerError as error:
        return state.last_good() or setup_of(DEFAULTS), str(error)
    state.remember_good(setup)
    return setup, None


def answer(setup: Setup, more: Sequence[MemoryReport] = ()) -> Answer:
    """The reports of a setup beside full fine-tuning; `more` are simulated or measured ones of both.

    Where a part of the prediction is not known, the verdict is the simulation's.
    """
    chosen = estimate(setup)
    full = chosen if isinstance(setup.method, FullFineTuning) else estimate(full_of(setup))
    name = setup.method.name
    own = [report for report in more if report.setup.get("method") == name]
    others = [] if chosen is full else [full, *(report for report in more if report not in own)]
    simulated = next((report for report in own if report.source == "simulation"), None)
    judged = simulated if simulated is not None and chosen.not_known else chosen
    return Answer(
        setup=setup,
        comparison=comparison(full, chosen),
        verdict=None if setup.gpu is None else verdict(judged, setup.gpu),
        rows=tuple((_label(report), report) for report in (*others, chosen, *own)),
        measured=next((report for report in own if report.source == "measurement"), None),
    )


def cards(setup: Setup) -> tuple[tuple[Gpu, Verdict], ...]:
    """Every GPU of the catalogue with this run's verdict on it: what fits first, from the smallest up."""
    order = ("fits", "tight", "not known", "does not fit")
    return tuple(
        sorted(
            verdicts(setup), key=lambda pair: (order.index(pair[1].word), pair[0].total_bytes, pair[0].name)
        )
    )


def _label(report: MemoryReport) -> str:
    title = method_title(str(report.setup.get("method", "full")))
    return f"{title[0].upper()}{title[1:]}, {SOURCE_TITLES[report.source]}"
