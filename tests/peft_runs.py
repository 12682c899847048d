"""peft's own measured runs of its methods (tests/data/published_peft_runs.json cites them).

github.com/huggingface/peft, method_comparison/MetaMathQA: Llama-3.2-3B on an NVIDIA L40S, peak reserved
memory over 5000 steps. tests/simulate/peft_loop.py simulates them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.methods import PeftConfig
from planner.spec import FullFineTuning, Setup, Training

__all__ = ["BEFORE", "LONGEST", "SIMULATED", "error", "peft_runs", "setup_of"]

_DATA = Path(__file__).parent / "data"
SIMULATED = _DATA / "simulated_peft_runs.json"
_FIGURES = json.loads((_DATA / "published_peft_runs.json").read_text())
_CONFIG = _FIGURES["train_config"]

# Tokens of the longest batch, of which nothing is published but that samples are cut at 768. Inferred from
# plain LoRA's run alone: 0.01 % under at 695, -2.2 % at 680, -0.1 % at 689, +0.1 % at 698, +1.4 % at 705.
LONGEST = 695
# Tokens of the batch before it, the shortest of its bucket of 20: half of the mean, which is published.
BEFORE = _CONFIG["train total tokens"] // _CONFIG["train samples"] // 2


def peft_runs() -> list[dict[str, Any]]:
    """The published runs, each with `peak_reserved_bytes`: with what was reserved before the model came."""
    before = _FIGURES["reserved_before_bytes"]
    return [run | {"peak_reserved_bytes": run["max_reserved_bytes"] + before} for run in _FIGURES["runs"]]


def setup_of(run: dict[str, Any], seq_len: int = LONGEST) -> Setup:
    """The setup of a run: 16-bit weights, adapters in fp32, padded batches, AdamW, clipped gradients."""
    values = run["peft_config"]
    return Setup(
        model=_FIGURES["model"],
        method=FullFineTuning() if values is None else PeftConfig(peft_config_json=json.dumps(values)),
        training=Training(
            precision="bf16",
            micro_batch_size=_CONFIG["batch_size"],
            seq_len=seq_len,
            batching="padded",
            clip_grad_norm=_CONFIG["grad_norm_clip"],
        ),
        gpu="l40s",
    )


def error(run: dict[str, Any], peak_reserved_bytes: int) -> float:
    """Share of the published peak that the simulated one is too high."""
    return float(peak_reserved_bytes / run["peak_reserved_bytes"] - 1)
