"""What a user's `build()` returned: its modules, optimizers and loose tensors, wherever they stand in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from planner.simulate.trace import head_of

__all__ = ["State"]

_DEEPEST = 4  # state.trainer.parts["model"] is three steps down


@dataclasses.dataclass
class State:
    """`modules` by where they were found ("" for the only one), in the order of finding."""

    modules: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = dataclasses.field(default_factory=list)
    tensors: list[torch.Tensor] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, built: Any) -> State:
        """Searches `built` itself, then tuples, lists, dicts and attributes."""
        found = cls()
        found._search(built, "", 0, set())
        if len(found.modules) == 1:
            found.modules = {"": next(iter(found.modules.values()))}
        return found

    def parameters(self) -> list[torch.Tensor]:
        """Every parameter once: of the modules, then those only an optimizer or `built` itself holds."""
        candidates: list[torch.Tensor] = [p for m in self.modules.values() for p in m.parameters()]
        for optimizer in self.optimizers:
            candidates += [p for group in optimizer.param_groups for p in group["params"]]
        candidates += [tensor for tensor in self.tensors if tensor.requires_grad and tensor.is_leaf]
        return list({id(tensor): tensor for tensor in candidates}.values())

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Every module once, with its name."""
        seen: set[int] = set()
        for place, module in self.modules.items():
            for name, part in module.named_modules():
                if id(part) not in seen:
                    seen.add(id(part))
                    yield ".".join(each for each in (place, name) if each), part

    def head(self) -> nn.Module | None:
        """The output embeddings of the first module that names them."""
        heads = (head_of(module) for module in self.modules.values())
        return next((head for head in heads if head is not None), None)

    def _search(self, value: Any, place: str, depth: int, seen: set[int]) -> None:
        if id(value) in seen or depth > _DEEPEST:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            self.modules[place] = value
        elif isinstance(value, torch.optim.Optimizer):
            self.optimizers.append(value)
        elif isinstance(value, torch.Tensor):
            self.tensors.append(value)
        else:
            for name, part in _parts(value):
                self._search(part, f"{place}.{name}" if place else name, depth + 1, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((str(key), part) for key, part in value.items())
    elif isinstance(value, tuple | list):
        names = getattr(value, "_fields", range(len(value)))
        yield from ((str(name), part) for name, part in zip(names, value, strict=True))
    elif not isinstance(value, type | ModuleType | FunctionType | MethodType):
        yield from getattr(value, "__dict__", {}).items()
        for name in getattr(type(value), "__slots__", ()):
            if hasattr(value, name):
                yield name, getattr(value, name)
