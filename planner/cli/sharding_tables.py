"""How a run can be shared among several GPUs, as plain columns."""

from __future__ import annotations

from planner.advise.shardings import Option, Shardings
from planner.cli.plain import columns
from planner.units import GIB, gib

__all__ = ["shardings_text"]


def shardings_text(found: Shardings, num_gpus: int) -> str:
    """Each way to share among `num_gpus`, the peak by number of GPUs, and how many of each GPU it takes."""
    here = [option for option in found.options if option.num_gpus == num_gpus]
    parts = [
        columns((f"Shared by {num_gpus:,}", "Peak a GPU", "On the host", "Sent a step", "Fits"), _rows(here)),
        _cheapest(found.cheapest, num_gpus),
        "Peak of one GPU in GiB, by their number; * fits.\n" + _by_number(found),
    ]
    if found.needs:
        rows = [
            (
                need.gpu.driver_name,
                f"{need.option.num_gpus:,}",
                need.option.sharding,
                gib(need.option.peak_allocated_bytes),
            )
            for need in found.needs
        ]
        parts.append(columns(("GPU", "How many", "Sharding", "Peak a GPU"), rows))
    return "\n\n".join(parts)


def _rows(options: list[Option]) -> list[tuple[str, ...]]:
    return [
        (
            option.sharding,
            gib(option.peak_allocated_bytes),
            gib(option.host_bytes) if option.host_bytes else "",
            gib(option.sent_bytes),
            option.verdict.word if option.verdict else "",
        )
        for option in options
    ]


def _cheapest(option: Option | None, num_gpus: int) -> str:
    if option is None:
        return f"No sharding fits on {num_gpus:,} of these GPUs."
    return (
        f"The cheapest that fits is {option.sharding}: each GPU sends {gib(option.sent_bytes)} a step, by "
        "the sums of the ZeRO paper."
    )


def _by_number(found: Shardings) -> str:
    kinds = list(dict.fromkeys(one.sharding for one in found.options if one.sharding != "none"))
    numbers = list(dict.fromkeys(one.num_gpus for one in found.options))
    peaks = {(option.num_gpus, option.sharding): option for option in found.options}
    rows = []
    for number in numbers:
        cells = [peaks.get((number, kind if number > 1 else "none")) for kind in kinds]
        rows.append((f"{number:,}", *(_cell(option) for option in cells)))
    return columns(("GPUs", *kinds), rows)


def _cell(option: Option | None) -> str:
    """The peak in GiB, marked where it surely fits."""
    if option is None:
        return ""
    return f"{option.peak_allocated_bytes / GIB:,.1f}" + (" *" if option.fits else "  ")
