"""The trained tensors on disk: one safetensors file, nothing of the base model, no pickle."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import nn

from planner.errors import SetupError
from planner.training.peft.attach import trainable_parameters
from planner.training.peft.lora import LoRALayer

__all__ = ["load", "save"]


def save(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write what is trained to a safetensors file under the parameters' names; its path.

    A file of that name is replaced whole or not at all. Its size is
    `planner.estimate.storage.safetensors_bytes` of the shapes. Raises SetupError where nothing is
    trained, the model has no data (`meta`) or the file cannot be written.
    """
    target = Path(path)
    tensors = {name: trained.detach().contiguous() for name, trained in trainable_parameters(model).items()}
    if not tensors:
        raise SetupError(f"this {type(model).__name__} trains nothing to save; attach a method first.")
    if any(tensor.is_meta for tensor in tensors.values()):
        raise SetupError("a model on the meta device has no data to save; build it on a CPU or CUDA device.")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:  # not save_file: it leaves a file that only its owner can read
            file.write(serialized(tensors))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise SetupError(
            f"cannot write {target}: {_one_line(error)}; choose a file in a folder that exists."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def load(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Read what `save` wrote into the same method on the same model, in place.

    Names, shapes and dtypes are all compared first: a file that does not fit raises SetupError and
    changes nothing. A merged model is refused, since its weights hold the old values.
    """
    wanted = trainable_parameters(model)
    if any(isinstance(module, LoRALayer) and module.merged for module in model.modules()):
        raise SetupError("the model is merged and would keep the old values; call unmerge before load.")
    if any(parameter.is_meta for parameter in wanted.values()):
        raise SetupError(
            "a model on the meta device has no data to replace; build it on a CPU or CUDA device."
        )
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise SetupError(
            f"cannot read {path} as safetensors: {_one_line(error)}; give a file that save wrote."
        ) from error
    _check(path, wanted, found)
    with torch.no_grad():
        for name, tensor in found.items():
            wanted[name].copy_(tensor)


def _check(
    path: str | os.PathLike[str], wanted: dict[str, nn.Parameter], found: dict[str, torch.Tensor]
) -> None:
    """Compare names, shapes and dtypes. Raises SetupError with the first difference."""
    missing, foreign = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if missing:
        raise SetupError(f"{path} lacks {_some(missing)}; load it into its own model and method.")
    if foreign:
        raise SetupError(f"{path} has {_some(foreign)} besides; load it into its own model and method.")
    for name, parameter in wanted.items():
        given = found[name]
        if given.shape != parameter.shape or given.dtype != parameter.dtype:
            raise SetupError(
                f"{path}: {name} is {list(given.shape)} {given.dtype}, the model has {list(parameter.shape)} "
                f"{parameter.dtype}; attach the method with the settings it was saved with."
            )


def _some(names: Collection[str]) -> str:
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
