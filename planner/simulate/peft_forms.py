"""peft's methods that ask for the values of tensors, answered by what they mean.

A form is put in place of a function of peft while a simulation runs. Forms of this file are of the training
step; those of the initialisation stand in planner.simulate.peft_inits.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from planner.simulate.peft_inits import INITS
from planner.simulate.trace import Tracer

__all__ = ["peft_forms"]

Function = Callable[..., Any]
_MANY_PLACES = 1 << 20  # shuffling 16 million takes half a second, and a model has hundreds of weights


@contextmanager
def peft_forms(tracer: Tracer) -> Iterator[None]:
    """Put the forms in place, for the time of the context, where peft has been imported."""
    forms = {place: _kept(tracer, form) for place, form in INITS.items()}
    forms |= {place: form(tracer) for place, form in _OF_THE_STEP.items()}
    with ExitStack() as stack:
        for place, form in forms.items():
            module, _, path = place.partition(":")
            *outer, name = path.split(".")
            owner = sys.modules.get(module)
            for each in outer:
                owner = getattr(owner, each, None)
            if owner is None or not hasattr(owner, name):
                continue
            static = isinstance(inspect.getattr_static(owner, name), staticmethod)
            made = form(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, staticmethod(made) if static else made))
        yield


def _kept(tracer: Tracer, form: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """An initialisation that writes the layer's weight anew (PiSSA's residual): it stays a base weight."""

    def with_tag(original: Function) -> Function:
        formed = form(original)

        def init(*args: Any, **kwargs: Any) -> Any:
            made = formed(*args, **kwargs)
            if args and hasattr(args[0], "get_base_layer"):
                tracer.ledger.retag(args[0].get_base_layer().weight, "base_weights")
            return made

        return init

    return with_tag


def _where(**known: Any) -> Callable[[Tracer], Callable[[Function], Function]]:
    """The function runs while the tracer knows this of its questions (`Tracer`'s attributes)."""

    def with_tracer(tracer: Tracer) -> Callable[[Function], Function]:
        def form(original: Function) -> Function:
            def held(*args: Any, **kwargs: Any) -> Any:
                before = {name: getattr(tracer, name) for name in known}
                for name, value in known.items():
                    setattr(tracer, name, value(*args, **kwargs) if callable(value) else value)
                try:
                    return original(*args, **kwargs)
                finally:
                    for name, value in before.items():
                        setattr(tracer, name, value)

            return held

        return form

    return with_tracer


def _shira_places(layer: Any, adapter_name: str, mask: Any, r: int, *args: Any, **kwargs: Any) -> int:
    """ShiraLayer.update_layer: as many weights are chosen as a LoRA of rank r has."""
    return int(r * (layer.in_features + layer.out_features))


def _alora(tracer: Tracer) -> Callable[[Function], Function]:
    """Batches of a simulation begin with the invocation, so the adapter acts on every token."""

    def form(original: Function) -> Function:
        def offsets(config: Any, adapter: str, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(input_ids, torch.Tensor) or input_ids.device.type != "meta":
                return original(config, adapter, input_ids, *args, **kwargs)
            tracer.masks_hold = True  # of tokens, in the backward pass too
            return [input_ids.shape[1]] * input_ids.shape[0]

        return offsets

    return form


def _frod_offload(tracer: Tracer) -> Callable[[Function], Function]:
    """frod.layer.Linear._offload_base_weight_to_cpu leaves `meta` alone: the weight leaves the device."""

    def form(original: Function) -> Function:
        def offload(layer: Any) -> None:
            weight = layer.get_base_layer().weight
            if weight.device.type == "meta":
                tracer.ledger.left_the_device(weight)
            else:
                original(layer)

        return offload

    return form


def _unshuffled(tracer: Tracer) -> Callable[[Function], Function]:
    """torch.randperm while a method is attached: some draw their places out of all of a weight's."""

    def form(original: Function) -> Function:
        def places(n: int, *args: Any, **kwargs: Any) -> Any:
            if tracer.phase != "attach" or n < _MANY_PLACES or kwargs.get("out") is not None:
                return original(n, *args, **kwargs)
            return torch.zeros(1, dtype=torch.int64, device="cpu").expand(n).to(kwargs.get("device") or "cpu")

        return places

    return form


_OF_THE_STEP: dict[str, Callable[[Tracer], Callable[[Function], Function]]] = {
    # WaveFT drops the places beyond a padded weight, of which there are none.
    "peft.tuners.waveft.layer:WaveFTLayer.get_delta_weight": _where(masks_hold=True),
    "peft.tuners.shira.layer:ShiraLayer.update_layer": _where(chosen=_shira_places),
    "peft.tuners.poly.router:PolyRouter.forward": _where(count=0),  # tasks are numbered from 0
    # CPT: every token of the batch carries a label, and all labels are of one kind
    "peft.tuners.cpt.model:CPTEmbedding.calculate_loss": _where(masks_hold=True, chosen=1),
    "peft.peft_model:PeftModelForCausalLM._cpt_forward": _where(masks_hold=True),
    "peft.tuners.lora.variants:calculate_alora_offsets": _alora,
    "torch:randperm": _unshuffled,
    "peft.tuners.frod.layer:Linear._offload_base_weight_to_cpu": _frod_offload,
}
