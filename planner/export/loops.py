"""What train.py says for the loop and the loss of one GPU: the plain step, HF Trainer's, a loss in pieces."""

from __future__ import annotations

from planner.losses import LIGER_KERNELS, LOSS_CHUNK_TOKENS
from planner.spec import Training

__all__ = ["LOSSES", "loss_line", "one_step"]

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

# As transformers' integrations/liger.py; TrainingArguments take the same dict as liger_kernel_config.
_LIGER = f'''

LIGER_KERNELS = {{
{"".join(f'    "{name}": {on},{chr(10)}' for name, on in LIGER_KERNELS.items())}}}


def fused(model, device):
    """Liger's fused loss alone: both gradients of the output layer are made in the forward pass."""
    if device.type != "cuda":
        print("Liger's kernels need a CUDA device; the model's own loss runs instead.")
        return model
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model, **LIGER_KERNELS)
    return model
'''

LOSSES: dict[str, str] = {"full": "", "chunked": _CHUNKED, "liger": _LIGER}
"""The functions that a loss needs."""

_LINES = {
    "full": "",
    "chunked": "    model = chunked(model)\n",
    "liger": "    model = fused(model, accelerator.device)\n",
}


def one_step(training: Training) -> str:
    """The function that takes an optimizer step, in the planned loop."""
    if training.loop == "plain":
        return _PLAIN + _STEPPED
    return _TRAINER + _STEPPED + _ASKED_FOR


def loss_line(training: Training) -> str:
    """The line of main() that changes the loss; empty for the model's own."""
    return _LINES[training.loss]
