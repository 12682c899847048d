"""liger_kernel's own Python on `meta` for `cuda`, its kernels left out: what it takes, in its own order."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch

import planner.training.run as training_run
from planner.training import liger_experts, liger_kernels

__all__ = ["library_in_place", "library_module", "library_or_skip", "tiles_of", "untuned"]


def library_or_skip() -> None:
    """Skip where the library cannot be imported."""
    pytest.importorskip("liger_kernel", reason="liger_kernel is not installed: requirements-liger.txt")
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch's build for CUDA")


class _NoKernel:
    def __getitem__(self, _grid: Any) -> Any:
        return lambda *_args, **_kwargs: None


class _Torch:
    """torch on a card with so many multiprocessors."""

    def __init__(self, multiprocessors: int) -> None:
        found = types.SimpleNamespace(multi_processor_count=multiprocessors)
        self.cuda = types.SimpleNamespace(get_device_properties=lambda _device: found)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def library_module(name: str, multiprocessors: int, *, tiles: int = 0) -> Any:
    """A copy of liger_kernel.ops.<name> as a card would run it; `tiles` are those a kernel would count."""
    module = import_module(f"liger_kernel.ops.{name}")
    with open(str(module.__file__), encoding="utf-8") as file:
        source = file.read().replace('"cuda"', '"meta"')
    source = source.replace("int(expert_tile_offset[-1].item())", str(tiles))
    copy = types.ModuleType(f"{name}_on_meta")
    exec(compile(source, str(module.__file__), "exec"), copy.__dict__)
    for key in [key for key in vars(copy) if key.endswith("_kernel") or key.startswith("_triton_")]:
        setattr(copy, key, _NoKernel())
    copy.__dict__["torch"] = _Torch(multiprocessors)
    return copy


@contextmanager
def library_in_place(multiprocessors: int, *, tiles: int = 0) -> Iterator[None]:
    """Runs of a setup with kernels liger take the library's modules, as they do on CUDA."""
    from liger_kernel.transformers import geglu, rms_norm, rope, swiglu

    modules = {
        name: library_module(name, multiprocessors, tiles=tiles)
        for name in ("rms_norm", "swiglu", "geglu", "rope", "fused_moe")
    }

    def dispatch(_name: str, *args: Any) -> Any:
        return modules["rope"].LigerRopeFunction.apply(*args)

    def with_kernels(net: Any, model: Any, _device: Any) -> Any:
        return liger_kernels.with_kernels(net, model, torch.device("cuda"))

    places = [
        (rms_norm, "LigerRMSNormFunction", modules["rms_norm"].LigerRMSNormFunction),
        (swiglu, "LigerSiLUMulFunction", modules["swiglu"].LigerSiLUMulFunction),
        (swiglu, "LigerFusedMoEFunction", modules["fused_moe"].LigerFusedMoEFunction),
        (geglu, "LigerGELUMulFunction", modules["geglu"].LigerGELUMulFunction),
        (rope, "dispatch", dispatch),
        (training_run, "with_kernels", with_kernels),
    ]
    with ExitStack() as stack:
        for module, name, value in places:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def untuned(_known: Any = None) -> Any:
    """No trials, which the library's kernels left out do not make either."""
    return lambda _kernel, _device: None


def tiles_of(pairs: int, experts: int) -> int:
    """As planner.training.liger_experts counts them."""
    index = torch.empty(pairs, 1, dtype=torch.int32, device="meta")
    return len(liger_experts._order(index, experts)[1][4])
