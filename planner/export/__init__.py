"""What was planned as files that run: a training script, its settings, the model's config, requirements.

Text only: the command line writes it into a folder, the page packs it.
"""

from __future__ import annotations

import json
from typing import Any

from planner.errors import SetupError
from planner.export.launch import launch_files, launch_lines
from planner.export.methods import PIECES, piece_name
from planner.export.script import script
from planner.export.settings import settings
from planner.optimizers import FROM_BITSANDBYTES
from planner.spec import PeftOfSize, QLoRA, Setup
from planner.units import count, gib

__all__ = ["BITSANDBYTES", "DEEPSPEED", "LIGER", "REQUIREMENTS", "exported", "why_not"]

REQUIREMENTS = (
    "accelerate>=1.15,<2",
    "peft>=0.20,<0.22",
    "safetensors>=0.7,<1",
    "torch>=2.11,<2.14",
    "transformers>=5.17,<5.24",
)
"""The versions that train.py is tested with: those of `simulate` in pyproject.toml."""
BITSANDBYTES = "bitsandbytes>=0.50,<0.51"
"""What bitsandbytes' optimizers need beside them: that of `qlora` in pyproject.toml."""
LIGER = "liger-kernel>=0.8.5,<0.9"
"""What loss or kernels liger needs beside them: that of `liger` in pyproject.toml."""
DEEPSPEED = "deepspeed>=0.19,<0.20"
"""What zero1 to zero3 need beside them: the version whose sources the formulas are from; no test runs it."""


def exported(setup: Setup) -> dict[str, str]:
    """File name -> text: train.py, settings.json, model/config.json, requirements.txt, README.txt.

    For several GPUs also accelerate.yaml and the commands that launch it, see `planner.export.launch`.
    The same setup always gives the same texts. train.py holds nothing of the setup but its method and task;
    all values stand in settings.json. Raises SetupError for what no library runs as one step: a bare number
    of parameters, and the textbook recipe.
    """
    reason = why_not(setup)
    if reason:
        raise SetupError(reason)
    values = settings(setup)
    needed = setup.training.optimizer in FROM_BITSANDBYTES
    own: tuple[str, ...] = (BITSANDBYTES,) if needed or _quantizes(setup) else ()
    own += (LIGER,) if "liger" in (setup.training.loss, setup.training.kernels) else ()
    own += (DEEPSPEED,) if setup.sharding.zero_stage else ()
    return {
        **(launch_files(setup) if setup.sharding.is_distributed else {}),
        "README.txt": _readme(setup, values),
        "model/config.json": _json({k: v for k, v in setup.model.config.items() if k != "auto_map"}),
        "requirements.txt": "\n".join((*REQUIREMENTS, *own)) + "\n",
        "settings.json": _json(values),
        "train.py": script(setup),
    }


def why_not(setup: Setup) -> str | None:
    """Why a setup has no files that run, in a line; None where it has."""
    if setup.model.is_bare or isinstance(setup.method, PeftOfSize):
        return (
            f"{setup.model.id} with method {setup.method.name} has no layers to run; export needs a model's "
            "id or config.json, and a method such as lora or full."
        )
    if setup.training.precision == "textbook":
        return "precision textbook is a sum worked by hand, no library runs it; export bf16 or bf16-mixed."
    if setup.training.loop != "plain" and setup.sharding.is_distributed:
        return f"export writes the loop {setup.training.loop} for one GPU; choose num_gpus 1, or loop plain."
    if _quantizes(setup) and setup.sharding.is_distributed:
        return "export writes qlora for one GPU; choose num_gpus 1, or method lora."
    if piece_name(setup.method) not in PIECES:
        return f"export has no script for method {setup.method.name}; choose from {', '.join(PIECES)}."
    return None


def _quantizes(setup: Setup) -> bool:
    return isinstance(setup.method, QLoRA)


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


_README = """\
{heading}
{rule}

Planned with VRAM Planner. {peak}{trained}

    python3 -m venv .venv
    .venv/bin/pip install -r requirements.txt

See what it takes, with random weights from model/config.json; nothing is downloaded:

    .venv/bin/python train.py --model model --steps 3

Train on your own text, with the weights of {weights}:

    .venv/bin/python train.py --data text.txt --steps 100 --out trained

{launch}train.py            the loop, to be read and changed
settings.json       every setting of the plan; train.py reads it
model/config.json   the shape of the model that was planned
requirements.txt    the versions this was tested with
{files}
It prints how many parameters are trained and, on a CUDA device, the peak of allocated memory beside the
planned one. The learning rate is a common value and no advice. {samples}; {data}
Code from the hub is never run. The card must also hold the CUDA context and the allocator's reserve.
"""

_LAUNCH_FILES = """\
accelerate.yaml     how accelerate shares the run; launch.sh uses it
*.sh, slurm.sbatch  the same by accelerate, by torchrun (not for DeepSpeed), in a SLURM cluster
"""

_SAMPLES = {
    "full": "Samples are cut from the text one after the\nother, without padding",
    "padded": "A line of the text is a\nsample, cut to the planned length or padded to it",
    "packed": "A line of the text is a\nsample, cut to the planned length; as many as planned stand in a row",
}
_DATA = {
    "causal-lm": "the labels are the tokens themselves.",
    "masked-lm": "15 % of the tokens are masked and asked for.",
    "seq2seq-lm": "the labels are a copy of the input: put your own pairs into `batches`.",
}


def _readme(setup: Setup, values: dict[str, Any]) -> str:
    planned, training = values["planned"], setup.training
    peak_bytes, trained = planned["peak_allocated_bytes"], planned["trainable_parameters"]
    shape = f"{training.micro_batch_size} x {training.seq_len} tokens"
    heading = f"{setup.model.id}, {setup.method.name}, {shape}, {training.precision}"
    peak = "The peak is not known by formula."
    if peak_bytes is not None:
        peak = f"Predicted peak: {gib(peak_bytes)} allocated."
    return _README.format(
        heading=heading,
        rule="=" * len(heading),
        peak=peak,
        trained="" if trained is None else f" Trained: {count(trained)} parameters.",
        weights="your own model (--model FOLDER)" if values["model"] == "model" else values["model"],
        samples=_SAMPLES[training.batching],
        data=_DATA[setup.model.task],
        launch=f"{launch_lines(setup)}\n" if setup.sharding.is_distributed else "",
        files=_LAUNCH_FILES if setup.sharding.is_distributed else "",
    )
