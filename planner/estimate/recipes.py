"""What a precision recipe keeps in memory: bytes of each number, by what the number is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from planner.methods import Quantization
from planner.model import WeightTensor
from planner.spec import Precision, QLoRA, Setup

__all__ = ["RECIPES", "Recipe", "recipe_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Bytes of one element.

    `base` is a weight of the model, `wide` one that its class keeps in fp32 where it is loaded in fp16,
    `adapter` a weight that a PEFT method adds, `compute` the type that matrix products run in. A gradient has
    its weight's type. `state` is one AdamW state; None: the weight's own type, as torch.optim.AdamW makes it
    (torch/optim/adam.py, `_init_group`: zeros_like). `quantization`: how linear layers are held, and `base`
    is what the rest is.
    """

    base: int
    adapter: int
    compute: int
    state: int | None = None
    autocast: bool = False
    quantization: Quantization | None = None
    wide: int | None = None  # None: as the others

    def weight_bytes(self, tensor: WeightTensor) -> int:
        """Bytes of one element of a weight of the model."""
        return self.wide if self.wide is not None and tensor.wide else self.base


# peft keeps adapters in fp32 over a 16-bit base: peft/tuners/tuners_utils.py, cast_adapter_dtype.
# textbook: 16-bit weights and gradients, fp32 states, Adam as in the ZeRO paper (Rajbhandari et al.
# 2020, section 3.1) without its fp32 copy of the weights.
RECIPES: dict[Precision, Recipe] = {
    "fp32": Recipe(base=4, adapter=4, compute=4),
    "bf16": Recipe(base=2, adapter=4, compute=2),
    "fp16": Recipe(base=2, adapter=4, compute=2, wide=4),
    "bf16-mixed": Recipe(base=4, adapter=4, compute=2, autocast=True),
    "fp16-mixed": Recipe(base=4, adapter=4, compute=2, autocast=True),
    "textbook": Recipe(base=2, adapter=2, compute=2, state=4),
}

# peft, prepare_model_for_kbit_training: all that is not quantized is fp32.
_QUANTIZED = {
    (precision, quantization): replace(recipe, base=4, adapter=4, quantization=quantization)
    for precision, recipe in RECIPES.items()
    for quantization in get_args(Quantization)
}

# FSDP2 gathers weights in MixedPrecisionPolicy.param_dtype and casts the units' inputs to it; DeepSpeed makes
# the module 16-bit (runtime/engine.py, _configure_distributed_model). Neither computes under autocast.
_GATHERED: dict[Precision, Recipe] = {
    "bf16-mixed": Recipe(base=2, adapter=2, compute=2),
    "fp16-mixed": Recipe(base=2, adapter=2, compute=2),
}


def recipe_of(setup: Setup) -> Recipe:
    """What the step computes with: the precision's recipe, over quantized layers where the method quantizes.

    Where FSDP or DeepSpeed gathers fp32 shards as 16-bit weights, what is gathered.
    """
    precision, method = setup.training.precision, setup.method
    if setup.sharding.shard_ranks > 1 and precision in _GATHERED:
        return _GATHERED[precision]
    return _QUANTIZED[precision, method.quantization] if isinstance(method, QLoRA) else RECIPES[precision]
