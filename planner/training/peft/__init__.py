"""LoRA, bottleneck adapters and BitFit as small torch modules: attach, train, merge, save.

model = attach(model, LoRASettings(lora_rank=8, lora_alpha=16, target_modules=("q_proj", "v_proj")))
...                                   # train trainable_parameters(model).values()
save(model, "adapter.safetensors")    # the trained tensors alone
merge_and_unload(model)               # a plain model again
"""

from planner.training.peft.adapter import BottleneckAdapter
from planner.training.peft.attach import (
    attach,
    disabled,
    merge,
    merge_and_unload,
    trainable_count,
    trainable_parameters,
    unmerge,
)
from planner.training.peft.lora import LoRALayer
from planner.training.peft.methods import (
    AdapterSettings,
    BitFitSettings,
    LoRASettings,
    MethodSettings,
    settings,
)
from planner.training.peft.saved import load, save

__all__ = [
    "AdapterSettings",
    "BitFitSettings",
    "BottleneckAdapter",
    "LoRALayer",
    "LoRASettings",
    "MethodSettings",
    "attach",
    "disabled",
    "load",
    "merge",
    "merge_and_unload",
    "save",
    "settings",
    "trainable_count",
    "trainable_parameters",
    "unmerge",
]
