"""GPUs as data (`gpus.json`), each with the report or the product page its memory size comes from."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from planner.errors import SetupError, nearest
from planner.units import parse_bytes

__all__ = ["Gpu", "MemoryKind", "gpu", "gpus", "multiprocessors", "multiprocessors_of"]

MemoryKind = Literal["torch", "driver", "nominal", "asked"]

_VENDOR_WORDS = re.compile(r"nvidia|geforce|tesla|generation|rtx|gtx")
_SIZE = re.compile(r"[-+0-9.,\s]+[kmgt]?i?b\s*", re.IGNORECASE)
_A100_MULTIPROCESSORS = 108  # as in gpus.json
_LONGEST_NAME = 100  # characters; the longest driver name has 49


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU: `total_bytes` of memory and its compute capability.

    `memory_kind` says who gave `total_bytes`: `torch` (CUDA's totalGlobalMem: what a training run can
    use), `driver` (nvidia-smi or OpenCL: up to 3 % more), `nominal` (the product's size read as GiB: up
    to 6 % more), `asked` (a size typed by the user, as in "24GiB"; its `capability` is None).
    `multiprocessors`: how many it has, None where no number is cited.
    `multiprocessors_source`: the address of that number and how it is said there.
    """

    name: str
    driver_name: str
    total_bytes: int
    memory_kind: MemoryKind
    capability: tuple[int, int] | None
    source: str
    multiprocessors: int | None = None
    multiprocessors_source: str = ""

    @property
    def nominal(self) -> bool:
        """Whether the size is the product's, because no report of a driver could be cited."""
        return self.memory_kind == "nominal"


def multiprocessors_of(driver_name: str) -> int | None:
    """Of the GPU that a driver reports by this name, None where the catalogue does not know."""
    found = {item.multiprocessors for item in gpus() if item.driver_name == driver_name}
    return found.pop() if len(found) == 1 else None


@cache
def gpus() -> tuple[Gpu, ...]:
    """Every GPU of the catalogue, in its order: consumer, laptop, data centre, workstation."""
    text = resources.files("planner.catalog").joinpath("gpus.json").read_text(encoding="utf-8")
    return tuple(
        Gpu(**{**entry, "capability": (entry["capability"][0], entry["capability"][1])})
        for entry in json.loads(text)["gpus"]
    )


def gpu(text: str) -> Gpu:
    """The GPU of a short name ("t4"), the driver's name ("Tesla T4"), or a size ("24GiB").

    Case, spaces, hyphens and the words NVIDIA, GeForce, RTX, Tesla do not matter: "4090" is "rtx-4090".
    Raises SetupError, with the nearest names, where nothing is meant, or cards of different sizes.
    """
    if len(text) > _LONGEST_NAME:
        raise SetupError(f"a GPU's name has at most {_LONGEST_NAME} characters, got {len(text)}.")
    by_name, by_driver_name = _index()
    wanted = _folded(text)
    if wanted in by_name:
        return by_name[wanted]
    found = by_driver_name.get(wanted, ())
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(item.name for item in found)
        raise SetupError(f"{text!r} is sold with more than one memory size; write {names}.")
    return _typed_size(text)


def multiprocessors(gpu: Gpu | None) -> int:
    """Of the GPU; of one that is not named or has no cited number, those of an A100 (capability 8.0)."""
    known = gpu.multiprocessors if gpu else None
    return known or _A100_MULTIPROCESSORS


def _typed_size(text: str) -> Gpu:
    """A GPU of which only the memory is known. Raises SetupError."""
    if _SIZE.fullmatch(text):
        total_bytes = parse_bytes(text)
        name = "".join(text.split())
        return Gpu(
            name=name,
            driver_name=name,
            total_bytes=total_bytes,
            memory_kind="asked",
            capability=None,
            source="size given by the user",
        )
    raise SetupError(f"unknown GPU {text!r}; {_near(text)} A size works too, such as 24GiB.")


def _near(text: str) -> str:
    names = [item.name for item in gpus()]
    wanted = _folded(text)
    longer = [name for name in names if wanted and _folded(name).startswith(wanted)]
    return f"did you mean {', '.join(longer[:4])}?" if longer else nearest(text, names)


def _folded(text: str) -> str:
    """A name without case, vendor's words, spaces and punctuation."""
    letters = "".join(character for character in text.casefold() if character.isalnum())
    return _VENDOR_WORDS.sub("", letters)


@cache
def _index() -> tuple[dict[str, Gpu], dict[str, tuple[Gpu, ...]]]:
    by_name: dict[str, Gpu] = {}
    by_driver_name: dict[str, tuple[Gpu, ...]] = {}
    for item in gpus():
        by_name[_folded(item.name)] = item
        key = _folded(item.driver_name)
        by_driver_name[key] = (*by_driver_name.get(key, ()), item)
    return by_name, by_driver_name
