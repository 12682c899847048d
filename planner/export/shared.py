"""What train.py does otherwise where several GPUs share the run: accelerate places, accumulates, gathers."""

from __future__ import annotations

from planner.export.methods import Piece
from planner.spec import Setup

__all__ = ["SHARED_STEP", "shared_lines", "shared_save"]

_ACCELERATOR = """\
accelerator = Accelerator(
        mixed_precision=AUTOCAST.get(settings["precision"], "no"),
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
    )
    if accelerator.state.deepspeed_plugin is not None:  # it asks for what a data loader would say
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = settings["micro_batch_size"]"""

_REDUCE = """
    if settings["reduce_dtype"] and getattr(accelerator.state, "fsdp_plugin", None) is not None:
        plugin = accelerator.state.fsdp_plugin
        policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
        reduce = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        plugin.mixed_precision_policy = dataclasses.replace(
            policy, reduce_dtype=reduce[settings["reduce_dtype"]]
        )"""

_PREPARED = """\
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # sharded now
    torch.manual_seed(settings["seed"] + accelerator.process_index)  # every rank draws its own samples
"""

_PREFETCH = """\
    units = [m for m in model.modules() if isinstance(m, FSDPModule) and m is not model]
    ahead = settings["prefetch"]
    for at, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(units[at + 1 : at + 1 + ahead])
        unit.set_modules_to_backward_prefetch(units[max(0, at - ahead) : at][::-1])
"""

SHARED_STEP = '''\
def one_step(accelerator, model, optimizer, trained, data, settings):
    """One optimizer step; gradients meet after the last micro batch. The mean of this rank's losses."""
    micro_batches = settings["gradient_accumulation_steps"]
    total = 0.0
    with attention(settings["attention"], accelerator.device.type):
        for _ in range(micro_batches):
            batch = {key: value.to(accelerator.device) for key, value in next(data).items()}
            with accelerator.accumulate(model):  # steps and clears gradients after the last one only
                outputs = model(**batch)
                accelerator.backward(outputs.loss)
                total += outputs.loss.item() / micro_batches
                if accelerator.sync_gradients and settings["clip_grad_norm"] is not None:
                    accelerator.clip_grad_norm_(trained, settings["clip_grad_norm"])
                optimizer.step()
                optimizer.zero_grad()
    return total
'''

_SAVE_WHOLE = '''

def save(accelerator, model, folder):
    """What was trained, brought together from every rank, in the library's own format."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights)
'''

_SAVE_TENSORS = '''

def save(accelerator, model, folder):
    """The trained tensors alone, brought together from every rank, by name."""
    names = {name for name, p in accelerator.unwrap_model(model).named_parameters() if p.requires_grad}
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        tensors = {name: weights[name].detach().cpu().contiguous() for name in names}
        save_file(tensors, folder / "trained.safetensors")
'''


def shared_lines(setup: Setup) -> dict[str, str]:
    """The lines of train.py's head that differ."""
    sharding = setup.sharding
    names = ["FSDPModule"] if sharding.prefetch else []
    names += ["MixedPrecisionPolicy"] if sharding.reduce_dtype else []
    return {
        "accelerator": _ACCELERATOR + (_REDUCE if sharding.reduce_dtype else ""),
        "to_device": "",
        "prepared": _PREPARED + (_PREFETCH if sharding.prefetch else ""),
        "say": "accelerator.print",
        "saved": "accelerator, model",
        "ended": "    accelerator.wait_for_everyone()\n",
        "dataclasses": "import dataclasses\n" if sharding.reduce_dtype else "",
        "fsdp": f"from torch.distributed.fsdp import {', '.join(names)}\n" if names else "",
    }


def shared_save(piece: Piece) -> str:
    """How what was trained is saved when every rank has a part of it."""
    return _SAVE_WHOLE if piece.whole else _SAVE_TENSORS
