"""Tables for people. The only module that imports rich; nothing is computed here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from planner.advise import Change, MethodTable, Verdict
from planner.catalog.gpus import Gpu
from planner.compare import Comparison, Difference, Storage
from planner.report import MemoryReport
from planner.units import GB, GIB, count, gb, gib, percent

__all__ = [
    "screen",
    "show_comparison",
    "show_fit",
    "show_gpus",
    "show_methods",
    "show_models",
    "show_parameters",
    "show_report",
]

_PIPE_WIDTH = 120  # columns where the output is no terminal
_MOST_SOURCES = 8  # catalogue entries whose sources fit under a table
_SOURCE_WORD = {"estimate": "predicted", "simulation": "simulated", "measurement": "measured"}
_METHOD_WORD = {"lora": "LoRA", "qlora": "QLoRA", "adapter": "Adapters", "bitfit": "BitFit", "peft": "PEFT"}
Size = Callable[[float], str]


class _Screen(Console):
    def on_broken_pipe(self) -> None:
        """Leave the exit code to `main`; called while rich handles BrokenPipeError."""
        raise BrokenPipeError


def screen() -> Console:
    """The console on standard output; text is printed as it is, without markup."""
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    return _Screen(width=width, markup=False, highlight=False, emoji=False)


def show_report(console: Console, report: MemoryReport, verdict: Verdict | None) -> None:
    """Parameters, parts at the peak, phases and notes of one report."""
    size = _size_of(report)
    _lead(console, report)
    parts = _table("Part", "At the peak", "Share")
    for name, size_bytes in report.parts.to_dict().items():
        unknown = name in report.not_known
        share = size_bytes / report.peak_allocated_bytes if report.peak_allocated_bytes else 0.0
        parts.add_row(
            _words(name),
            "not known" if unknown else size(size_bytes),
            "" if unknown else percent(share),
        )
    parts.add_section()
    parts.add_row(f"Peak allocated, {_SOURCE_WORD[report.source]}", size(report.peak_allocated_bytes), "")
    if report.peak_reserved_bytes is not None:
        parts.add_row(f"Peak reserved, {_SOURCE_WORD[report.source]}", size(report.peak_reserved_bytes), "")
    console.print(parts)
    phases = _table("Phase", "Peak allocated", "At its end")
    for phase in report.phases:
        step = f", step {phase.step}" if phase.step else ""
        phases.add_row(
            f"{_words(phase.name)}{step}", size(phase.peak_allocated_bytes), size(phase.allocated_bytes)
        )
    console.print(phases)
    for note in report.notes:
        console.print(note)
    if verdict:
        console.print(verdict.sentence)


def show_comparison(console: Console, both: Comparison, space: Storage, verdicts: Sequence[Verdict]) -> None:
    """Both reports part by part, the trained parameters, and the disk space."""
    size = _size_of(both.chosen)
    chosen = _METHOD_WORD[both.chosen.setup["method"]]
    _lead(console, both.chosen)
    table = _table("Part", "Full fine-tuning", chosen, "Saved", "Reduction")
    for part in both.parts:
        _add_difference(table, _words(part.name), part, size, unknown=part.name in both.chosen.not_known)
    table.add_section()
    peak = f"Peak allocated, {_SOURCE_WORD[both.chosen.source]}"
    _add_difference(table, peak, both.peak, size, unknown=False)
    console.print(table)
    for note in both.chosen.notes:
        console.print(note)
    full, fewer = both.full.parameters.trainable, both.chosen.parameters.trainable
    console.print(
        f"Trained parameters: {count(fewer)} instead of {count(full)}, "
        f"{percent(both.trainable_reduction)} fewer."
    )
    tasks = "1 task" if space.tasks == 1 else f"{space.tasks} tasks"
    console.print(
        f"On disk for {tasks}: {size(space.full_copies_bytes)} as full copies, "
        f"{size(space.base_and_adapters_bytes)} as one base and {size(space.adapter_bytes)} a task."
    )
    if space.full_optimizer_bytes is not None and space.optimizer_bytes is not None:
        console.print(
            f"To resume a task's run, its optimizer states as well: {size(space.optimizer_bytes)} instead of "
            f"{size(space.full_optimizer_bytes)}."
        )
    for verdict, name in zip(verdicts, ("Full fine-tuning", chosen), strict=False):
        console.print(f"{name}: {verdict.sentence}")


def show_fit(
    console: Console,
    verdict: Verdict,
    batch: int | None,
    seq_len: int | None,
    smallest: Gpu | None,
    changes: Sequence[Change],
) -> None:
    """The verdict, the limits and what to change."""
    console.print(verdict.sentence)
    limits = _table("Most that fits", "", right=1)
    limits.add_row("Largest micro batch", _limit(batch))
    limits.add_row("Longest sequence", _limit(seq_len))
    none = "not known" if batch is None else "none"
    name = f"{smallest.driver_name}, {gib(smallest.total_bytes)}" if smallest else none
    limits.add_row("Smallest GPU that fits", name)
    console.print(limits)
    if not changes:
        return
    table = _table("To need less memory", "Costs", "Saves", "New peak", "Fits", right=2)
    for change in changes:
        table.add_row(
            change.words,
            change.cost,
            gib(change.saving_bytes),
            gib(change.peak_allocated_bytes),
            {True: "yes", False: "no", None: "not known"}[change.fits],
        )
    console.print(table)


def show_methods(console: Console, found: MethodTable, verdicts: Mapping[str, str]) -> None:
    """Every method from the smallest peak up; `verdicts` are words by title, empty without a GPU."""
    more = found.reference.title if found.reference else ""
    table = _table("Method", "Trained", "Peak allocated", f"Most against {more}", *["GPU"][: len(verdicts)])
    for row in found.rows:
        part = row.difference(found.reference) if found.reference else None
        table.add_row(
            row.title,
            "not known" if row.trainable is None else count(row.trainable),
            "simulate" if row.peak_bytes is None else gib(row.peak_bytes),
            f"{_words(part[0])} {'+' if part[1] > 0 else '-'}{gib(abs(part[1]))}" if part else "",
            *([verdicts.get(row.title, "")] if verdicts else []),
        )
    console.print(table)
    console.print(found.sentence)
    for row in found.left_out:
        console.print(f"Without {row.title}: {row.reason}")


def show_parameters(console: Console, found: Mapping[str, Any]) -> None:
    """Numbers of parameters; `found` is the verb's JSON answer."""
    numbers = found["parameters"]
    table = _table("Parameters", "", "Share")
    for name in ("total", "trainable", "frozen", "added"):
        table.add_row(_words(name), f"{numbers[name]:,}", percent(numbers[name] / numbers["total"]))
    console.print(table)
    if found["base_by_role"]:
        roles = _table("Base model", "Parameters")
        for role, number in found["base_by_role"].items():
            roles.add_row(_words(role), f"{number:,}")
        console.print(roles)
    if found["adapted"]:
        adapted = _table("Adapted matrix", "Shape", "Layers", "Full", "LoRA", "Fewer")
        for row in found["adapted"]:
            shape = " x ".join(str(side) for side in row["shape"])
            adapted.add_row(
                row["module"],
                shape,
                str(row["count"]),
                f"{row['full']:,}",
                f"{row['trainable']:,}",
                percent(row["reduction"]),
            )
        console.print(adapted)


