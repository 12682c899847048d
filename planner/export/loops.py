"""What train.py says for the loop and the loss of one GPU: the plain step, HF Trainer's, a loss in pieces."""

from __future__ import annotations

from planner.liger import liger_switches
from planner.losses import LOSS_CHUNK_TOKENS
from planner.spec import Training

__all__ = ["functions", "kernels_line", "loss_line", "one_step"]

_PLAIN = '''\
def one_step(accelerator, model, optimizer, trained, data, settings):
    """One optimizer step over all its micro batches; the mean of their losses."""
    micro_batches = settings["gradient_accumulation_steps"]
    total = 0.0
    with attention(settings["attention"], accelerator.device.type):
        for _ in range(micro_batches):
            batch = {key: value.to(accelerator.device) for key, value in next(data).items()}
            outputs = model(**batch)
            loss = outputs.loss / micro_batches
            accelerator.backward(loss)
            total += loss.item()
'''

_TRAINER = '''\
def one_step(accelerator, model, optimizer, trained, data, settings):
    """One optimizer step as HF Trainer runs it; its loss. No logits are alive in the backward pass."""
    micro_batches = settings["gradient_accumulation_steps"]
    waiting = [
        {key: value.to(accelerator.device) for key, value in next(data).items()}
        for _ in range(micro_batches)
    ]
    counted = asked_for(accelerator.unwrap_model(model), waiting)
    total = 0.0
    with attention(settings["attention"], accelerator.device.type):
        for batch in waiting:
            loss = model(**batch, **counted).loss
            if not counted:
                loss = loss / micro_batches
            accelerator.backward(loss)
            total += loss.item()
'''

_STEPPED = """\
    if settings["clip_grad_norm"] is not None:
        accelerator.clip_grad_norm_(trained, settings["clip_grad_norm"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=settings["zero_grad"] == "none")
    return total
"""

_ASKED_FOR = '''

def asked_for(model, waiting):
    """How many labels of the step are asked for, for models that divide the sum of their losses by it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = {parameter.kind for parameter in inspect.signature(base.forward).parameters.values()}
    if not getattr(base, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds):
        return {}
    first = 1 if type(base).__name__.endswith(("ForCausalLM", "LMHeadModel")) else 0  # it has no label
    asked = [batch["labels"][..., first:].ne(-100).sum() for batch in waiting]
    return {"num_items_in_batch": torch.stack(asked).sum()}
'''

_CHUNKED = f'''

def chunked(model):
    """A forward pass that returns the loss alone: {LOSS_CHUNK_TOKENS:,} tokens have logits at a time."""

    def forward(self, labels, num_items_in_batch=None, **inputs):
        hidden = self.base_model(**inputs).last_hidden_state
        head = self.get_output_embeddings()
        targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
        count = targets.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        pieces = zip(
            hidden.reshape(-1, hidden.shape[-1]).split({LOSS_CHUNK_TOKENS}),
            targets.split({LOSS_CHUNK_TOKENS}),
            strict=True,
        )
        losses = [checkpoint(summed_loss, head, *piece, use_reentrant=False) for piece in pieces]
        return CausalLMOutput(loss=torch.stack(losses).sum() / count)

    model.forward = types.MethodType(forward, model)
    return model


def summed_loss(head, hidden, targets):
    """The sum of the cross-entropies of some tokens."""
    logits = head(hidden).float()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
'''

# As transformers' integrations/liger.py, which HF Trainer calls once a method is attached.
_LIGER = '''

# liger_kernel_config of TrainingArguments(use_liger_kernel=True){whole}
LIGER_KERNELS = {{
{switches}}}


def with_liger(model, device):
    """Liger's kernels in place of {what}."""
    if device.type != "cuda":
        print("Liger's kernels need a CUDA device; the model's own code runs instead.")
        return model
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from transformers.trainer_utils import unwrap_peft_model

    _apply_liger_kernel_to_instance(model=unwrap_peft_model(model), **LIGER_KERNELS)
    return model
'''

_LOSS = "the loss: the output layer's gradients are made in the forward pass"
_KERNELS = "norms, activations and rotary positions"


def functions(training: Training) -> str:
    """The functions that the loss and the kernels need."""
    own = _CHUNKED if training.loss == "chunked" else ""
    fused, kernels = training.loss == "liger", training.kernels == "liger"
    if not (fused or kernels):
        return own
    switches = liger_switches(training.kernels, training.loss).items()
    return own + _LIGER.format(
        whole=", which needs none here" if fused and kernels else "",
        switches="".join(f'    "{name}": {on},\n' for name, on in switches),
        what=f"{_KERNELS}, and of the loss" if fused and kernels else _KERNELS if kernels else _LOSS,
    )


def one_step(training: Training) -> str:
    """The function that takes an optimizer step, in the planned loop."""
    if training.loop == "plain":
        return _PLAIN + _STEPPED
    return _TRAINER + _STEPPED + _ASKED_FOR


def loss_line(training: Training) -> str:
    """The line of main() that changes the loss before a method is attached; empty for the model's own."""
    return "    model = chunked(model)\n" if training.loss == "chunked" else ""


def kernels_line(training: Training) -> str:
    """The line of main() that brings in Liger's kernels once a method is attached; empty for torch's."""
    asked = "liger" in (training.loss, training.kernels)
    return "    model = with_liger(model, accelerator.device)\n" if asked else ""
