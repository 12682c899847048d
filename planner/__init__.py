"""VRAM Planner: how much GPU memory a fine-tuning run takes, before it is started.

`estimate(setup)` answers by formulas, `simulate(setup)` by running the training step on tensors without
storage, `measure(setup)` by running it on a CUDA device; `method_table(setup)` sets every method beside the
others. Importing this package imports nothing heavy: torch is imported when a simulation or a measurement
starts.
"""

from planner.advise import method_table
from planner.catalog.gpus import Gpu
from planner.estimate import estimate
from planner.measure import measure
from planner.model import Model
from planner.report import MemoryReport
from planner.simulate import simulate, simulate_step
from planner.spec import Adapter, BitFit, FullFineTuning, LoRA, PeftOfSize, QLoRA, Setup, Sharding, Training
from planner.version import __version__

__all__ = [
    "Adapter",
    "BitFit",
    "FullFineTuning",
    "Gpu",
    "LoRA",
    "MemoryReport",
    "Model",
    "PeftOfSize",
    "QLoRA",
    "Setup",
    "Sharding",
    "Training",
    "__version__",
    "estimate",
    "measure",
    "method_table",
    "simulate",
    "simulate_step",
]
