"""The words of the page: titles of parts, methods, sources and inputs. Sentence case."""

from __future__ import annotations

import re

from planner.report import MemoryReport

__all__ = [
    "FIELD_HELP",
    "FIELD_LABELS",
    "GLOSSARY",
    "METHOD_CAPTIONS",
    "NOT_COUNTED",
    "PART_HELP",
    "PART_TITLES",
    "PHASE_TITLES",
    "SIGNS",
    "SOURCE_TITLES",
    "field_label",
    "method_title",
    "peak_place",
    "phase_title",
    "plain",
]

_MARKS = re.compile(r"[\\`*_{}\[\]()<>#+!|$:~^-]")

PART_TITLES = {
    "base_weights": "Base weights",
    "adapter_weights": "Adapter weights",
    "gradients": "Gradients",
    "optimizer_states": "Optimizer states",
    "activations": "Activations",
    "logits_and_loss": "Logits and loss",
    "temporaries": "Temporaries",
    "workspace": "Workspace",
}
PART_HELP = {
    "base_weights": "the model's own parameters, trained or frozen",
    "adapter_weights": "parameters that the method adds",
    "gradients": "one value for each trained parameter",
    "optimizer_states": "what the optimizer remembers of each trained parameter",
    "activations": "what the forward pass keeps for the backward pass",
    "logits_and_loss": "one value for each token and word of the vocabulary, and the loss's copies of it",
    "temporaries": "alive within one operation or one layer's backward pass",
    "workspace": "what the matrix library keeps for itself",
}
SOURCE_TITLES = {"estimate": "predicted", "simulation": "simulated", "measurement": "measured"}
PHASE_TITLES = {
    "load": "loading the model",
    "attach": "attaching the adapter",
    "forward": "the forward pass",
    "loss": "the loss",
    "backward": "the backward pass",
    "optimizer_step": "the optimizer step",
}
_METHOD_TITLES = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "qlora": "QLoRA",
    "adapter": "bottleneck adapters",
    "bitfit": "BitFit",
    "peft": "a PEFT method",
}
METHOD_CAPTIONS = {
    "full": "Full fine-tuning: every parameter is trained.",
    "lora": "LoRA: two small matrices beside each target layer, the model frozen.",
    "qlora": "QLoRA: LoRA over a model held in 4 bits.",
    "adapter": "Bottleneck adapters: small two-layer networks inside each layer, the model frozen.",
    "bitfit": "BitFit: only the bias terms are trained.",
    "peft": "A PEFT method of which only the number of trained parameters is known.",
}
FIELD_LABELS = {
    "model": "Model",
    "method": "Method",
    "gpu": "GPU",
    "micro_batch_size": "Micro batch size",
    "seq_len": "Sequence length",
    "gradient_accumulation_steps": "Gradient accumulation steps",
    "precision": "Precision recipe",
    "optimizer": "Optimizer",
    "activation_checkpointing": "Activation checkpointing",
    "checkpoint_every": "Checkpoint every so-many-th layer",
    "checkpoint_offload": "Checkpoints on the host",
    "attention": "Attention",
    "clip_grad_norm": "Gradient clipping",
    "zero_grad": "Gradients after a step",
    "loop": "Training loop",
    "loss": "Loss",
    "kernels": "Kernels",
    "batching": "Samples of different length",
    "lora_rank": "Rank r",
    "lora_alpha": "Alpha",
    "lora_dropout": "Dropout",
    "lora_bias": "Trained biases",
    "target_modules": "Target modules",
    "adapter_kind": "Kind",
    "adapter_size": "Bottleneck size",
    "adapter_reduction_factor": "Reduction factor",
    "trainable_params": "Trained parameters",
    "quantization": "Quantization",
    "num_gpus": "Number of GPUs",
    "gpus_per_node": "GPUs in one machine",
    "sharding": "Sharding",
    "cpu_offload": "CPU offload",
    "reduce_dtype": "Gradients reduced in",
    "prefetch": "Units gathered ahead",
    "shard_unit": "Unit of sharding",
}
FIELD_HELP = {
    "model": "Search the catalogue, or type a Hugging Face id (only its config.json is read), or a bare size "
    "such as params:7e9.",
    "gpu": "Choose a card, or type the memory you have, such as 24GiB.",
    "micro_batch_size": "Sequences in one forward and backward pass, on one GPU.",
    "seq_len": "Tokens in one sequence, padding included.",
    "gradient_accumulation_steps": "Micro batches before each optimizer step.",
    "precision": "bf16, fp16, fp32: weights, gradients and states in that type. bf16-mixed, fp16-mixed: fp32 "
    "weights under autocast. textbook: 2 + 2 + 8 bytes for each trained parameter.",
    "optimizer": "adamw is torch's own default on CUDA (foreach), with temporaries as large as what it "
    "trains; adamw-fused has none, adamw-single those of one tensor. The -8bit and -32bit ones are "
    "bitsandbytes', in 8 bits with embeddings in fp32 as HF Trainer sets them; what is paged is in no number "
    "of torch's.",
    "activation_checkpointing": "Keeps each layer's input and computes the layer again in the backward pass. "
    "Also called gradient checkpointing.",
    "checkpoint_every": "With activation checkpointing: 2 checkpoints every other layer, and the rest keep "
    "their activations, for more memory and less time.",
    "checkpoint_offload": "With activation checkpointing: layers' inputs wait in pinned memory of the host, "
    "at the price of two copies a layer.",
    "attention": "sdpa is torch's own choice; eager keeps the whole attention matrix.",
    "clip_grad_norm": "Largest gradient norm; empty for no clipping.",
    "zero_grad": "none gives gradients up, as torch does; zero keeps them through the next forward pass.",
    "loop": "plain says outputs = model(**batch) and so keeps the logits to the end of the step; "
    "Hugging Face's Trainer gives them up before the backward pass.",
    "loss": "full makes the logits of all tokens at once; chunked those of 1,024 tokens at a time, and once "
    "more in the backward pass; liger is liger_kernel's fused loss, which makes the head's gradients in the "
    "forward pass.",
    "kernels": "What computes norms, gated activations and rotary positions. liger: liger_kernel's, which "
    "keep less and work in place; with loss liger it is use_liger_kernel of Hugging Face's Trainer.",
    "batching": "full: every sample has all tokens; padded: shorter ones are filled up and a mask goes to "
    "attention; packed: all samples in one row, none filled up.",
    "lora_alpha": "The update is scaled by alpha / r; empty means 2 r.",
    "lora_dropout": "Dropout on each adapter's input; above 0 it keeps a mask.",
    "lora_bias": "none, all biases, or those of the target layers only.",
    "target_modules": "attention, all-linear, or the names of layers with commas: q_proj,v_proj.",
    "adapter_kind": "houlsby: after attention and after the MLP of each layer; pfeiffer: after the MLP.",
    "adapter_size": "Width of the bottleneck; empty means 64.",
    "adapter_reduction_factor": "The model's width divided by this, instead of a bottleneck size.",
    "trainable_params": "How many parameters the method trains.",
    "num_gpus": "GPUs that share the run; each is given the micro batch above.",
    "gpus_per_node": "Empty: 8, or all where they are fewer.",
    "sharding": "ddp: a copy on each GPU. fsdp: shards by PyTorch's FSDP2; fsdp-grad-op keeps the gathered "
    "weights for the backward pass; hsdp shards within a machine. zero1 to zero3: DeepSpeed's stages.",
    "cpu_offload": "What lives in the host's memory: optimizer states (DeepSpeed), or parameters too.",
    "reduce_dtype": "Type that FSDP reduces gradients in; empty: the one the step computes in.",
    "prefetch": "Units that FSDP gathers ahead of their use; empty: its own choice.",
    "shard_unit": "Module class that FSDP gathers at once; empty: the model's layer.",
}
SIGNS = {"fits": "✓", "tight": "≈", "does not fit": "✕", "not known": "?"}  # colour is never alone
NOT_COUNTED = (
    "The CUDA context and the allocator's unused reserve are not in the bars; the verdict adds both.",
    "Other processes on the card, and what a desktop draws there.",
    "Evaluation during training, above all generation with its key-value cache.",
    "Tensor, pipeline and expert parallelism: several GPUs share a run by its data alone.",
    "Kernels of other libraries that replace parts of the model, such as Unsloth's.",
    "torch.compile: the compiler decides by version and device what it keeps, fuses or computes again.",
    "The host's memory: data loading, pinned buffers and loading the checkpoint.",
)
GLOSSARY = {
    "Allocated": "bytes of living tensors, as torch.cuda.max_memory_allocated counts them.",
    "Reserved": "the allocator's segments, used and free, as torch.cuda.max_memory_reserved counts them.",
    "Device used": "reserved, the CUDA context and other processes: what nvidia-smi shows.",
    "Predicted": "by formula; simulated: by running the training step on tensors without storage.",
    "Measured": "read on a CUDA device while the step ran.",
    "Micro batch": "the sequences of one forward and backward pass.",
    "Full fine-tuning": "every parameter is trained.",
    "PEFT": "parameter-efficient fine-tuning: few parameters are trained, the others stay frozen.",
    "GiB": "2^30 bytes; GB, 10^9 bytes, appears in the hand-worked example only.",
}


def field_label(name: str) -> str:
    """The label of an input; a field without an entry gets its own name in words."""
    return FIELD_LABELS.get(name, name.replace("_", " ").capitalize())


def method_title(name: str) -> str:
    """A method's name within a sentence: `"full fine-tuning"`, `"LoRA"`."""
    return _METHOD_TITLES.get(name, name)


def phase_title(name: str) -> str:
    """A phase on an axis: `"Optimizer step"`."""
    return name.replace("_", " ").capitalize()


def plain(text: str) -> str:
    """Text that may hold a visitor's words, with every mark of Markdown escaped."""
    return _MARKS.sub(r"\\\g<0>", text)


def peak_place(report: MemoryReport) -> str:
    """Where the peak is, within a sentence: `"the backward pass"`."""
    return PHASE_TITLES.get(report.peak_phase, report.peak_phase.replace("_", " "))
