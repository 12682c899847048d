"""CUDA's autocast for `meta` tensors: its lists of operations and its cache of cast weights.

Source: aten/src/ATen/autocast_mode.h (the lists) and autocast_mode.cpp (cached_cast). A dispatch key
does this for CUDA tensors; `meta` tensors have none, so the functions are replaced while it is on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F

__all__ = ["CAST", "CudaAutocast", "cuda_autocast_functions"]

# AT_FORALL_LOWER_PRECISION_FP: inputs are cast to the compute dtype.
_LOWER = (
    (F, "linear"),
    (F, "conv1d"),
    (F, "conv2d"),
    (F, "scaled_dot_product_attention"),
    (torch, "matmul"),
    (torch, "mm"),
    (torch, "bmm"),
    (torch, "addmm"),
    (torch, "baddbmm"),
    (torch, "einsum"),
    (torch.Tensor, "matmul"),
    (torch.Tensor, "__matmul__"),
    (torch.Tensor, "bmm"),
    (torch.Tensor, "mm"),
    (torch.Tensor, "baddbmm"),
)
# AT_FORALL_FP32: inputs are cast to fp32. AT_FORALL_FP32_SET_OPT_DTYPE sets the result's type instead:
# softmax, log_softmax, sum, prod and cumulative sums of 16-bit inputs give fp32.
_FP32 = (
    (F, "layer_norm"),
    (F, "group_norm"),
    (F, "cross_entropy"),
    (F, "nll_loss"),
    (F, "mse_loss"),
    (F, "softplus"),
    (torch, "rsqrt"),
    (torch.Tensor, "rsqrt"),
    (torch, "exp"),
    (torch.Tensor, "exp"),
    (torch, "log"),
    (torch.Tensor, "log"),
    (torch, "pow"),
    (torch.Tensor, "pow"),
    (torch.Tensor, "__pow__"),
    (torch, "reciprocal"),
)
_SET_DTYPE = (
    (F, "softmax"),
    (torch, "softmax"),
    (torch.Tensor, "softmax"),
    (F, "log_softmax"),
    (torch, "log_softmax"),
    (torch.Tensor, "log_softmax"),
    (torch, "sum"),
    (torch.Tensor, "sum"),
    (torch, "cumsum"),
    (torch.Tensor, "cumsum"),
)
CAST = (*_LOWER, *_FP32, *_SET_DTYPE)
_DEVICES = ("cuda", "meta")
_HALF = (torch.float16, torch.bfloat16)


class _Rules:
    """One autocast region: the compute dtype (None where it is switched off) and the cast weights."""

    def __init__(self, dtype: torch.dtype | None, *, cached: bool) -> None:
        self.dtype = dtype
        self.cached = cached
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


class CudaAutocast:
    """`torch.autocast` for the simulated device; regions nest, and `enabled=False` switches casting off.

    fp32 leaves that require gradients are cast once and kept until the outermost region ends
    (cached_cast); frozen weights are cast anew at every use.
    """

    regions: ClassVar[list[_Rules]] = []

    def __init__(
        self,
        device_type: str = "cuda",
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        """The arguments of torch.autocast; float16 is CUDA's default compute type."""
        self._dtype = (dtype or torch.float16) if enabled else None
        self._cached = cache_enabled is not False

    def __enter__(self) -> CudaAutocast:
        """Begin a region."""
        rules = _Rules(self._dtype, cached=self._cached)
        if self.regions:
            rules.cache = self.regions[-1].cache
        self.regions.append(rules)
        return self

    def __exit__(self, *error: object) -> None:
        """End the region; the cast weights die with the outermost one."""
        self.regions.pop()

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As a decorator."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return inside


@contextmanager
def cuda_autocast_functions() -> Iterator[None]:
    """Make `torch.autocast("cuda")` work on `meta` tensors for the time of the context."""
    with ExitStack() as stack:
        for places, form in ((_LOWER, _lower), (_FP32, _fp32), (_SET_DTYPE, _set_dtype)):
            for owner, name in places:
                stack.enter_context(mock.patch.object(owner, name, form(getattr(owner, name))))
        autocast = _autocast(torch.autocast)
        enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
        available = torch.amp.is_autocast_available
        questions: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
            (torch, "autocast", autocast),
            (torch.amp, "autocast", autocast),
            (torch.amp, "is_autocast_available", lambda kind: kind == "meta" or available(kind)),
            (torch, "is_autocast_enabled", lambda *a: enabled(*a) if _elsewhere(a) else _dtype() is not None),
            (
                torch,
                "get_autocast_dtype",
                lambda *a: dtype(*a) if _elsewhere(a) else _dtype() or dtype("cuda"),
            ),
        )
        for owner, name, replacement in questions:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _elsewhere(args: tuple[Any, ...]) -> bool:
    return bool(args) and args[0] not in _DEVICES


def _autocast(original: Any) -> Callable[..., Any]:
    def autocast(device_type: str = "cuda", *args: Any, **kwargs: Any) -> Any:
        chosen = CudaAutocast if device_type in _DEVICES else original
        return chosen(device_type, *args, **kwargs)

    return autocast


def _dtype() -> torch.dtype | None:
    return CudaAutocast.regions[-1].dtype if CudaAutocast.regions else None


def _mapped(original: Callable[..., Any], cast: Callable[[Any], Any]) -> Callable[..., Any]:
    def casting(*args: Any, **kwargs: Any) -> Any:
        if _dtype() is None:
            return original(*args, **kwargs)
        return original(*(cast(a) for a in args), **{key: cast(value) for key, value in kwargs.items()})

    return casting


def _lower(original: Callable[..., Any]) -> Callable[..., Any]:
    return _mapped(original, _compute)


def _fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    return _mapped(original, _wide)


def _set_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    def widened(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("input")
        typed = kwargs.get("dtype") is not None or any(isinstance(a, torch.dtype) for a in args)
        if _dtype() is not None and not typed and _is_half(first):
            kwargs["dtype"] = torch.float32
        return original(*args, **kwargs)

    return widened


def _compute(value: Any) -> Any:
    """cached_cast: floating tensors on the device become the compute dtype."""
    rules = CudaAutocast.regions[-1]
    if not isinstance(value, torch.Tensor) or value.device.type != "meta" or rules.dtype is None:
        return value
    if not value.is_floating_point() or value.dtype in (rules.dtype, torch.float64):
        return value
    cacheable = value.dtype == torch.float32 and value.requires_grad and value.is_leaf
    if not (cacheable and rules.cached) or value._is_view():
        return value.to(rules.dtype)
    if id(value) not in rules.cache:
        rules.cache[id(value)] = (value, value.to(rules.dtype))
    return rules.cache[id(value)][1]


def _wide(value: Any) -> Any:
    return value.float() if _is_half(value) else value


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in _HALF and value.device.type == "meta"
