"""Steps on a Tesla T4 that others measured and published (tests/data/published_t4_runs.json cites them)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.spec import LoRA, QLoRA, Setup, Training

__all__ = ["lora_runs", "qlora_runs", "setup_of", "title"]

_FIGURES = json.loads((Path(__file__).parent / "data" / "published_t4_runs.json").read_text())


def lora_runs() -> list[dict[str, Any]]:
    """The runs over unquantized fp16 weights."""
    return list(_FIGURES["runs"])


def qlora_runs() -> list[dict[str, Any]]:
    """The runs over nf4 weights."""
    return list(_FIGURES["nf4_runs"])


def setup_of(run: dict[str, Any]) -> Setup:
    """The setup of a run: fp16 weights, adapters in fp32, checkpointing, AdamW."""
    lora = run["lora"]
    method = LoRA if run in _FIGURES["runs"] else QLoRA
    return Setup(
        model=run["model"],
        method=method(
            lora_rank=lora["rank"], lora_alpha=lora["alpha"], target_modules=tuple(lora["target_modules"])
        ),
        training=Training(
            micro_batch_size=run["micro_batch_size"],
            seq_len=run["seq_len"],
            precision="fp16",
            attention=run["attention"],
            activation_checkpointing=True,
        ),
        gpu="t4",
    )


def title(run: dict[str, Any]) -> str:
    """Model, shape, attention and the end of the run's id."""
    name = run["model"].rpartition("/")[2]
    return f"{name} {run['micro_batch_size']} x {run['seq_len']} {run['attention']} {run['id'][-5:]}"
