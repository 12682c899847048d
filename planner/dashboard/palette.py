"""The colours of the charts, one set for the light and the dark theme.

Ten that stay apart for the colour-blind and show on both backgrounds; the theme in
`.streamlit/config.toml` holds the same ten, and a test the distances.
"""

from __future__ import annotations

from planner.report import PARTS

__all__ = ["ADDED", "CATEGORICAL", "LINE", "PART_COLOURS", "SAVED", "TEXT_ON_WORD", "TOTAL", "WORD_COLOURS"]

CATEGORICAL = (
    "#346696", "#7ddafb", "#2f8e82", "#9acc8d", "#9260d6",
    "#c399f8", "#c47816", "#f7cf3d", "#84a2b6", "#6c6151",
)  # fmt: skip
PART_COLOURS = dict(zip(PARTS, CATEGORICAL, strict=False))
LINE = "#7d8896"  # a middle grey: a black line would vanish on the dark background
SAVED, ADDED, TOTAL = "#2f8e82", "#c47816", "#84a2b6"
# Word of a verdict -> colour of its square; red for "does not fit" only. The text on them is dark.
WORD_COLOURS = {"fits": "#8ed6bb", "tight": "#f0b23c", "does not fit": "#d9786e", "not known": "#aab4c0"}
TEXT_ON_WORD = "#16202b"
