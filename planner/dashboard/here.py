"""What this server itself may and can measure: permission, GPUs, and its one measurement at a time."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass

import streamlit as st

from planner.dashboard.measurements import Measurements, driver_gpus
from planner.measure.nvml import DriverGpu

__all__ = ["Visitor", "allowed", "gpus", "measurements", "visitor"]


def allowed() -> bool:
    """Whether whoever runs the server lets its visitors measure."""
    return os.environ.get("PLANNER_ALLOW_MEASURE") == "1"


@st.cache_resource(on_release=Measurements.close, show_spinner=False)
def measurements() -> Measurements:
    """The one measurement of this server. `PLANNER_MEASURE_LIMIT_S` sets the seconds for it."""
    return Measurements(time_limit_s=float(os.environ.get("PLANNER_MEASURE_LIMIT_S", "600")))


@dataclass(frozen=True)
class Visitor:
    """One session that looks at the page Measure."""

    name: str
    of: Measurements

    def leave(self) -> None:
        """The session is over, and so is the run that it began."""
        self.of.cancel(self.name)


@st.cache_resource(scope="session", on_release=Visitor.leave, show_spinner=False)
def visitor() -> Visitor:
    """This session."""
    return Visitor(uuid.uuid4().hex, measurements())


@st.cache_data(ttl=20, show_spinner="Asking the driver")
def gpus() -> tuple[DriverGpu, ...]:
    """The GPUs of this machine, asked again after 20 s."""
    return driver_gpus()
