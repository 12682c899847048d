"""`planner measure`: the memory of the real training step on a CUDA device (imports no torch itself)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli.flags import add_setup_flags, setup_from
from planner.cli.measure_ranks import add_rank_flags, alone, ranks_answer
from planner.cli.phases import phases_told
from planner.cli.reply import Reply
from planner.errors import SetupError
from planner.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from planner.measure.answer import Rehearsal
    from planner.measure.runner import MatrixRun, Outcome
    from planner.record import Record

__all__ = ["HELP", "answer", "flags", "seconds"]

HELP = "memory of the real training step on a CUDA device, beside both predictions; keeps a record"
_BUDGET_S = 3600.0


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add_setup_flags(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--time-limit-s", metavar="S", help="seconds for one setup (default: 600)")
    run.add_argument("--rehearse", action="store_true", help="run on the CPU; tells times, measures nothing")
    run.add_argument("--trace", metavar="FILE", help="write the allocator's history, for records --align")
    run.add_argument("--python", metavar="PATH", help="interpreter to measure with (default: this one)")
    add_rank_flags(run)
    run.add_argument("--no-record", action="store_true", help="do not append the run to your records")
    many = parser.add_argument_group("many setups")
    many.add_argument("--matrix", metavar="FILE", help="setups to run, in TOML; needs --out")
    many.add_argument("--out", metavar="DIR", help="folder for their records; what it has is not run again")
    many.add_argument("--budget-s", metavar="S", help="seconds for this call (default: 3600)")
    many.add_argument("--try-all", action="store_true", help="also run what should not fit the device")


def answer(args: argparse.Namespace) -> Reply:
    """One setup measured and recorded, or a matrix of them."""
    time_limit_s = seconds(args, "time_limit_s", 600.0)
    if hasattr(args, "matrix"):
        return _matrix(args, time_limit_s)
    for name in ("out", "budget_s", "try_all"):
        if hasattr(args, name):
            raise SetupError(f"--{name.replace('_', '-')} belongs to --matrix FILE; leave it out.")
    setup = setup_from(args)
    python = getattr(args, "python", None)
    rank = alone(args, setup)
    if setup.sharding.is_distributed and rank is None:
        return ranks_answer(args, setup, time_limit_s=time_limit_s)
    if hasattr(args, "rehearse"):
        from planner.measure.probe import rehearse

        found = rehearse(setup, time_limit_s=time_limit_s, on_event=phases_told(), python=python)
        return _rehearsal_reply(found)
    from planner.measure.records import append
    from planner.measure.single import record_of

    trace = getattr(args, "trace", None)
    record = record_of(
        setup, time_limit_s=time_limit_s, on_event=phases_told(), trace=trace, python=python, alone=rank
    )
    kept = None if hasattr(args, "no_record") else append(record)
    return _record_reply(record, kept)


def seconds(args: argparse.Namespace, name: str, default: float) -> float:
    """A flag's seconds, above 0 and at most a week. Raises SetupError."""
    text = getattr(args, name, None)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 7 * 86400:
        raise SetupError(f"--{name.replace('_', '-')} must be seconds above 0, got {text!r}.")
    return value


def _record_reply(record: Record, kept: Path | None) -> Reply:
    from planner.accuracy import side_by_side
    from planner.cli.record_tables import side_by_side_text

    both = side_by_side(
        estimate=record.estimate.report, simulation=record.simulation.report, measurement=record.report
    )

    def show(console: Console) -> None:
        report = record.report
        console.print(
            f"{record.setup['model']}, method {record.setup['method']}, precision "
            f"{record.setup['precision']}, on {record.device.name}: measured "
            f"{gib(report.peak_allocated_bytes)} allocated, {gib(report.peak_reserved_bytes or 0)} reserved, "
            f"peak in {report.peak_phase.replace('_', ' ')}."
        )
        if report.out_of_memory is not None:
            failure = report.out_of_memory
            console.print(
                f"Out of memory in {failure.phase.replace('_', ' ')}: {gib(failure.requested_bytes)} asked "
                f"for, {gib(failure.free_bytes)} free."
            )
        console.print(side_by_side_text(both), soft_wrap=True)
        for note in report.notes:
            console.print(note, soft_wrap=True)
        for name, prediction in (("estimate", record.estimate), ("simulation", record.simulation)):
            if prediction.report is None:
                console.print(f"No {name}: {prediction.reason}")
        if kept is not None:
            console.print(f"Recorded in {kept}.")

    values = {
        **record.report.to_dict(),
        "comparison": both.to_dict(),
        "estimate": record.estimate.to_dict(),
        "simulation": record.simulation.to_dict(),
        "record": None if kept is None else str(kept),
    }
    return Reply(answer=values, show=show)


def _rehearsal_reply(found: Rehearsal) -> Reply:
    from planner.cli.plain import columns

    def show(console: Console) -> None:
        console.print("Rehearsed on the CPU. Not a measurement: only a CUDA device gives one.")
        rows = [
            (p.name.replace("_", " "), str(p.step or ""), f"{p.seconds:.2f} s") for p in found.phases
        ]
        console.print(columns(("Phase", "Step", "Time"), rows), soft_wrap=True)

    return Reply(answer=found.to_dict(), show=show)


def _matrix(args: argparse.Namespace, time_limit_s: float) -> Reply:
    from planner.accuracy import error_table
    from planner.cli.record_tables import error_table_text
    from planner.measure.matrix import matrix_from
    from planner.measure.runner import run_matrix

    for name in ("model", "trace", "no_record"):
        if hasattr(args, name):
            raise SetupError(f"--{name.replace('_', '-')} and --matrix exclude each other; leave one out.")
    if not hasattr(args, "out"):
        raise SetupError("--matrix needs --out DIR, a folder for the records.")
    matrix = matrix_from(Path(args.matrix))
    number = 0

    def tell(outcome: Outcome) -> None:
        nonlocal number
        number += 1
        training = outcome.setup.training
        print(
            f"{number}/{len(matrix.setups)} {outcome.setup.model.id} {outcome.setup.method.name} "
            f"{training.precision} b{training.micro_batch_size} s{training.seq_len}: {outcome.words}",
            file=sys.stderr,
            flush=True,
        )

    run = run_matrix(
        matrix,
        Path(args.out),
        budget_s=seconds(args, "budget_s", _BUDGET_S),
        rehearse=hasattr(args, "rehearse"),
        time_limit_s=time_limit_s,
        try_all=hasattr(args, "try_all"),
        on_outcome=tell,
        python=getattr(args, "python", None),
    )
    table = error_table(run.records)

    def show(console: Console) -> None:
        console.print(_sentence(run, len(matrix.setups)), soft_wrap=True)
        console.print(error_table_text(table), soft_wrap=True)

    values = {
        "matrix": matrix.name,
        "setups": len(matrix.setups),
        "present": run.present,
        "left": run.left,
        **{state: run.count(state) for state in ("recorded", "rehearsed", "skipped", "failed")},
        "outcomes": [
            {"setup": o.setup.to_dict(), "state": o.state, "words": o.words} for o in run.outcomes
        ],
        "accuracy": [row.to_dict() for row in table],
    }
    return Reply(answer=values, show=show)


def _sentence(run: MatrixRun, setups: int) -> str:
    counts = ", ".join(
        f"{run.count(state)} {state}"
        for state in ("recorded", "rehearsed", "skipped", "failed")
        if run.count(state)
    )
    more = f" {run.left} are left: run the same command again." if run.left else ""
    return f"{setups} setups: {run.present} had a record before, {counts or 'none run now'}.{more}"
