"""Autograd on sizes: a layer's operations note what they keep, two walks find the moments of most memory.

Each operation of a layer is one `Node`. The walks follow every tensor's life as autograd does: nodes
run backwards in the order they were made, a kept tensor goes with the last node that keeps it, two
gradients of one tensor are added in place (torch/csrc/autograd/engine.cpp, input_buffer.cpp). One layer
of each kind is walked, whatever the batch, the sequence and the number of layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from planner.estimate.nodes import Moment, Node, Tensor

__all__ = ["Tape"]


class _Gradient:
    """The gradient of an activation; several inputs of an addition share one."""

    __slots__ = ("holders", "size_bytes")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.holders = 1


class Tape:
    """The operations of one stretch of a model, in the order of the forward pass."""

    __slots__ = ("graph_holds", "holds", "multiplied", "nodes")

    def __init__(self) -> None:
        """Nothing has run. `multiplied`: see `backward_moment`."""
        self.multiplied: Moment | None = None
        self.nodes: list[Node] = []
        self.holds: list[tuple[Tensor, int]] = []
        self.graph_holds: list[tuple[Tensor, int]] = []

    def op(
        self,
        inputs: tuple[Tensor, ...],
        numel: int,
        element: int,
        kept: tuple[Tensor, ...] = (),
        *,
        aliases: bool = False,
        scratch_bytes: int = 0,
        weight_bytes: int = 0,
        work_bytes: int = 0,
        keeps_output: bool = False,
        trained: bool = False,
        reads_weight: bool = False,
        pinned: tuple[Tensor, ...] = (),
        freed_bytes: int = 0,
        keeps_late: bool = False,
        replaces: bool = False,
    ) -> Tensor:
        """A new tensor of `numel` elements.

        `kept`: tensors that autograd keeps where the output needs a gradient. `weight_bytes`: gradients
        of the weights trained here. In the backward pass `scratch_bytes` live beside the gradients of
        output, inputs and weights; `work_bytes` live beside the output in the forward pass. `trained`: a
        weight is trained here though its gradient is counted elsewhere. `reads_weight`: the backward pass
        needs a weight, which a checkpoint hands out only after its recomputation. `pinned`: tensors that the
        node itself refers to, past its backward pass and in spite of a checkpoint. `freed_bytes`: of what is
        kept, gone before the scratch is there. `keeps_late`: a torch.autograd.Function, which hands over what
        it keeps when its output is there; torch's own operations do before. `replaces`: the gradient of the
        output is gone before the scratch is there, unless something else holds it.
        """
        needs = trained or weight_bytes > 0
        for tensor in inputs:
            needs = needs or tensor.needs_grad
        out = Tensor(numel, element, needs)
        if keeps_output:
            kept = (*kept, out)
        self.nodes.append(
            Node(
                inputs,
                (out,),
                kept if needs else (),
                aliases,
                scratch_bytes,
                weight_bytes,
                work_bytes,
                reads_weight and needs,
                pinned if needs else (),
                freed_bytes,
                keeps_late,
                replaces,
            )
        )
        return out

    def view(self, x: Tensor, numel: int) -> Tensor:
        """A slice of x that shares its storage; its gradient is spread over zeros as large as x."""
        out = Tensor(numel, x.element, x.needs_grad, x.owner)
        self.nodes.append(Node((x,), (out,)))
        return out

    def split(self, x: Tensor, numels: Sequence[int]) -> tuple[Tensor, ...]:
        """Parts of x that share its storage (chunk, split); their gradients are joined by one copy."""
        outs = tuple([Tensor(numel, x.element, x.needs_grad, x.owner) for numel in numels])
        self.nodes.append(Node((x,), outs))
        return outs

    def in_place(self, x: Tensor, y: Tensor) -> Tensor:
        """x += y: the sum is in x's storage, and both gradients are the sum's."""
        out = Tensor(x.numel, x.element, x.needs_grad or y.needs_grad, x.owner)
        self.nodes.append(Node((x, y), (out,), aliases=True))
        return out

    def hold(self, *tensors: Tensor) -> None:
        """Say that a variable of the running function refers to these until here."""
        last = len(self.nodes) - 1
        self.holds += [(tensor.owner, last) for tensor in tensors]

    def hold_by_graph(self, *tensors: Tensor) -> None:
        """The same of the graph behind a variable: what a checkpoint runs first has none."""
        last = len(self.nodes) - 1
        self.graph_holds += [(tensor.owner, last) for tensor in tensors]

    def keepers(self) -> dict[Tensor, int]:
        """How many nodes keep each storage."""
        keepers: dict[Tensor, int] = {}
        for node in self.nodes:
            for owner in dict.fromkeys([tensor.owner for tensor in node.kept]):
                keepers[owner] = keepers.get(owner, 0) + 1
        return keepers

    def pinned(self) -> list[Tensor]:
        """The storages that nodes refer to as long as the graph is there."""
        return list(dict.fromkeys([tensor.owner for node in self.nodes for tensor in node.pinned]))

    def forward_peak_bytes(
        self, keepers: dict[Tensor, int], *, recomputed: bool = False, graph: bool = True
    ) -> int:
        """Most bytes alive while the stretch runs forward, those of its inputs not counted.

        A tensor that is not kept goes after its last use or hold. `recomputed`: checkpointing stops as
        soon as the last tensor that autograd keeps is there (torch/utils/checkpoint.py, early stop);
        `graph`: autograd keeps something, which it does not when a checkpoint runs first.
        """
        nodes = self.nodes
        last_use: dict[Tensor, int] = {}
        last_kept = 0
        for index, node in enumerate(nodes):
            for tensor in node.inputs:
                last_use[tensor.owner] = index
            for tensor in node.outputs:
                last_use[tensor.owner] = index
            if node.kept or node.reads_weight:
                last_kept = index
        for owner, index in (*self.holds, *(self.graph_holds if graph else ())):
            if index > last_use.get(owner, index):
                last_use[owner] = index
        ends: dict[int, int] = {}
        beside = {owner: owner.size_bytes for owner in keepers if owner not in last_use}  # masks, statistics
        live = peak = 0
        for index, node in enumerate(nodes):
            stops = recomputed and index == last_kept
            made = node.keeps_late or any(tensor not in node.inputs for tensor in node.kept)
            before = stops and not made
            for out in node.outputs:
                if out.owner is out and not before:
                    live += out.size_bytes
                    if out not in keepers:
                        end = last_use[out]
                        ends[end] = ends.get(end, 0) + out.size_bytes
            for tensor in node.kept:
                live += beside.pop(tensor.owner, 0)
            if live + node.work_bytes > peak:
                peak = live + node.work_bytes
            if stops:
                break
            live -= ends.pop(index, 0)
        return peak

    def backward_moment(
        self,
        keepers: dict[Tensor, int],
        outside: Tensor | None,
        out: Tensor,
        *,
        accumulates: bool,
        head_bytes: int = 0,
        lent: Collection[Tensor] = (),
        carried: Collection[Tensor] = (),
        recomputed: bool = False,
    ) -> tuple[Moment, int]:
        """The moment of most memory while gradients flow from `out` to the stretch's inputs.

        Also the bytes of gradients when autograd first asks for something kept: where a checkpoint is
        recomputed.

        Storages of `outside` (the stretch's input) and `lent` (what other stretches count) are not counted.
        Of `carried` a later stretch has made a gradient already, to which this one's are added.
        `accumulates`: weights have gradients already, so that new ones live only until they are added. A
        new one counts as a temporary until its node is done, but `head_bytes` of the output weight's as a
        gradient. `recomputed`: by a checkpoint, so that nothing is kept before something kept is asked for
        (bitsandbytes' products ask for nothing). `multiplied` is left behind: the same moment since the
        first product, for which a thread takes its workspace.
        """
        users = dict(keepers)
        for tensor in (outside, *lent):
            users.pop(tensor, None)  # type: ignore[arg-type]
        kept = sum([owner.size_bytes for owner in users])
        gradients = {tensor: _Gradient(tensor.size_bytes) for tensor in (out, *carried)}
        live, weights = sum([gradient.size_bytes for gradient in gradients.values()]), 0
        best = Moment(0 if recomputed else kept, live, weights)
        best_total = best.total_bytes
        at_first_kept = 0
        early: Moment | None = None
        for node in reversed(self.nodes):
            arrived = [grad for output in node.outputs if (grad := gradients.pop(output, None)) is not None]
            if not arrived:
                continue
            if not at_first_kept and (node.kept or node.reads_weight):
                at_first_kept = live
            there = kept - node.freed_bytes if at_first_kept or not recomputed else 0
            made: list[tuple[Tensor, _Gradient]] = []
            for tensor in node.inputs:
                if tensor.needs_grad:
                    if node.aliases and tensor.size_bytes == arrived[0].size_bytes:
                        arrived[0].holders += 1
                        made.append((tensor, arrived[0]))
                    else:
                        live += tensor.size_bytes
                        made.append((tensor, _Gradient(tensor.size_bytes)))
            new_bytes = live + node.scratch_bytes + node.weight_bytes
            if node.replaces and arrived[0].holders == 1:
                new_bytes -= arrived[0].size_bytes
            if early is None and (node.reads_weight or node.weight_bytes):
                early, best_total = best, 0
            if there + new_bytes + weights > best_total:
                best_total = there + new_bytes + weights
                new_weights = min(node.weight_bytes, head_bytes)
                best = Moment(there, new_bytes - new_weights, weights + new_weights)
            if not accumulates:
                weights += node.weight_bytes
            for tensor, new in made:
                old = gradients.get(tensor)
                if old is None:
                    gradients[tensor] = new
                    continue
                if old.holders > 1 and new.holders > 1:
                    summed = _Gradient(tensor.size_bytes)
                    live += summed.size_bytes
                    held = kept if at_first_kept or not recomputed else 0
                    if held + live + weights > best_total:
                        best_total = held + live + weights
                        best = Moment(held, live, weights)
                    gradients[tensor] = summed
                    live -= _released(old) + _released(new)
                elif old.holders == 1:
                    live -= _released(new)
                else:
                    gradients[tensor] = new
                    live -= _released(old)
            for grad in arrived:
                live -= _released(grad)
            for owner in dict.fromkeys([tensor.owner for tensor in node.kept]):
                if owner in users:
                    users[owner] -= 1
                    if not users[owner]:
                        kept -= owner.size_bytes
                        del users[owner]
        self.multiplied = best
        if early is not None and early.total_bytes >= best.total_bytes:
            best = early
        return best, at_first_kept or live


def _released(gradient: _Gradient) -> int:
    """Bytes that are free once one holder lets go."""
    gradient.holders -= 1
    return 0 if gradient.holders else gradient.size_bytes
