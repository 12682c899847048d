"""The pieces of train.py that differ by method: how it is attached, and how what was trained is saved."""

from __future__ import annotations

from dataclasses import dataclass

from planner.methods import Method, PeftConfig

__all__ = ["PIECES", "Piece", "piece_name"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """`attached` and `save` are functions as text; the rest says what they import.

    `whole`: saved by `save_pretrained`, and not as the trained tensors alone. `modules`: defines some.
    `quantized`: the weights are quantized while they are loaded.
    """

    attached: str
    save: str
    peft: bool = False
    whole: bool = False
    modules: bool = False
    quantized: bool = False
    standard: tuple[str, ...] = ()


_SAVE_PRETRAINED = '''

def save(model, folder):
    """{what}"""
    model.save_pretrained(folder)
'''

_SAVE_TENSORS = '''

def save(model, folder):
    """The trained tensors alone, by name: `model.load_state_dict(load_file(...), strict=False)`."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, folder / "trained.safetensors")
'''

_FULL = '''

def attached(model, settings):
    """Full fine-tuning: every parameter is trained."""
    return model
'''

_LORA_CONFIG = """\
    config = peft.LoraConfig(
        r=settings["lora_rank"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules=settings["target_modules"],
        bias=settings["lora_bias"],
        task_type=settings["task_type"],
    )
"""

_LORA = '''

def attached(model, settings):
    """LoRA by peft: two small matrices in fp32 beside each target, everything else frozen."""
{lora_config}    return peft.get_peft_model(model, config)
'''.replace("{lora_config}", _LORA_CONFIG)

_QLORA = '''

def quantization(settings):
    """How bitsandbytes holds the linear layers; it computes in the planned 16-bit type."""
    if settings["quantization"] == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=weight_dtype(settings),
        bnb_4bit_use_double_quant=settings["quantization"] == "nf4-double",
    )


def attached(model, settings):
    """QLoRA by peft: what is not quantized in fp32, two small matrices beside each target."""
    prepared = peft.prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=settings["activation_checkpointing"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    if settings["activation_checkpointing"]:
        checkpointed(model, settings)
{lora_config}    return peft.get_peft_model(prepared, config)
'''.replace("{lora_config}", _LORA_CONFIG)

_PEFT_CONFIG = '''

def attached(model, settings):
    """peft's method of the given adapter_config.json."""
    return peft.get_peft_model(model, peft.get_peft_config(dict(settings["peft_config"])))
'''

_ADAPTER = '''

class BottleneckAdapter(nn.Module):
    """x + up(relu(down(x))), in fp32 over a 16-bit model; starts as the identity (Houlsby et al. 2019)."""

    def __init__(self, width, size, device, dtype):
        super().__init__()
        self.down = nn.Linear(width, size, device=device, dtype=dtype)
        self.up = nn.Linear(size, width, device=device, dtype=dtype)
        nn.init.trunc_normal_(self.down.weight, std=1e-2, a=-2e-2, b=2e-2)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        adapted = x + self.up(nn.functional.relu(self.down(x.to(self.down.weight.dtype))))
        return adapted.to(x.dtype)


def adapt(module, _inputs, output):
    """Forward hook: the adapter after the module's output, after the first of several."""
    if isinstance(output, tuple):
        return (module.adapter(output[0]), *output[1:])
    return module.adapter(output)


def attached(model, settings):
    """Bottleneck adapters after the planned modules, everything else frozen."""
    model.requires_grad_(False)
    patterns = [p.replace(".", r"\\.").replace("*", r"\\d+") for p in settings["adapter_modules"]]
    targets = [m for name, m in model.named_modules() if any(re.fullmatch(p, name) for p in patterns)]
    hidden = model.config.get_text_config(decoder=True).hidden_size
    for module in targets:
        weight = next(module.parameters())
        width = getattr(module, "out_features", None) or getattr(module, "nf", None) or hidden
        dtype = torch.promote_types(weight.dtype, torch.float32)
        module.adapter = BottleneckAdapter(width, settings["adapter_size"], weight.device, dtype)
        module.register_forward_hook(adapt)
    return model
'''

_BITFIT = '''

def attached(model, settings):
    """BitFit: the bias terms are trained, everything else is frozen (Ben Zaken et al. 2021)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] == "bias")
    return model
'''

_SAVE_PEFT = _SAVE_PRETRAINED.format(what="The adapter: `peft.PeftModel.from_pretrained(model, folder)`.")

PIECES: dict[str, Piece] = {
    "full": Piece(attached=_FULL, save=_SAVE_PRETRAINED.format(what="The whole model."), whole=True),
    "lora": Piece(attached=_LORA, save=_SAVE_PEFT, peft=True, whole=True),
    "qlora": Piece(
        attached=_QLORA, save=_SAVE_PEFT, peft=True, whole=True, quantized=True, standard=("tempfile",)
    ),
    "peft-config": Piece(attached=_PEFT_CONFIG, save=_SAVE_PEFT, peft=True, whole=True),
    "adapter": Piece(attached=_ADAPTER, save=_SAVE_TENSORS, modules=True, standard=("re",)),
    "bitfit": Piece(attached=_BITFIT, save=_SAVE_TENSORS),
}
"""Method -> its piece; `peft-config` is a method of the peft library's own configuration."""


def piece_name(method: Method) -> str:
    """The key of a method in PIECES, which may have none."""
    return "peft-config" if isinstance(method, PeftConfig) else method.name
