"""The simulated device under the name that training scripts use: `cuda` is `meta` inside the mode."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

from planner.simulate.autocast import CAST
from planner.simulate.cuda_forms import STEERED

__all__ = ["AsCuda"]

_META = torch.device("meta")
# Functions that are replaced while a simulation runs, by what they were: a script may hold them by name.
_REPLACED = {getattr(owner, name): (owner, name) for owner, name in (*STEERED, *CAST)}


class AsCuda(TorchFunctionMode):
    """Tensors asked for on `cuda` are made on `meta`; so are those made without a device.

    The second does not hold between `to_host` and `from_host`: optimizers keep their step counters on the
    CPU, data loaders draw their order there. Enter with `active()`, which reaches backward passes too.
    """

    def __init__(self) -> None:
        """Nothing is redirected until `active()` is entered."""
        super().__init__()
        self._on_host = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of torch with its device exchanged."""
        kwargs = dict(kwargs or {})
        if func in _REPLACED:
            owner, name = _REPLACED[func]
            return getattr(owner, name)(*args, **kwargs)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cuda:
            return args[0].to(_META)
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = _simulated(kwargs["device"])
        elif not self._on_host and func in _device_constructors():
            kwargs["device"] = _META
        if func is torch.Tensor.to and len(args) > 1 and not isinstance(args[1], torch.Tensor | torch.dtype):
            args = (args[0], _simulated(args[1]), *args[2:])
        return func(*args, **kwargs)

    def to_host(self) -> None:
        """From here on tensors made without a device stay on the CPU."""
        self._on_host += 1

    def from_host(self) -> None:
        """End of `to_host`; the two nest."""
        self._on_host -= 1

    @contextmanager
    def active(self) -> Iterator[None]:
        """Redirect everything inside.

        Calling a function of torch switches the mode off for its duration, and a backward pass is such a
        function; checkpoints run whole modules in it, so the mode is entered again at the engine.
        """
        engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

        def with_mode(*args: Any, **kwargs: Any) -> Any:
            with self:
                return engine(*args, **kwargs)

        with ExitStack() as stack:
            if (bitsandbytes := sys.modules.get("bitsandbytes")) is not None:  # 8-bit optimizers' codes
                codes = bitsandbytes.functional
                form = self._hosted(codes.create_dynamic_map)
                stack.enter_context(mock.patch.object(codes, "create_dynamic_map", form))
            for owner, name, form in (
                (torch.autograd, "_engine_run_backward", with_mode),
                (DataLoader, "__iter__", self._hosted(DataLoader.__iter__)),
                (_BaseDataLoaderIter, "__next__", self._hosted(_BaseDataLoaderIter.__next__)),
                (torch.cuda, "synchronize", lambda *_args, **_kwargs: None),
            ):
                stack.enter_context(mock.patch.object(owner, name, form))
            stack.enter_context(self)
            yield

    def _hosted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def on_host(*args: Any, **kwargs: Any) -> Any:
            self.to_host()
            try:
                return original(*args, **kwargs)
            finally:
                self.from_host()

        return on_host


def _simulated(device: Any) -> Any:
    """`meta` for any way to name a CUDA device, others as they are."""
    if isinstance(device, bool):
        return device
    if isinstance(device, int):
        return _META
    if isinstance(device, str) and device.partition(":")[0] == "cuda":
        return _META
    if isinstance(device, torch.device) and device.type == "cuda":
        return _META
    return device
