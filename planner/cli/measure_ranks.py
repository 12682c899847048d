"""`planner measure` for several GPUs: all ranks at once by a launcher, or one of them alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli.flags import whole
from planner.cli.phases import phases_told
from planner.cli.plain import columns
from planner.cli.reply import Reply
from planner.errors import SetupError
from planner.spec import Setup
from planner.units import gib

if TYPE_CHECKING:
    from rich.console import Console

    from planner.measure.together import RankResult, Together

__all__ = ["add_rank_flags", "alone", "ranks_answer"]


def add_rank_flags(group: argparse._ArgumentGroup) -> None:
    """Flags for setups of several GPUs."""
    group.add_argument(
        "--launcher", metavar="torchrun|accelerate", help="what starts several ranks (default: torchrun)"
    )
    group.add_argument(
        "--rank", metavar="N", help="measure this one of several ranks alone, on one GPU and without NCCL"
    )


def alone(args: argparse.Namespace, setup: Setup) -> int | None:
    """The rank of `--rank`, None without it. Raises SetupError where it cannot be measured alone."""
    if not hasattr(args, "rank"):
        if hasattr(args, "launcher") and not setup.sharding.is_distributed:
            raise SetupError("--launcher starts several ranks, and this setup has one GPU; leave it out.")
        return None
    rank, number = whole(args.rank), setup.sharding.num_gpus
    if not setup.sharding.is_distributed:
        raise SetupError(f"rank {rank} is one of several, and this setup has one GPU; leave it out.")
    if not isinstance(rank, int) or not 0 <= rank < number:
        raise SetupError(f"rank must be a whole number from 0 to {number - 1} (num_gpus - 1), got {rank!r}.")
    for name in ("launcher", "rehearse"):
        if hasattr(args, name):
            raise SetupError(f"--rank measures one rank alone, --{name} runs all of them; leave one out.")
    if setup.training.precision == "fp16-mixed":
        raise SetupError(
            "precision fp16-mixed skips steps whose gradients are not finite, which a rank alone has; "
            "choose bf16-mixed, or measure all ranks."
        )
    return rank


def ranks_answer(args: argparse.Namespace, setup: Setup, *, time_limit_s: float) -> Reply:
    """All ranks measured and recorded, one record each, or rehearsed over gloo. Raises SetupError."""
    from planner.measure.together import measure_together, rehearse_together

    if hasattr(args, "trace"):
        raise SetupError("--trace follows one device; leave it out, or measure one rank with --rank.")
    run = rehearse_together if hasattr(args, "rehearse") else measure_together
    found = run(
        setup,
        launcher=getattr(args, "launcher", "torchrun"),
        time_limit_s=time_limit_s,
        on_event=phases_told(),
        python=getattr(args, "python", None),
    )
    if hasattr(args, "rehearse"):
        return _rehearsed(found)
    kept = None
    if not hasattr(args, "no_record"):
        from planner.measure.records import append

        for result in found.ranks:
            if result.record is not None:
                kept = append(result.record)
    return _measured(found, kept)


def _rehearsed(found: Together) -> Reply:
    def show(console: Console) -> None:
        console.print("Rehearsed on the CPU. Not a measurement: only CUDA devices give one.")
        rows = [(str(each.rank), f"{each.seconds:.2f} s") for each in found.ranks]
        console.print(columns(("Rank", "Time"), rows), soft_wrap=True)
        console.print(_slowest(found))

    first = found.ranks[0].rehearsal
    values = {
        "source": "rehearsal",
        "setup": found.setup.to_dict(),
        "parameters": first.parameters.to_dict() if first else {},
        "ranks": [each.to_dict() for each in found.ranks],
        "slowest_rank": found.slowest.rank,
    }
    return Reply(answer=values, show=show)


def _measured(found: Together, kept: Path | None) -> Reply:
    largest = found.largest
    record = largest.record
    assert record is not None
    report = record.report

    def show(console: Console) -> None:
        console.print(
            f"{report.setup['model']}, sharding {report.setup['sharding']} over "
            f"{found.setup.sharding.num_gpus} of {record.device.name}: rank {largest.rank} is the largest "
            f"with {gib(report.peak_allocated_bytes)} allocated and "
            f"{gib(report.peak_reserved_bytes or 0)} reserved.",
            soft_wrap=True,
        )
        rows = [_row(each) for each in found.ranks]
        console.print(columns(("Rank", "Allocated", "Reserved", "Peak in", "Time"), rows), soft_wrap=True)
        console.print(_slowest(found))
        for note in report.notes:
            console.print(note, soft_wrap=True)
        if kept is not None:
            console.print(f"Recorded in {kept}, one record a rank.")

    values = {
        **report.to_dict(),
        "ranks": [each.to_dict() for each in found.ranks],
        "largest_rank": largest.rank,
        "slowest_rank": found.slowest.rank,
        "estimate": record.estimate.to_dict(),
        "simulation": record.simulation.to_dict(),
        "record": None if kept is None else str(kept),
    }
    return Reply(answer=values, show=show)


def _row(each: RankResult) -> tuple[str, ...]:
    assert each.record is not None
    report = each.record.report
    full = " (out of memory)" if report.out_of_memory is not None else ""
    return (
        str(each.rank),
        gib(report.peak_allocated_bytes) + full,
        gib(report.peak_reserved_bytes or 0),
        report.peak_phase.replace("_", " "),
        f"{each.seconds:.2f} s",
    )


def _slowest(found: Together) -> str:
    return f"Rank {found.slowest.rank} was the slowest: {found.slowest.seconds:.2f} s."
