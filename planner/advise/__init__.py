"""Advice from reports: does it fit, how much would fit, what to change. Pure functions over `estimate`."""

from planner.advise.changes import Change, applied, changes, nearest_fitting
from planner.advise.fits import Verdict, Word, verdict
from planner.advise.limits import (
    Cell,
    grid,
    largest_micro_batch,
    largest_seq_len,
    smallest_gpu,
    verdicts,
)
from planner.advise.method_table import MethodRow, MethodTable, method_table

__all__ = [
    "Cell",
    "Change",
    "MethodRow",
    "MethodTable",
    "Verdict",
    "Word",
    "applied",
    "changes",
    "grid",
    "largest_micro_batch",
    "largest_seq_len",
    "method_table",
    "nearest_fitting",
    "smallest_gpu",
    "verdict",
    "verdicts",
]
