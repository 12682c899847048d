"""The chart colours: the same in the theme and in the code, and apart for everybody on both backgrounds."""

from __future__ import annotations

import itertools
import math
import tomllib
from pathlib import Path

import pytest

from planner.dashboard.palette import CATEGORICAL, PART_COLOURS, TEXT_ON_WORD, WORD_COLOURS
from planner.report import PARTS

THEME = tomllib.loads((Path(__file__).resolve().parents[2] / ".streamlit" / "config.toml").read_text())[
    "theme"
]

# Severity 1.0 matrices in linear RGB: Machado, Oliveira, Fernandes 2009, table 1.
VISION = {
    "normal": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}


def linear(colour: str) -> tuple[float, ...]:
    """sRGB hex to linear RGB."""
    values = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return tuple(v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)


def oklab(rgb: tuple[float, ...]) -> tuple[float, float, float]:
    """Linear RGB to OKLab (Ottosson 2020), in which distances follow what is seen."""
    r, g, b = (min(max(value, 0.0), 1.0) for value in rgb)
    long = math.cbrt(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b)
    middle = math.cbrt(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b)
    short = math.cbrt(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def distance(first: str, second: str, vision: str) -> float:
    """100 times the OKLab distance as seen by this vision."""
    seen = []
    for colour in (first, second):
        rgb = linear(colour)
        rows = VISION[vision]
        seen.append(oklab(tuple(sum(m * c for m, c in zip(row, rgb, strict=True)) for row in rows)))
    return 100 * math.dist(seen[0], seen[1])


def contrast(first: str, second: str) -> float:
    """WCAG 2.2 contrast ratio."""
    red, green, blue = 0.2126, 0.7152, 0.0722
    light = sorted(
        sum(w * v for w, v in zip((red, green, blue), linear(c), strict=True)) for c in (first, second)
    )
    return (light[1] + 0.05) / (light[0] + 0.05)


def test_the_theme_has_exactly_these_ten_colours() -> None:
    assert tuple(THEME["chartCategoricalColors"]) == CATEGORICAL
    assert len(CATEGORICAL) == 10
    assert tuple(PART_COLOURS) == PARTS


@pytest.mark.parametrize("vision", VISION)
def test_all_ten_stay_apart_and_neighbours_in_a_bar_more_so(vision: str) -> None:
    for first, second in itertools.combinations(CATEGORICAL, 2):
        assert distance(first, second, vision) > 9, (first, second)
    parts = list(PART_COLOURS.values())
    for first, second in itertools.pairwise(parts):
        assert distance(first, second, vision) > 16, (first, second)


@pytest.mark.parametrize("vision", VISION)
def test_fits_tight_and_does_not_fit_stay_apart(vision: str) -> None:
    words = [WORD_COLOURS[word] for word in ("fits", "tight", "does not fit")]
    for first, second in itertools.combinations(words, 2):
        assert distance(first, second, vision) > 11, (first, second)


def test_the_text_in_the_squares_can_be_read() -> None:
    for colour in WORD_COLOURS.values():
        assert contrast(colour, TEXT_ON_WORD) > 4.5, colour  # WCAG 2.2, 1.4.3


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_colour_shows_on_the_background(mode: str) -> None:
    for colour in CATEGORICAL:
        assert contrast(colour, THEME[mode]["backgroundColor"]) > 1.5, colour
    assert contrast(THEME[mode]["textColor"], THEME[mode]["backgroundColor"]) > 7
    assert contrast(THEME[mode]["primaryColor"], THEME[mode]["backgroundColor"]) > 4.5
