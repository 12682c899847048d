"""Files as one zip, the same bytes for the same files, and the button that downloads what was planned."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from functools import partial

import streamlit as st

from planner.export import exported, why_not
from planner.spec import Setup

__all__ = ["download", "packed"]

_FOLDER = "vram-plan"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip can hold
_UNIX, _READABLE = 3, 0o100644


def download(setup: Setup) -> None:
    """A button for the training script with these settings; made when it is clicked."""
    reason = why_not(setup)
    st.download_button(
        "Training script",
        partial(_made, setup),
        file_name=f"{_FOLDER}.zip",
        mime="application/zip",
        icon=":material/code:",
        on_click="ignore",
        key="_export",
        disabled=reason is not None,
        help=reason or "transformers, peft and accelerate with exactly these settings, as files that run.",
    )


def packed(files: Mapping[str, str]) -> bytes:
    """A zip with the files in one folder, sorted, without a date."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{_FOLDER}/{name}", date_time=_EPOCH)
            entry.create_system, entry.external_attr = _UNIX, _READABLE << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name])
    return target.getvalue()


def _made(setup: Setup) -> bytes:
    return packed(exported(setup))
