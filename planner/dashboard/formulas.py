"""The formulas of the parts, in symbols and with a setup's numbers. Results come from the report."""

from __future__ import annotations

from dataclasses import dataclass

from planner.batching import has_masks, row_shape
from planner.dashboard.shared_formulas import shared_writers
from planner.dashboard.words import PART_TITLES, peak_place
from planner.estimate.recipes import RECIPES, recipe_of
from planner.liger import LIGER_VERSION
from planner.losses import LOSS_CHUNK_TOKENS, liger_chunk_tokens
from planner.optimizers import EIGHT_BIT, FROM_BITSANDBYTES
from planner.report import MemoryReport
from planner.spec import Adapter, BitFit, LoRA, QLoRA, Setup, Training
from planner.units import gib

__all__ = ["Term", "terms"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """One part of the peak: formula in LaTeX, the same in numbers, the result and where it comes from."""

    part: str
    formula: str
    numbers: str
    result: str
    source: str

    @property
    def title(self) -> str:
        """The part's name on the screen."""
        return PART_TITLES[self.part]


def terms(setup: Setup, report: MemoryReport) -> tuple[Term, ...]:
    """The formula of each part of `report`, the estimate of `setup`, in the fixed order."""
    writers = {
        "base_weights": _base_weights,
        "adapter_weights": _adapter_weights,
        "gradients": _gradients,
        "optimizer_states": _optimizer_states,
        "activations": _activations,
        "logits_and_loss": _logits,
        "temporaries": _temporaries,
        "workspace": _workspace,
        **shared_writers(setup),
    }
    found = []
    for part, writer in writers.items():
        formula, numbers, source = writer(setup, report)
        result = "not known" if part in report.not_known else gib(getattr(report.parts, part))
        found.append(Term(part=part, formula=formula, numbers=numbers, result=result, source=source))
    return tuple(found)


# Bytes of a quantized weight W of |W| numbers and d_out rows: planner/estimate/quantized.py.
_QUANTIZED = {
    "nf4": (r"\tfrac{|W|}{2} + 4 \tfrac{|W|}{64} + 64", "4 bits a number, an fp32 scale for each 64"),
    "nf4-double": (
        r"\tfrac{|W|}{2} + \tfrac{|W|}{64} + 4 \tfrac{|W|}{64 \cdot 256} + 1092",
        "4 bits a number, an 8-bit scale for each 64 and an fp32 one for each 256 of these",
    ),
    "int8": (r"|W| + 4\, d_{\mathrm{out}}", "8 bits a number, an fp32 scale for each row"),
}


def _base_weights(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    if isinstance(setup.method, QLoRA):
        formula, words = _QUANTIZED[setup.method.quantization]
        load = report.peak_phase == "load"
        also = r" + 2\, |W_{\mathrm{largest}}|" if load else ""
        beside = " While they are loaded one of these is there in 16 bits as well." if load else ""
        return (
            rf"\sum_{{\mathrm{{linear}}\ W}} \left( {formula} \right) + \sum_{{\mathrm{{others}}}} 4\, |W|"
            + also,
            f"P = {setup.model.parameters:,} parameters: {words} in linear layers; all others in fp32."
            + beside,
            "bitsandbytes, functional.py; peft, prepare_model_for_kbit_training",
        )
    element = RECIPES[setup.training.precision].base
    return (
        r"\sum_{W} 512 \left\lceil \frac{e_w \, |W|}{512} \right\rceil \approx e_w P",
        f"P = {setup.model.parameters:,} parameters of e_w = {element} bytes ({setup.training.precision}), "
        "each tensor rounded up to the allocator's 512 bytes; tied weights once.",
        "c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize; counts held against transformers' own classes",
    )


def _adapter_weights(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    method, added = setup.method, report.parameters.added
    element = RECIPES[setup.training.precision].adapter
    end = f"{added:,} added parameters of {element} bytes."
    if isinstance(method, LoRA):
        return (
            r"e_a \sum_{\mathrm{targets}} r \,(d_{\mathrm{in}} + d_{\mathrm{out}})",
            f"r = {method.lora_rank}, targets {', '.join(method.target_modules)}: {end}",
            "Hu et al. 2021, section 4.1; peft keeps adapters in fp32 (tuners_utils.py, cast_adapter_dtype)",
        )
    if isinstance(method, Adapter):
        hidden = setup.model.architecture.hidden_size if setup.model.architecture else 0
        return (
            r"e_a \sum_{\mathrm{adapters}} (2 h m + m + h)",
            f"h = {hidden:,}, m = {method.bottleneck(hidden)}, {method.adapter_kind}: {end}",
            "Houlsby et al. 2019, section 2.1; Pfeiffer et al. 2020",
        )
    if isinstance(method, BitFit):
        return r"0", "BitFit adds nothing: it trains bias terms that are there.", "Ben Zaken et al. 2021"
    return r"e_a \, A", f"A = {end}", "the setup itself"


def _gradients(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    return (
        r"\sum_{\mathrm{trained}\ W} e_W \, |W|",
        f"{report.parameters.trainable:,} trained parameters, each with a gradient in its own type; "
        "frozen ones have none.",
        "torch.autograd: a gradient has its parameter's dtype",
    )


def _optimizer_states(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    optimizer, trainable = setup.training.optimizer, report.parameters.trainable
    recipe = RECIPES[setup.training.precision]
    kept = f"{recipe.state} bytes each" if recipe.state else "each in its parameter's type"
    if optimizer == "sgd":
        return r"0", "SGD without momentum keeps no state.", "torch/optim/sgd.py"
    if optimizer == "sgd-momentum":
        return (
            r"\sum_{\mathrm{trained}\ W} e_s \, |W|",
            f"One momentum of {trainable:,} trained parameters, {kept}.",
            "torch/optim/sgd.py, _init_group (a copy of the first gradient)",
        )
    if optimizer == "adafactor":
        return (
            r"4 \sum_W \left( \tfrac{|W|}{d_{\mathrm{in}}} + \tfrac{|W|}{d_{\mathrm{out}}} + 1 \right)",
            f"Second moments of {trainable:,} trained parameters by rows and by columns, in fp32, and one "
            "mean for each tensor; one-dimensional tensors keep all of theirs.",
            "transformers, optimization.py (Adafactor.step); Shazeer and Stern 2018, section 3",
        )
    if optimizer in FROM_BITSANDBYTES:
        return _bitsandbytes_states(optimizer, report)
    return (
        r"2 \sum_{\mathrm{trained}\ W} e_s \, |W|",
        f"AdamW's two moments of {report.parameters.trainable:,} trained parameters, {kept}.",
        "torch/optim/adam.py, _init_group (zeros_like); textbook: Rajbhandari et al. 2020, section 3.1",
    )


def _bitsandbytes_states(optimizer: str, report: MemoryReport) -> tuple[str, str, str]:
    count = 1 if "lion" in optimizer else 2
    paged = report.provenance.get("paged_bytes", 0)
    large = r"|W| + 4 \left\lceil \tfrac{|W|}{256} \right\rceil"
    apart = f" {gib(paged)} of them are paged (100,000 numbers and more) and in no memory of torch's."
    if optimizer not in EIGHT_BIT:
        return (
            rf"{count} \sum_{{\mathrm{{trained}}\ W}} 4\, |W|",
            f"{report.parameters.trainable:,} trained parameters, {count} fp32 state"
            f"{'s' if count > 1 else ''} each, whatever the weights are.{apart if paged else ''}",
            "bitsandbytes, optim/optimizer.py (init_state, get_state_buffer)",
        )
    return (
        rf"{count} \sum_{{|W| \geq 4096}} ({large}) + {count} \sum_{{\mathrm{{others}}}} 4\, |W|",
        f"{report.parameters.trainable:,} trained parameters: a byte for each state and an fp32 scale for "
        f"each 256; tensors below 4,096 numbers and embeddings keep fp32 states.{apart if paged else ''}",
        "bitsandbytes, optim/optimizer.py (init_state, get_state_buffer); transformers, trainer.py",
    )


# The most that one optimizer step takes beside states and gradients, of the tensors W that are trained.
_STEPS = {
    "adamw": (r"\sum_W e_s |W|", "the square roots of all second moments (adam.py, _multi_tensor_adam)"),
    "adamw-single": (
        r"\max_i \, e_s (|W_{i-1}| + 2 |W_i|)",
        "a tensor's square root and quotient, and the one before (adam.py, _single_tensor_adam)",
    ),
    "adafactor": (
        r"\max_i \, 4 (|W_{i-1}| + 4 |W_i|)",
        "fp32 copies of a 16-bit gradient and weight, and two of the update (2 |W| without the copies)",
    ),
}


def _kept(training: Training) -> tuple[str, str]:
    """What waits for the backward pass, as a formula and in words."""
    every = training.checkpoint_every
    if not training.activation_checkpointing or every > 1:
        whole = r"\sum_{\mathrm{layers}} \sum_{\mathrm{saved}\ T} e_T \, |T|,\qquad |T| \propto b \cdot s"
        rest = f", of layers that are no multiple of {every}" if training.activation_checkpointing else ""
        return whole, (
            f"what each layer's operations keep for the backward pass{rest}, which depends on what is trained"
        )
    if training.checkpoint_offload:
        return r"\text{one layer}", "one layer's whole set while it is computed again; its input comes back"
    return (
        r"l \cdot b \cdot s \cdot h \cdot e",
        "each layer's input, and one layer's whole set while it is computed again",
    )


def _activations(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    shape, training = setup.model.architecture, setup.training
    if shape is None:
        return r"?", "The architecture has no closed formula; a simulation of the step knows it.", "not known"
    formula, kept = _kept(training)
    return (
        formula,
        f"b = {training.micro_batch_size}, s = {training.seq_len:,}, h = {shape.hidden_size:,}, "
        f"l = {shape.num_layers}, a = {shape.num_attention_heads} heads, f = {shape.intermediate_size:,}: "
        f"{kept}. A frozen linear layer keeps no copy of its input, a trained one does.{_mask(training)}"
        f"{_LIGER if training.kernels == 'liger' else ''}",
        "torch/csrc/autograd derivatives.yaml; transformers' layers, operation by operation"
        + (f"; liger_kernel {LIGER_VERSION}, ops" if training.kernels == "liger" else ""),
    )


_LIGER = (
    " Liger's kernels keep a norm's input in its own type and of a gated activation gate and up alone, which "
    "become their gradients; they turn queries and keys in place."
)


def _mask(training: Training) -> str:
    """What is said where padded or packed samples bring a mask to attention."""
    if not has_masks(training):
        return ""
    rows, length = row_shape(training)
    return f" Samples are {training.batching}: attention has a mask of {rows} x {length:,} x {length:,}."


def _logits(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    shape, training = setup.model.architecture, setup.training
    if shape is None:
        return r"?", "The architecture has no closed formula; a simulation of the step knows it.", "not known"
    if training.loss == "chunked":
        some = min(LOSS_CHUNK_TOKENS, training.micro_batch_size * training.seq_len)
        return (
            r"n \cdot v \cdot (4 + 4 + 4)",
            f"n v = {some:,} x {shape.vocab_size:,}: logits of at most {LOSS_CHUNK_TOKENS:,} tokens at a "
            "time, made again in the backward pass: log-softmax, its gradient and the logits' one in fp32, "
            "and a second gradient of the output weight where it is trained.",
            "planner/training/losses.py; torch.utils.checkpoint; aten/src/ATen/native/cuda/SoftMax.cu",
        )
    if training.loss == "liger":
        tokens, recipe = training.micro_batch_size * training.seq_len, recipe_of(setup)
        element = recipe.compute if recipe.autocast else recipe.base
        some = liger_chunk_tokens(tokens, shape.vocab_size, shape.hidden_size)
        return (
            r"b \cdot s \cdot h \cdot e + n \cdot v \cdot e_c",
            f"n v = {some:,} x {shape.vocab_size:,}, {element} bytes each: logits of {some:,} tokens at a "
            "time, which become their gradient in place, beside the gradient of the head's input, b s h = "
            f"{tokens:,} x {shape.hidden_size:,}. The output weight's gradient, where it is trained, is "
            "there from then on and counts among the gradients.",
            f"liger_kernel {LIGER_VERSION}, ops/fused_linear_cross_entropy.py",
        )
    return (
        r"b \cdot s \cdot v \cdot (e_c + 4 + \ldots)",
        f"b s v = {training.micro_batch_size} x {training.seq_len:,} x {shape.vocab_size:,}: the logits in "
        "the compute type, their fp32 copy, the log-softmax and its gradient, as far as they are alive then.",
        "transformers, loss/loss_utils.py (ForCausalLMLoss); torch.nn.functional.cross_entropy",
    )


def _temporaries(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    optimizer = setup.training.optimizer
    formula, words = _STEPS.get(optimizer, (r"0", "nothing: it works in place"))
    return (
        rf"\max \left( \mathrm{{backward}}, {formula} \right)",
        f"In the backward pass the gradients of one layer's activations; in the step of {optimizer} {words}. "
        f"Here the peak is in {peak_place(report)}.",
        "torch/optim; transformers, optimization.py; bitsandbytes, backends/cuda/ops.py",
    )


def _workspace(setup: Setup, report: MemoryReport) -> tuple[str, str, str]:
    return (
        r"\mathrm{threads} \times \mathrm{workspace}",
        "cuBLAS takes its workspace once for the forward thread and once for autograd's.",
        "aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize",
    )
