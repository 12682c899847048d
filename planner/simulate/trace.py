"""A dispatch mode that sees every storage of the simulated device come and go."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from planner.errors import TraceError
from planner.simulate.accumulation import IN_PLACE, made_in_place, unshared_count
from planner.simulate.kernels import PRODUCTS, SCRATCH, Workspaces
from planner.simulate.ledger import Ledger
from planner.simulate.sparse_forms import SPARSE, parts_of

__all__ = ["Modules", "Tracer", "head_of"]

aten = torch.ops.aten

_TRUTH_OPS = frozenset({aten._local_scalar_dense.default})
_DATA_OPS = frozenset(
    {
        aten.nonzero.default,
        aten.masked_select.default,
        aten._unique2.default,
        aten.unique_dim.default,
        aten.unique_consecutive.default,
        aten.bincount.default,
        aten.equal.default,
    }
)
_IN_PLACE_ONLY = frozenset(  # no rule for `meta`; on CUDA they change their arguments and allocate nothing
    {aten._amp_foreach_non_finite_check_and_unscale_.default, aten._amp_update_scale_.default}
)
_MASKS = (torch.bool, torch.uint8)
_ANY_OPS = frozenset({aten.any.default, aten.any.dim, aten.any.dims})
_PARTS_OF_PHASES = {"load": "base_weights", "attach": "adapter_weights"}  # elsewhere: a batch's inputs
_LAST_SEQUENCE = 2**63  # AccumulateGrad carries the largest number


class Modules:
    """Which module runs: a stack in the forward pass, autograd's sequence numbers in the backward pass.

    Every node of the graph carries the number it got in the forward pass, so the backward of a module
    is found by the numbers between its entry and its exit.
    """

    def __init__(self) -> None:
        """No module is running."""
        self.stack: list[str] = []
        self.in_head = False
        self.made_again = False  # an autograd function's forward pass runs, within a recomputation
        self.head_sequence: int | None = None
        self.forward_end: int | None = None
        self._names: dict[int, str] = {}
        self._head: nn.Module | None = None
        self._starts: list[int] = []
        self._places: list[str] = []
        self._handles: list[Any] = []

    def watch(self, named: Iterable[tuple[str, nn.Module]], head: nn.Module | None) -> None:
        """Follow these modules; `head`, the output embeddings, marks where logits begin."""
        self._names = {id(module): name for name, module in named}
        self._head = head
        before = nn.modules.module.register_module_forward_pre_hook(self._enter)
        after = nn.modules.module.register_module_forward_hook(self._leave, always_call=True)
        self._handles = [before, after]

    def is_head_gradient(self, factors: Sequence[Any]) -> bool:
        """Whether a product of the backward pass has the shape of the trained output weight."""
        weight = getattr(self._head, "weight", None)
        if weight is None or not weight.requires_grad:
            return False
        return bool(weight.shape == (factors[0].shape[0], factors[1].shape[1]))

    def makes_gradient(self, tensor: torch.Tensor) -> bool:
        """Whether zeros like this tensor, made in the forward pass, become the output weight's gradient."""
        return self.in_head and tensor is getattr(self._head, "weight", None)

    def unwatch(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def place(self, sequence: int) -> str:
        """Name of the module in which the node with this sequence number was made."""
        index = bisect.bisect_right(self._starts, sequence) - 1
        return self._places[index] if index >= 0 else ""

    def begin_forward(self) -> None:
        """A new forward pass: logits are not there yet."""
        self.in_head, self.head_sequence, self.forward_end = False, None, None

    def begin_head(self) -> None:
        """Logits begin, or a loss that makes them by itself."""
        self.in_head = True
        if self.head_sequence is None:  # a chunked loss enters the head again, in the backward pass too
            self.head_sequence = torch._C._autograd._get_sequence_nr()

    def end_forward(self) -> None:
        """The loss is there; later numbers belong to a recomputation."""
        self.in_head, self.forward_end = False, torch._C._autograd._get_sequence_nr()

    def in_loss(self, sequence: int) -> bool:
        """Whether a node belongs to the head or the loss."""
        return (
            self.head_sequence is not None
            and self.head_sequence <= sequence
            and (self.forward_end is None or sequence < self.forward_end)
        )

    def _mark(self) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._places.append(self.stack[-1] if self.stack else "")

    def _enter(self, module: nn.Module, _args: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        self.stack.append(name)
        self._mark()
        if module is self._head:
            self.begin_head()
        elif self.forward_end is not None and self._names.get(id(self._head)) not in self.stack:
            self.in_head = False

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if id(module) in self._names and self.stack:
            self.stack.pop()
            self._mark()


def head_of(net: nn.Module) -> nn.Module | None:
    """The output embeddings of a model that names them, as transformers' models do."""
    found = getattr(net, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


class Tracer(TorchDispatchMode):
    """Feeds a ledger: every new storage on `meta`, kernels' own blocks, the libraries' workspaces."""

    def __init__(self, ledger: Ledger, workspaces: Workspaces, modules: Modules) -> None:
        """`modules` names the places; nothing is recorded until the mode is entered."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.workspaces = workspaces
        self.modules = modules
        self.phase = ""
        self.masks_hold = False  # where it is known that a mask leaves nothing out,
        self.all_hold = True  # or, asked of a whole mask, that it does leave something out,
        self.chosen: int | None = None  # how many places or distinct values there are,
        self.count = 1  # what a whole number on the device is
        self._last_any = 0
        unshared_count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation on `meta` and record what it would allocate on CUDA."""
        if func in _TRUTH_OPS and args[0].device.type == "meta":
            return self._answer(args[0])
        if func in _IN_PLACE_ONLY:
            return args[0] if func is aten._amp_update_scale_.default else None
        if args and (func in _DATA_OPS or func is aten.index.Tensor) and _needs_values(func, args):
            if self.masks_hold and func is aten.index.Tensor:
                return self._all_chosen(args)
            if self.chosen is not None and func in (aten.nonzero.default, aten._unique2.default):
                return self._found(func, args[0], self.chosen)
            raise TraceError(
                f"{func} in {self._place() or 'the model'} decides by the values of a tensor, which a "
                "simulation does not have; measure this model on a GPU instead."
            )
        ledger = self.ledger
        ledger.part, backward = self._part()
        if func is aten.zeros_like.default and self.phase == "optimizer_step":
            ledger.part = "optimizer_states"  # torch's optimizers make their states so, in the first step
        elif func is aten.zeros_like.default and self.modules.makes_gradient(args[0]):
            ledger.part = "gradients"  # a fused loss makes the weight's gradient in the forward pass
        elif func is aten.mm.default and backward and self.modules.is_head_gradient(args):
            ledger.part = "gradients"  # a tied one waits in the engine for the embedding's
        ledger.op, ledger.place = func, self._node_or_place(backward)
        if func in IN_PLACE and backward and not kwargs and (made := made_in_place(func, args)) is not None:
            if func in SCRATCH:
                ledger.scratch(SCRATCH[func](args, made))
            return made  # on CUDA autograd writes into it; without values nothing is left to do
        taken: list[int] = []
        try:
            if func is aten._grouped_mm.default:
                out = _grouped_mm(func, args, kwargs or {})
            elif func is aten.block_diag.default and args[0][0].device.type == "meta":
                out = _block_diag(args[0])
            elif func in SPARSE and _has_sparse(args):
                out, taken = SPARSE[func](args)
            else:
                out = func(*args, **(kwargs or {}))
        except Exception:
            ledger.failed()
            raise
        if isinstance(out, torch.Tensor):
            if out.device.type == "meta":
                for part in parts_of(out):
                    if ledger.record(part) == self._last_any:
                        self._last_any = 0  # a new storage at the place of one that is gone
        elif isinstance(out, tuple | list):
            for tensor in out:
                if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                    ledger.record(tensor)
        if taken:
            ledger.scratch(taken)
        if func in _ANY_OPS:
            self._last_any = out.untyped_storage()._cdata
        if func in PRODUCTS:
            thread = "autograd" if backward else "main"
            for size in self.workspaces.taken_by(func, args, thread=thread):
                ledger.workspace(size)
        elif func in SCRATCH:
            ledger.scratch(SCRATCH[func](args, out))
        return out

    def _found(self, func: Any, tensor: torch.Tensor, count: int) -> Any:
        """Places `[count, dims]` (int64) or distinct values `[count]`, where their number is known."""
        ledger = self.ledger
        ledger.part, backward = self._part()
        ledger.op, ledger.place = func, self._node_or_place(backward)
        if func is aten.nonzero.default:
            places = torch.empty(count, tensor.dim(), dtype=torch.int64, device="meta")
            ledger.record(places)
            return places
        values = torch.empty(count, dtype=tensor.dtype, device="meta")
        ledger.record(values)
        return values, *(torch.empty(0, dtype=torch.int64, device="meta") for _ in range(2))

    def _all_chosen(self, args: Sequence[Any]) -> torch.Tensor:
        """Indexing by masks that are all true: CUDA finds their places first (`nonzero`, int64)."""
        ledger = self.ledger
        ledger.part, backward = self._part()
        ledger.op, ledger.place = aten.index.Tensor, self._node_or_place(backward)
        indices: list[torch.Tensor | None] = []
        found_bytes = []
        for index in args[1]:
            if index is None or index.dtype not in _MASKS:
                indices.append(index)
                continue
            places = torch.empty(index.numel(), index.dim(), dtype=torch.int64, device="meta")
            found_bytes.append(places.numel() * 8)
            indices.extend(places.unbind(1))
        out: torch.Tensor = aten.index.Tensor(args[0], indices)
        ledger.record(out)
        ledger.scratch(found_bytes)
        return out

    def _answer(self, tensor: torch.Tensor) -> bool | int | float:
        """What a question about values means in a plain training step: `all` holds, `any` does not.

        transformers asks whether positions are plain and masks are full, peft and the gradient scaler
        whether anything is infinite. Counts are `count`, other numbers 0.
        """
        if tensor.dtype == torch.bool:
            return self.all_hold and tensor.untyped_storage()._cdata != self._last_any
        return 0.0 if tensor.is_floating_point() else self.count

    def _part(self) -> tuple[str, bool]:
        """The part of new storages, and whether autograd's thread is running."""
        phase = self.phase
        if phase == "forward":
            return ("logits_and_loss" if self._after_head() else "activations"), False
        if phase == "backward":
            node = torch._C._current_autograd_node()
            if node is None:
                return "logits_and_loss", False
            if torch.is_grad_enabled() or self.modules.made_again:
                return ("logits_and_loss" if self.modules.in_head else "activations"), True  # made again
            return ("logits_and_loss" if self.modules.in_loss(_sequence(node)) else "temporaries"), True
        if phase == "optimizer_step":
            return "temporaries", False
        return _PARTS_OF_PHASES.get(phase, "activations"), False

    def _after_head(self) -> bool:
        return self.modules.in_head

    def _node_or_place(self, backward: bool) -> Any:
        if backward and not torch.is_grad_enabled():
            node = torch._C._current_autograd_node()
            return _sequence(node) if node is not None else ""
        return self.modules.stack[-1] if self.modules.stack else ""

    def _place(self) -> str:
        return self.modules.stack[-1] if self.modules.stack else ""


def _has_sparse(args: Sequence[Any]) -> bool:
    return any(isinstance(a, torch.Tensor) and a.layout is torch.sparse_coo for a in args[:2])


def _needs_values(func: Any, args: Sequence[Any]) -> bool:
    """Whether the size of the result is decided by values on the device; indexing does so by a mask."""
    if func is not aten.index.Tensor:
        return bool(args[0].device.type == "meta")
    return any(
        index is not None and index.device.type == "meta" and index.dtype in _MASKS for index in args[1]
    )


def _sequence(node: Any) -> int:
    number = node._sequence_nr()
    return number if 0 <= number < _LAST_SEQUENCE else -1


def _block_diag(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """One matrix, as the kernel makes it; the rule for `meta` takes a step for every block."""
    rows, columns = (sum(block.shape[side] for block in blocks) for side in (0, 1))
    return torch.empty(rows, columns, dtype=blocks[0].dtype, device="meta")


def _grouped_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Grouped products: the rule for `meta` knows bf16 alone, the CUDA kernel takes every float type."""
    dtype = args[0].dtype
    if dtype == torch.bfloat16:
        out: torch.Tensor = func(*args, **kwargs)
        return out
    narrow = [
        a.to(torch.bfloat16) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]
    narrow_out: torch.Tensor = func(*narrow, **kwargs)
    return narrow_out.to(dtype)
