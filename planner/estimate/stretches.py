"""Stretches of equal layers and the stack they make: what is kept, and the worst moment of each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from planner.estimate.loss import LossMemory
from planner.estimate.nodes import Moment, Tensor
from planner.estimate.operations import Operations
from planner.estimate.resident import packed_bytes
from planner.units import MIB

__all__ = ["Stack", "Stretch", "stretch_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """`count` equal layers; bytes of one of them.

    `kept_bytes` wait for its backward pass, of which `input_bytes` stay to its end; `backward` is its worst
    moment without them, None where nothing in it or before it is trained; `weight_bytes` are the
    gradients it leaves. `passed_bytes`: its input where it is not kept, which the caller's variable holds as
    long as it runs forward. `copied_bytes` are held through the forward pass and then go: copies of weights
    under autocast, which a checkpoint drops, and variables of the model's `forward`. `pinned_bytes` stay to
    the end of the step, `stray_bytes` of the gradients as long as the graph. `beside_bytes` are variables of
    the loop over layers while it is here in the forward pass. `offloaded_bytes`: its input, on the host.
    """

    count: int
    kept_bytes: int
    input_bytes: int
    forward_peak_bytes: int
    backward: Moment | None
    weight_bytes: int
    passed_bytes: int = 0
    copied_bytes: int = 0
    pinned_bytes: int = 0
    stray_bytes: int = 0
    beside_bytes: int = 0
    offloaded_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Stretches in the order of the forward pass, then head and loss.

    `inputs_bytes` are token ids and labels, `tables_bytes` cos and sin of the positions; `masks_bytes`
    attention masks, which the forward pass holds, and past it checkpoints or kernels where `masks_kept`;
    `hidden_bytes` the head's input. `embedded_bytes`: embeddings that only a variable of the model holds
    (`inputs_embeds`), while its layers run; `embedded_is_input`: they are the first layer's input;
    `embedded_stays`: peft made them, and holds them to the end of the forward pass.
    `leaf_bytes`: the token embeddings' output where checkpointing asks for its gradient. The graph holds both
    to its end; `leaf_is_input`: the first layer keeps it anyway. `keeps_graph`: the loop holds the loss and
    with it the graph to the end of the step. `handed_on_bytes`: the gradient of the head's input that the
    loss made in the forward pass, where the last norm writes over it and the last layer's is in its storage.
    """

    stretches: tuple[Stretch, ...]
    loss: LossMemory
    inputs_bytes: int
    tables_bytes: int
    masks_bytes: int
    hidden_bytes: int
    leaf_bytes: int
    leaf_is_input: bool
    keeps_graph: bool
    masks_kept: bool = False
    embedded_bytes: int = 0
    embedded_is_input: bool = False
    embedded_stays: bool = False
    handed_on_bytes: int = 0

    @property
    def pinned_bytes(self) -> int:
        """What nodes of the graph hold to its end."""
        return sum([stretch.pinned_bytes * stretch.count for stretch in self.stretches])

    @property
    def stray_bytes(self) -> int:
        """Gradients that go with the graph alone."""
        return sum([stretch.stray_bytes * stretch.count for stretch in self.stretches])

    @property
    def offloaded_bytes(self) -> int:
        """Layers' inputs on the host."""
        return sum([stretch.offloaded_bytes * stretch.count for stretch in self.stretches])

    @property
    def leaf_kept_bytes(self) -> int:
        """The token embeddings' output, where no layer keeps it as its input."""
        return 0 if self.leaf_is_input else self.leaf_bytes

    @property
    def waiting_bytes(self) -> int:
        """What the forward pass leaves for the backward pass, head and loss apart."""
        kept = sum([stretch.kept_bytes * stretch.count for stretch in self.stretches])
        masks = self.masks_bytes if self.masks_kept else 0
        outside = self.inputs_bytes + self.tables_bytes + masks + self.leaf_kept_bytes
        return outside + kept + self.pinned_bytes

    @property
    def left_bytes(self) -> int:
        """What the loop still holds in the optimizer step, logits apart."""
        graph = 2 * self.leaf_bytes + self.pinned_bytes + self.stray_bytes
        return self.inputs_bytes + (graph if self.keeps_graph else 0)


def stretch_of(
    ops: Operations,
    start: Tensor | None,
    out: Tensor,
    *,
    accumulates: bool,
    repeats: int = 1,
    checkpointed: bool = False,
    offloaded: bool = False,
    keeps_output: bool = False,
    lent: Collection[Tensor] = (),
    carried: Collection[Tensor] = (),
) -> Stretch:
    """What the tape comes to, `repeats` times in the model.

    `checkpointed`: only the input is kept, the rest is made again; `offloaded`: on the host. `lent` are
    tensors that other stretches count; `carried` those whose gradients wait for this stretch's.
    """
    keepers = ops.keepers()
    keepers.pop(out.owner, None)  # the next stretch counts its input
    pinned = [owner for owner in ops.pinned() if owner not in lent]
    held = {**keepers, **dict.fromkeys(pinned, 1)} if pinned else keepers
    first = dict.fromkeys(pinned, 1) if checkpointed else held
    forward_peak = ops.forward_peak_bytes(first, graph=not checkpointed)
    if not out.needs_grad:
        return Stretch(
            count=1,
            kept_bytes=0,
            input_bytes=0,
            forward_peak_bytes=forward_peak,
            backward=None,
            weight_bytes=0,
            passed_bytes=start.size_bytes if start is not None else 0,
        )
    if not checkpointed:
        for owner in pinned:
            keepers.pop(owner, None)
    input_bytes = 0
    if start is not None and (checkpointed or start in keepers) and start not in pinned:
        input_bytes = start.size_bytes
    kept = (0 if offloaded else input_bytes) + (out.size_bytes if keeps_output else 0)
    moment, asking = ops.backward_moment(
        keepers, start, out, accumulates=accumulates, lent=lent, carried=carried, recomputed=checkpointed
    )
    if checkpointed:
        again = ops.forward_peak_bytes(held, recomputed=True)
        if again + asking > moment.total_bytes:
            moment = Moment(again, asking, 0)
    else:
        own = [owner for owner in keepers if owner is not start and owner not in lent]
        kept += _kept_bytes([owner.size_bytes for owner in own], repeats)
    return Stretch(
        count=1,
        kept_bytes=kept,
        input_bytes=input_bytes,
        forward_peak_bytes=forward_peak,
        backward=moment,
        weight_bytes=sum([node.weight_bytes for node in ops.nodes]),
        passed_bytes=start.size_bytes if start is not None and not input_bytes else 0,
        copied_bytes=ops.copied_bytes if checkpointed or ops.prefix else 0,
        pinned_bytes=_kept_bytes([owner.size_bytes for owner in pinned], repeats),
        stray_bytes=ops.stray_bytes,
        offloaded_bytes=start.numel * start.element if offloaded and start is not None else 0,
    )


def _kept_bytes(sizes: list[int], repeats: int) -> int:
    """What the tensors that one layer keeps count for, averaged over a few layers packed in segments."""
    if repeats == 1 or not any(MIB < size < 10 * MIB for size in sizes):
        return sum(sizes)
    layers = min(repeats, _PACKED_LAYERS)
    return packed_bytes(sizes * layers) // layers


_PACKED_LAYERS = 4  # after so many the pattern repeats: a segment of 20 MiB holds 2 to 19 of them
