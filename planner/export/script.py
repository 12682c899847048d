"""The text of train.py, put together from pieces: only what the method and the task need.

The loop is that of `planner.training.run`; tests run the script and hold its counts against the formulas.
"""

from __future__ import annotations

from planner.batching import takes_lengths
from planner.export.batches import batches, sent, varlen, varlen_line
from planner.export.loops import functions, kernels_line, loss_line, one_step
from planner.export.methods import PIECES, piece_name
from planner.export.shared import SHARED_STEP, shared_lines, shared_save
from planner.model import Task
from planner.optimizers import FROM_BITSANDBYTES
from planner.spec import Setup

__all__ = ["script"]

_AUTO_CLASSES: dict[Task, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
}

_HEAD = '''\
"""Fine-tune a model as it was planned: every setting stands in settings.json beside this file.

python train.py --model model --steps 3         random weights, random tokens: does it fit?
python train.py --data text.txt --out trained   the planned model on your text
"""

import argparse
import contextlib
{dataclasses}{inspect}import json
{standard}{types}from pathlib import Path

{bitsandbytes}{peft}import torch
import transformers
from accelerate import Accelerator{partial}
{send}{safetensors}{nn}{fsdp}from torch.nn.attention import SDPBackend, sdpa_kernel
{checkpoint}from transformers import AutoConfig, {auto_class}, AutoTokenizer{quantization}
from transformers.integrations import sdpa_attention
{outputs}
HERE = Path(__file__).resolve().parent
WEIGHTS = {{
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "bf16-mixed": torch.float32,
    "fp16-mixed": torch.float32,
}}
AUTOCAST = {{"bf16-mixed": "bf16", "fp16-mixed": "fp16"}}
KERNELS = {{
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}}


def main():
    given = arguments()
    settings = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))
    torch.manual_seed(settings["seed"])
    {accelerator}
    name = given.model or settings["model"]
    model = loaded(name, settings){to_device}
{changed_loss}    if settings["activation_checkpointing"]:
        checkpointed(model, settings)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    model = attached(model, settings)
{kernels}    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    planned = settings["planned"]
    {say}(f"trained parameters: {{sum(p.numel() for p in trained):,}}", end="")
    {say}(f", planned {{planned['trainable_parameters']:,}}" if planned["trainable_parameters"] else "")
    optimizer = optimizer_for(settings, model, trained)
    model, optimizer = accelerator.prepare(model, optimizer)
{prepared}    data = batches(settings, vocabulary, given.data, name)
    for step in range(1, given.steps + 1):
        loss = one_step(accelerator, model, optimizer, trained, data, settings)
        {say}(f"step {{step}}: loss {{loss:.4f}}", flush=True)
    if accelerator.device.type == "cuda":
        {say}(f"peak allocated: {{torch.cuda.max_memory_allocated() / 2**30:.2f}} GiB", end="")
        expected = planned["peak_allocated_bytes"]
        {say}(f", planned {{expected / 2**30:.2f}} GiB" if expected else "")
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        save({saved}, given.out)
        {say}(f"saved to {{given.out}}")
{ended}

def arguments():
    parser = argparse.ArgumentParser(description="Fine-tune as planned in settings.json.")
    parser.add_argument("--model", help="another hub id, or a folder; random weights of a config.json alone")
    parser.add_argument("--data", type=Path, help="a text file to train on (default: random tokens)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: 10)")
    parser.add_argument("--out", type=Path, help="folder for what was trained (default: nothing is saved)")
    return parser.parse_args()


def checkpointed(model, settings):
    """Layers that are computed again in the backward pass; their inputs may wait on the host."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    offload = settings["checkpoint_offload"] and torch.cuda.is_available()  # pinned memory needs a GPU
    enable({{"use_reentrant": False}}, every_n_layers=settings["checkpoint_every"], offload=offload)


def loaded(name, settings):
    """The pretrained model of an id or folder; random weights where a folder has a config.json alone."""
    folder = folder_of(name)
    config = AutoConfig.from_pretrained(folder or name, trust_remote_code=False)
    config.use_cache = False
{config}    options = {{"config": config, "trust_remote_code": False}}
    options["dtype"] = {dtype}
    if settings["attention"] == "eager":
        options["attn_implementation"] = "eager"
{varlen}{random}    return {auto_class}.from_pretrained(folder or name, **options)


def folder_of(name):
    """The folder that a name means, here or beside this file; None for an id of the hub."""
    return next((path for path in (Path(name), HERE / name) if path.is_dir()), None)
'''

_RANDOM = """\
    if folder and not any((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        return {auto_class}.from_config(**options)
"""

_RANDOM_QUANTIZED = """\
    quantized = {{"quantization_config": quantization(settings), "device_map": {{"": PartialState().device}}}}
    if folder and not any((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        with tempfile.TemporaryDirectory() as saved:  # weights are quantized as they are read
            {auto_class}.from_config(**options).save_pretrained(saved)
            return {auto_class}.from_pretrained(saved, **options, **quantized)
    options |= quantized
"""

_WEIGHT_DTYPE = '''

def weight_dtype(settings):
    """The type in which the weights are read, and bitsandbytes computes: 16 bits, autocast or not."""
    return WEIGHTS[AUTOCAST.get(settings["precision"], settings["precision"])]
'''

