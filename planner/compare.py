"""Two reports side by side: the difference of each part, and the disk space for several tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from planner.errors import SetupError
from planner.estimate.optimizers import saved_state_bytes
from planner.estimate.parameters import trained_tensors
from planner.estimate.recipes import RECIPES
from planner.report import PARTS, MemoryReport
from planner.spec import FullFineTuning, Setup

__all__ = ["Comparison", "Difference", "Storage", "comparison", "full_of", "storage"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One part, or the peak, of both reports. Bytes."""

    name: str
    full_bytes: int
    chosen_bytes: int

    @property
    def saved_bytes(self) -> int:
        """What the chosen method saves; negative where it needs more."""
        return self.full_bytes - self.chosen_bytes

    @property
    def reduction(self) -> float | None:
        """The saved share of full fine-tuning's bytes, unrounded; None where those are 0."""
        return self.saved_bytes / self.full_bytes if self.full_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "full_bytes": self.full_bytes,
            "chosen_bytes": self.chosen_bytes,
            "saved_bytes": self.saved_bytes,
            "reduction": self.reduction,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Storage:
    """Disk space for `tasks` fine-tuned models, at the bytes their weights have in memory.

    `full_optimizer_bytes` and `optimizer_bytes` come on top for each task whose run is to be resumed: the
    optimizer's states under full fine-tuning and under the chosen method, None where not known.
    Excludes file headers (some kilobytes), tokenizers, and states of the scheduler and of random numbers.
    """

    tasks: int
    full_copy_bytes: int
    base_bytes: int
    adapter_bytes: int
    full_optimizer_bytes: int | None = None
    optimizer_bytes: int | None = None

    @property
    def full_copies_bytes(self) -> int:
        """One full copy of the model for each task."""
        return self.tasks * self.full_copy_bytes

    @property
    def base_and_adapters_bytes(self) -> int:
        """One base model, and for each task only the tensors it trained."""
        return self.base_bytes + self.tasks * self.adapter_bytes

    @property
    def reduction(self) -> float:
        """The saved share of the full copies' bytes, unrounded."""
        return 1 - self.base_and_adapters_bytes / self.full_copies_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "tasks": self.tasks,
            "full_copy_bytes": self.full_copy_bytes,
            "full_copies_bytes": self.full_copies_bytes,
            "base_bytes": self.base_bytes,
            "adapter_bytes": self.adapter_bytes,
            "base_and_adapters_bytes": self.base_and_adapters_bytes,
            "full_optimizer_bytes": self.full_optimizer_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "reduction": self.reduction,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Full fine-tuning beside the chosen method: both reports, and what each part saves."""

    full: MemoryReport
    chosen: MemoryReport

    @property
    def parts(self) -> tuple[Difference, ...]:
        """A difference for each part, in the fixed order."""
        return tuple(
            Difference(
                name=name,
                full_bytes=getattr(self.full.parts, name),
                chosen_bytes=getattr(self.chosen.parts, name),
            )
            for name in PARTS
        )

    @property
    def peak(self) -> Difference:
        """The difference of peak allocated memory."""
        return Difference(
            name="peak_allocated_bytes",
            full_bytes=self.full.peak_allocated_bytes,
            chosen_bytes=self.chosen.peak_allocated_bytes,
        )

    @property
    def trainable_reduction(self) -> float:
        """The share of trained parameters that the chosen method does without, unrounded."""
        return 1 - self.chosen.parameters.trainable / self.full.parameters.trainable

    def to_dict(self) -> dict[str, Any]:
        """JSON values: both reports, `difference` by part, `peak` and the reductions as shares."""
        return {
            "full": self.full.to_dict(),
            "chosen": self.chosen.to_dict(),
            "difference": {part.name: part.to_dict() for part in self.parts},
            "peak": self.peak.to_dict(),
            "reduction": self.peak.reduction,
            "trainable_reduction": self.trainable_reduction,
        }


def comparison(full: MemoryReport, chosen: MemoryReport) -> Comparison:
    """Full fine-tuning's report beside the chosen method's, as one object.

    Both must come from the same verb. Raises SetupError where one is predicted and one measured.
    """
    if full.source != chosen.source:
        raise SetupError(
            f"a part by part comparison needs two reports of the same kind, got {full.source} and "
            f"{chosen.source}; give two estimates, two simulations or two measurements."
        )
    return Comparison(full=full, chosen=chosen)


def full_of(setup: Setup) -> Setup:
    """The same run as full fine-tuning, with torch's own attention where the asked one does not take that."""
    try:
        return setup.replace(method=FullFineTuning())
    except SetupError:
        return setup.replace(method=FullFineTuning(), attention="sdpa")


def storage(setup: Setup, tasks: int = 1) -> Storage:
    """Disk space for `tasks` tasks: full copies, against one base and the trained tensors of each.

    A full copy keeps the dtype the recipe holds the weights in, an adapter the dtype it was trained
    in. Optimizer states as the optimizer holds them. Raises SetupError for fewer than one task.
    """
    if isinstance(tasks, bool) or not isinstance(tasks, int) or tasks < 1:
        raise SetupError(f"tasks must be a whole number of at least 1, got {tasks!r}.")
    full_copy_bytes = setup.model.parameters * RECIPES[setup.training.precision].base
    if isinstance(setup.method, FullFineTuning):
        base_bytes, adapter_bytes = 0, full_copy_bytes
    else:
        base_bytes = full_copy_bytes
        adapter_bytes = sum(t.numel * t.count * t.element_bytes for t in trained_tensors(setup))
    return Storage(
        tasks=tasks,
        full_copy_bytes=full_copy_bytes,
        base_bytes=base_bytes,
        adapter_bytes=adapter_bytes,
        full_optimizer_bytes=saved_state_bytes(full_of(setup)),
        optimizer_bytes=saved_state_bytes(setup),
    )