def show_models(console: Console, found: Sequence[Mapping[str, Any]]) -> None:
    """The catalogue's models."""
    table = _table("Model", "Family", "Parameters", "Positions", right=2)
    for row in found:
        positions = f"{row['max_positions']:,}" if row["max_positions"] else "any"
        table.add_row(row["id"], str(row["family"]), f"{row['parameters']:,}", positions)
    console.print(table)
    _show_sources(console, [(row["id"], [row["source"], *row["evidence"]]) for row in found])


def show_gpus(console: Console, found: Sequence[Mapping[str, Any]]) -> None:
    """The catalogue's GPUs."""
    table = _table("GPU", "Name of the driver", "Memory", "Reported by", "Capability", right=2)
    for row in found:
        capability = ".".join(str(part) for part in row["capability"] or ())
        by = "product page" if row["nominal"] else row["memory_kind"]
        table.add_row(row["name"], row["driver_name"], gib(row["total_bytes"]), by, capability)
    console.print(table)
    _show_sources(console, [(row["name"], [row["source"]]) for row in found])


def _show_sources(console: Console, found: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Where each entry's numbers come from, if they are few; `--json` lists every one."""
    if len(found) > _MOST_SOURCES:
        console.print("--json and --name list the sources, too.")
        return
    for name, sources in found:
        console.print(f"{name}: where its numbers come from")
        for source in sources:
            console.print(f"  {source}", soft_wrap=True)


def _lead(console: Console, report: MemoryReport) -> None:
    numbers, setup = report.parameters, report.setup
    console.print(
        f"{setup['model']}, method {setup['method']}, precision {setup['precision']}: "
        f"{count(numbers.total)} parameters, {count(numbers.trainable)} trained "
        f"({percent(numbers.trainable_share)})."
    )


def _add_difference(table: Table, name: str, part: Difference, size: Size, *, unknown: bool) -> None:
    if unknown:
        table.add_row(name, "not known", "not known", "", "")
        return
    reduction = "" if part.reduction is None else percent(part.reduction)
    table.add_row(name, size(part.full_bytes), size(part.chosen_bytes), size(part.saved_bytes), reduction)


def _table(*columns: str, right: int = 1) -> Table:
    """A plain table; columns from number `right` on are aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number >= right else "left", overflow="fold")
    return table


def _size_of(report: MemoryReport) -> Size:
    """GiB, and GB in the textbook example, which is worked in powers of ten."""
    textbook = report.setup.get("precision") == "textbook"
    unit_bytes, name, usual = (GB, "GB", gb) if textbook else (GIB, "GiB", gib)

    def size(size_bytes: float) -> str:
        """Two digits where two decimals would show nothing: `"0.0016 GiB"`."""
        value = size_bytes / unit_bytes
        return f"{value:.2g} {name}" if abs(value) < 0.01 else usual(size_bytes)

    return size


def _limit(number: int | None) -> str:
    if number is None:
        return "not known"
    return f"{number:,}" if number else "none fits"


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()
