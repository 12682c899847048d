"""`planner records`: the recorded runs, their accuracy, and what can be done with their files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.reply import Reply
from planner.errors import PlannerError, SetupError

if TYPE_CHECKING:
    from rich.console import Console

    from planner.measure.records import Shelf, Unreadable
    from planner.record import Prediction, Record

__all__ = ["HELP", "answer", "flags"]

HELP = "recorded runs: list, filter, validate, export, merge, and how far the predictions are off"
_EMPTY = (
    "There are no records yet; run planner measure on a machine with a CUDA device, or merge its records "
    "with --merge FILE."
)
_SIMULATION_LIMIT_S = 600.0


def flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    which = parser.add_argument_group("which records")
    which.add_argument("--file", metavar="FILE", nargs="+", help="these files, not the packaged and your own")
    which.add_argument(
        "--filter", metavar="KEY=VALUE", action="append", help="only runs with this setting, device, family"
    )
    which.add_argument("--set", metavar="matrix|unseen|all", help="only runs of one list (default: all)")
    what = parser.add_argument_group("what to do; without any of these they are listed")
    what.add_argument("--accuracy", action="store_true", help="errors of the predictions, by group")
    what.add_argument(
        "--resimulate", action="store_true", help="with --accuracy: this version's simulation too"
    )
    what.add_argument(
        "--predictions", metavar="FILE", help="with --accuracy: what this file predicted before the runs, too"
    )
    what.add_argument("--validate", action="store_true", help="name every line that is no record")
    what.add_argument("--csv", metavar="FILE", help="write them as a table for a spreadsheet")
    what.add_argument("--merge", metavar="FILE", nargs="+", help="append their records to your own")
    what.add_argument("--into", metavar="FILE", help="with --merge: the file to append to")
    what.add_argument("--align", metavar="TRACE", help="a real trace beside the simulated events")


def answer(args: argparse.Namespace) -> Reply:
    """What the flags ask for; exactly one thing."""
    chosen = [name for name in ("accuracy", "validate", "csv", "merge", "align") if hasattr(args, name)]
    if len(chosen) > 1:
        raise SetupError(f"--{chosen[0]} and --{chosen[1]} exclude each other; give one.")
    if hasattr(args, "into") and "merge" not in chosen:
        raise SetupError("--into belongs to --merge FILE; leave it out.")
    for name in ("resimulate", "predictions"):
        if hasattr(args, name) and "accuracy" not in chosen:
            raise SetupError(f"--{name} belongs to --accuracy; leave it out.")
    if chosen == ["merge"]:
        return _merged(args)
    if chosen == ["align"]:
        return _aligned(Path(args.align))
    from planner.measure.selection import filtered, of_set, write_csv

    shelf = _shelf(args)
    if chosen == ["validate"]:
        return _validated(shelf)
    _warn(shelf.unreadable)
    records = filtered(of_set(shelf.records, getattr(args, "set", "all")), getattr(args, "filter", []))
    if chosen == ["csv"]:
        write_csv(records, Path(args.csv))
        return _sentence({"csv": args.csv, "records": len(records)}, f"{len(records)} records in {args.csv}.")
    if chosen == ["accuracy"]:
        before = Path(args.predictions) if hasattr(args, "predictions") else None
        return _accuracy(records, shelf, again=hasattr(args, "resimulate"), before=before)
    return _listed(records, shelf)


def _shelf(args: argparse.Namespace) -> Shelf:
    from planner.measure.records import read, shelf

    return read([Path(name) for name in args.file]) if hasattr(args, "file") else shelf()


def _warn(unreadable: Sequence[Unreadable]) -> None:
    """Name the lines that are skipped, on standard error."""
    for line in unreadable:
        print(f"planner: skipped {line}.", file=sys.stderr)


def _sentence(values: dict[str, Any], text: str) -> Reply:
    def show(console: Console) -> None:
        console.print(text, soft_wrap=True)

    return Reply(answer=values, show=show)


def _listed(records: Sequence[Record], shelf: Shelf) -> Reply:
    from planner.cli.record_tables import records_text

    text = records_text(records) if records else _nothing(shelf)
    values: dict[str, Any] = {
        "records": [{**record.to_dict(), "from": record.origin, "place": record.place} for record in records],
        "unreadable": [str(line) for line in shelf.unreadable],
    }
    if not records:
        values["message"] = text
    return _sentence(values, text)


def _nothing(shelf: Shelf) -> str:
    return "None of the records is asked for; change --filter or --set." if shelf.records else _EMPTY


def _validated(shelf: Shelf) -> Reply:
    from planner.spec import Setup

    wrong = [str(line) for line in shelf.unreadable]
    for record in shelf.records:
        try:
            Setup.from_dict(record.setup)
        except SetupError as error:
            wrong.append(f"{record.place}: its setup is refused ({str(error).rstrip('.')})")
    lines = len(shelf.records) + len(shelf.unreadable)
    if wrong:
        for line in wrong[1:]:
            print(f"planner: {line}.", file=sys.stderr)
        raise PlannerError(f"{len(wrong)} of {lines} lines are no valid record; the first is {wrong[0]}.")
    return _sentence({"valid": lines}, f"All {lines} records are valid." if lines else _EMPTY)


def _merged(args: argparse.Namespace) -> Reply:
    from planner.measure.records import merge, own_file

    into = Path(args.into) if hasattr(args, "into") else own_file()
    added, found = merge([Path(name) for name in args.merge], into)
    _warn(found.unreadable)
    values = {"added": added, "read": len(found.records), "into": str(into)}
    return _sentence(
        values | {"unreadable": [str(line) for line in found.unreadable]},
        f"{added} of {len(found.records)} records were new and are in {into} now.",
    )


def _accuracy(records: Sequence[Record], shelf: Shelf, *, again: bool, before: Path | None) -> Reply:
    from planner.accuracy import STORED, error_table, fit_table
    from planner.cli.record_tables import error_table_text, fit_table_text

    estimates = {record.key: _estimate(record) for record in records}
    predictions = {**STORED, "estimate_now": lambda record: estimates[record.key].report}
    if again:
        simulations = _resimulated(records)
        predictions["simulation_now"] = lambda record: simulations[_run_key(record)].report
    if before is not None:
        from planner.measure.foretold import foretold

        first = foretold(before)
        records = [record for record in records if record.key in first]
        predictions["estimate_before"] = lambda record: first[record.key].estimate.report
        predictions["simulation_before"] = lambda record: first[record.key].simulation.report
    table = error_table(records, predictions)
    fits = fit_table(records, predictions)
    full = sum(record.report.out_of_memory is not None for record in records)
    text = error_table_text(table) if records else _nothing(shelf)
    if records:
        text += f"\n\n{fit_table_text(fits)}"
    if full:
        text += f"\n{full} more runs ended out of memory; they have no peak to compare."
    values = {
        "runs": len(records) - full,
        "out_of_memory": full,
        "accuracy": [row.to_dict() for row in table],
        "fits": [row.to_dict() for row in fits],
        "unreadable": [str(line) for line in shelf.unreadable],
    }
    return _sentence(values if records else {**values, "message": text}, text)


def _estimate(record: Record) -> Prediction:
    """This version's estimate of a recorded setup."""
    from planner.measure.probe import estimated
    from planner.record import Prediction
    from planner.spec import Setup

    try:
        return estimated(Setup.from_dict(record.setup))
    except SetupError as error:
        return Prediction(reason=str(error))