_STEP = '''

def optimizer_for(settings, model, trained):
    """The planned optimizer over the trained parameters."""
    name, rate = settings["optimizer"], settings["learning_rate"]
{bitsandbytes}    if name == "adafactor":
        return transformers.Adafactor(trained, lr=rate, scale_parameter=False, relative_step=False)
    if name in ("sgd", "sgd-momentum"):
        return torch.optim.SGD(trained, lr=rate, momentum=0.9 if name == "sgd-momentum" else 0.0)
    foreach = False if name == "adamw-single" else None
    fused = {"adamw-fused": True, "adamw-single": False}.get(name)
    return torch.optim.AdamW(trained, lr=rate, foreach=foreach, fused=fused)


{one_step}

@contextlib.contextmanager
def attention(kind, device):
    """Pin torch's attention to one kernel on CUDA; `sdpa` and `eager` leave the choice alone."""
    if kind not in KERNELS or device != "cuda":
        yield
        return
    grouped = sdpa_attention.use_gqa_in_sdpa
    if kind == "efficient":  # it takes no grouped heads: keys and values are repeated to all heads
        sdpa_attention.use_gqa_in_sdpa = lambda *_args, **_kwargs: False
    try:
        with sdpa_kernel(KERNELS[kind]):
            yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = grouped


{batches}'''

_ALONE = {
    "accelerator": 'accelerator = Accelerator(mixed_precision=AUTOCAST.get(settings["precision"], "no"))',
    "to_device": ".to(accelerator.device)",
    "prepared": "",
    "say": "print",
    "saved": "accelerator.unwrap_model(model)",
    "dataclasses": "",
    "ended": "",
    "fsdp": "",
}

_FROM_BITSANDBYTES = '''\
    kinds = {
        "adamw-8bit": bitsandbytes.optim.AdamW8bit,
        "paged-adamw-8bit": bitsandbytes.optim.PagedAdamW8bit,
        "paged-adamw-32bit": bitsandbytes.optim.PagedAdamW32bit,
        "lion-8bit": bitsandbytes.optim.Lion8bit,
        "lion-32bit": bitsandbytes.optim.Lion32bit,
        "paged-lion-8bit": bitsandbytes.optim.PagedLion8bit,
        "paged-lion-32bit": bitsandbytes.optim.PagedLion32bit,
    }
    if name.endswith("-8bit"):
        overrides = bitsandbytes.optim.GlobalOptimManager.get_instance()
        for module in model.modules():  # states of embeddings stay in fp32, as in HF Trainer
            if isinstance(module, torch.nn.Embedding):
                overrides.register_module_override(module, "weight", {"optim_bits": 32})
    if name in kinds:
        return kinds[name](trained, lr=rate)
'''

_EXAMPLES: dict[Task, str] = {
    "causal-lm": '''

def example(ids, tokenizer):
    """Every token is asked for."""
    return {"input_ids": ids, "labels": ids.clone()}
''',
    "masked-lm": '''

def example(ids, tokenizer):
    """15 % of the tokens are masked, and only they are asked for."""
    masked = torch.rand(ids.shape) < 0.15
    labels = ids.masked_fill(~masked, -100)
    return {"input_ids": ids.masked_fill(masked, tokenizer.mask_token_id), "labels": labels}
''',
    "seq2seq-lm": '''

def example(ids, tokenizer):
    """The target is a copy of the input: put your own pairs here."""
    return {"input_ids": ids, "labels": ids.clone()}
''',
}

_DECODER_START = """\
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.pad_token_id or 0
"""

_END = """

if __name__ == "__main__":
    main()
"""


def script(setup: Setup) -> str:
    """train.py for method, task and kind of optimizer of a setup; its values stand in settings.json."""
    shared, chunked = setup.sharding.is_distributed, setup.training.loss == "chunked"
    lengths = takes_lengths(setup.training)
    task, borrowed = setup.model.task, setup.training.optimizer in FROM_BITSANDBYTES
    piece = PIECES[piece_name(setup.method)]
    quantized, lines = piece.quantized, shared_lines(setup) if shared else _ALONE
    head = _HEAD.format(
        auto_class=_AUTO_CLASSES[task],
        standard="".join(f"import {name}\n" for name in piece.standard),
        bitsandbytes="import bitsandbytes\n" if borrowed else "",
        peft="import peft\n" if piece.peft else "",
        safetensors="" if piece.whole else "from safetensors.torch import save_file\n",
        nn="from torch import nn\n" if piece.modules else "",
        config=_DECODER_START if task == "seq2seq-lm" else "",
        random=(_RANDOM_QUANTIZED if quantized else _RANDOM).format(auto_class=_AUTO_CLASSES[task]),
        dtype="weight_dtype(settings)" if quantized else 'WEIGHTS[settings["precision"]]',
        partial=", PartialState" if quantized else "",
        quantization=", BitsAndBytesConfig" if quantized else "",
        inspect="import inspect\n" if setup.training.loop == "trainer" else "",
        types="import types\n" if chunked else "",
        checkpoint="from torch.utils.checkpoint import checkpoint\n" if chunked else "",
        outputs="from transformers.modeling_outputs import CausalLMOutput\n" if chunked else "",
        changed_loss=loss_line(setup.training),
        kernels=kernels_line(setup.training),
        send="from accelerate.utils import send_to_device\n" if lengths else "",
        varlen=varlen_line(setup.training),
        **({**lines, "to_device": ""} if quantized else lines),
    )
    step = _STEP.replace("{bitsandbytes}", _FROM_BITSANDBYTES if borrowed else "")
    own = SHARED_STEP if shared else one_step(setup.training)
    step = step.replace("{one_step}", sent(own, setup.training))
    step = step.replace("{batches}", batches(setup.training))
    save = shared_save(piece) if shared else piece.save
    loss = functions(setup.training)
    dtype = _WEIGHT_DTYPE if quantized else ""
    packed = setup.training.batching == "packed"
    example = "" if packed else _EXAMPLES[task]
    return head + dtype + loss + piece.attached + step + example + save + varlen(setup.training) + _END
