"""What a precision recipe keeps in memory: bytes of each number, by what the number is for."""

from __future__ import annotations

from dataclasses import dataclass

from planner.spec import Precision

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Bytes of one element.

    `base` is a weight of the model, `adapter` a weight that a PEFT method adds, `compute` the type that
    matrix products run in. A gradient has its weight's type. `state` is one AdamW state; None: the
    weight's own type, as torch.optim.AdamW makes it (torch/optim/adam.py, `_init_group`: zeros_like).
    """

    base: int
    adapter: int
    compute: int
    state: int | None = None
    autocast: bool = False


# peft keeps adapters in fp32 over a 16-bit base: peft/tuners/tuners_utils.py, cast_adapter_dtype.
# textbook: 16-bit weights and gradients, fp32 states, Adam as in the ZeRO paper (Rajbhandari et al.
# 2020, section 3.1) without its fp32 copy of the weights.
RECIPES: dict[Precision, Recipe] = {
    "fp32": Recipe(base=4, adapter=4, compute=4),
    "bf16": Recipe(base=2, adapter=4, compute=2),
    "fp16": Recipe(base=2, adapter=4, compute=2),
    "bf16-mixed": Recipe(base=4, adapter=4, compute=2, autocast=True),
    "fp16-mixed": Recipe(base=4, adapter=4, compute=2, autocast=True),
    "textbook": Recipe(base=2, adapter=2, compute=2, state=4),
}