def _run_key(record: Record) -> tuple[str, str]:
    return record.key, record.device.name


def _resimulated(records: Sequence[Record]) -> dict[tuple[str, str], Prediction]:
    """This version's simulation of every recorded setup, each for the device it ran on."""
    from planner.measure.ahead import simulations
    from planner.record import Prediction
    from planner.spec import Setup

    wanted = {_run_key(record): record for record in records}
    jobs = [(Setup.from_dict(record.setup), record.device.to_dict()) for record in wanted.values()]
    with simulations(jobs, time_limit_s=_SIMULATION_LIMIT_S) as predict:
        found = [predict(number, _SIMULATION_LIMIT_S * len(jobs)) for number in range(len(jobs))]
    return {
        key: prediction or Prediction(reason="it took too long.")
        for key, prediction in zip(wanted, found, strict=True)
    }


def _aligned(path: Path) -> Reply:
    import os

    from planner.measure.align import alignment
    from planner.measure.trace import trace_from
    from planner.simulate.events import simulated_events
    from planner.spec import Setup

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read once, when transformers is imported
    trace = trace_from(path)
    found = alignment(trace.events, simulated_events(Setup.from_dict(trace.setup), gpu=trace.device.gpu))
    before = found.first.before if found.first else ()
    lines = [found.sentence, *(f"before it, block {line}" for line in before)]
    return _sentence(found.to_dict(), "\n".join(lines))
