"""The grid micro batch x sequence length: fits, tight or does not fit, by colour and by sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from planner.advise import Cell
from planner.dashboard.palette import LINE, TEXT_ON_WORD, WORD_COLOURS
from planner.dashboard.words import SIGNS
from planner.units import GIB, gib

__all__ = ["axis", "clicked", "grid_alt", "grid_figure"]

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
_SEQ_LENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SQUARE_PIXELS = 34


def axis(name: str, current: int, limit: int | None = None) -> tuple[int, ...]:
    """The eight usual values of `micro_batch_size` or `seq_len` up to `limit`, the current one among them."""
    usual = _BATCHES if name == "micro_batch_size" else _SEQ_LENS
    allowed = [value for value in usual if limit is None or value <= limit]
    if current in allowed:
        return tuple(allowed)
    if not allowed:
        return (current,)
    nearest = min(allowed, key=lambda value: abs(value - current))
    return tuple(sorted({*allowed, current} - {nearest if len(allowed) == len(usual) else current + 1}))


def grid_figure(cells: Sequence[Sequence[Cell]], current: tuple[int, int]) -> go.Figure:
    """Square markers, a trace for each word; the current setup has a frame. Sizes are GiB on the card."""
    known = [cell for row in cells for cell in row if cell.verdict is not None]
    figure = go.Figure(layout=_layout(cells))
    figure.add_scatter(
        x=[f"{current[1]:,}"],
        y=[f"{current[0]:,}"],
        mode="markers",
        name="the current setup",
        marker={
            "symbol": "square",
            "size": _SQUARE_PIXELS + 8,
            "color": "rgba(0,0,0,0)",
            "line": {"width": 3, "color": LINE},
        },
        hoverinfo="skip",
        **_NOT_DIMMED,
    )
    for word, colour in WORD_COLOURS.items():
        chosen = [cell for cell in known if cell.verdict is not None and cell.verdict.word == word]
        if not chosen:
            continue
        figure.add_scatter(
            x=[f"{cell.seq_len:,}" for cell in chosen],
            y=[f"{cell.micro_batch_size:,}" for cell in chosen],
            mode="markers+text",
            name=f"{SIGNS[word]} {word}",
            marker={"symbol": "square", "size": _SQUARE_PIXELS, "color": colour, "line": {"width": 0}},
            text=[_inside(cell) for cell in chosen],
            textfont={"size": 10, "color": TEXT_ON_WORD},
            customdata=[[c.micro_batch_size, c.seq_len, _needs(c)] for c in chosen],
            hovertemplate=(
                f"<b>{word[0].upper()}{word[1:]}</b><br>micro batch %{{customdata[0]}}, "
                "%{customdata[1]} tokens<br>%{customdata[2]} on the card<extra></extra>"
            ),
            **_NOT_DIMMED,
        )
    return figure


def _layout(cells: Sequence[Sequence[Cell]]) -> dict[str, Any]:
    """Given to the figure at once: `update_layout` takes several times as long."""
    batches = [f"{row[0].micro_batch_size:,}" for row in cells]
    seq_lens = [f"{cell.seq_len:,}" for cell in cells[0]]
    category = {
        "type": "category",
        "categoryorder": "array",
        "showgrid": False,
        "fixedrange": True,
        "ticks": "",
    }
    return {
        "height": 96 + 41 * len(batches),
        "margin": {"l": 0, "r": 0, "t": 4, "b": 0},
        "xaxis": {
            **category,
            "title": "Sequence length",
            "categoryarray": seq_lens,
            "range": [-0.6, len(seq_lens) - 0.4],
        },
        "yaxis": {
            **category,
            "title": "Micro batch size",
            "categoryarray": batches,
            "range": [-0.6, len(batches) - 0.4],
        },
        "legend": {"orientation": "h", "yanchor": "top", "y": -0.2, "x": 0},
        "dragmode": False,
        "clickmode": "event+select",
        "hoverlabel": {"align": "left"},
    }


def grid_alt(cells: Sequence[Sequence[Cell]]) -> str:
    """What the grid says: how many cells fit, and the longest sequence that fits with one micro batch."""
    known = [cell for row in cells for cell in row if cell.verdict is not None]
    fitting = [cell for cell in known if cell.verdict is not None and cell.verdict.fits]
    longest = max((cell.seq_len for cell in fitting), default=None)
    ending = f"The longest sequence that fits is {longest:,} tokens." if longest else "None of them fits."
    return (
        f"Grid of micro batch and sequence length: {len(fitting)} of {len(known)} combinations fit. {ending}"
    )


def clicked(points: Sequence[dict[str, object]]) -> dict[str, int] | None:
    """The inputs of the clicked square, None where the click hit none."""
    for point in points:
        data = point.get("customdata")
        if isinstance(data, list | tuple) and len(data) >= 2:
            return {"micro_batch_size": int(data[0]), "seq_len": int(data[1])}
    return None


_NOT_DIMMED = {"selected": {"marker": {"opacity": 1}}, "unselected": {"marker": {"opacity": 1}}}


def _needs(cell: Cell) -> str:
    return "" if cell.verdict is None else gib(cell.verdict.device_bytes)


def _inside(cell: Cell) -> str:
    if cell.verdict is None:
        return ""
    size = cell.verdict.device_bytes / GIB
    return (
        f"{SIGNS[cell.verdict.word]}<br>{size:.0f}"
        if size < 1000
        else f"{SIGNS[cell.verdict.word]}<br>{size / 1000:.1f}k"
    )
