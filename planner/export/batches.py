"""What train.py says for its batches: samples all of one length, padded to it, or packed into one row."""

from __future__ import annotations

from planner.batching import takes_lengths, unpads
from planner.spec import Training

__all__ = ["batches", "sent", "varlen", "varlen_line"]

_FULL = '''\
def batches(settings, vocabulary, data, name):
    """Endless micro batches of token ids [micro_batch_size, seq_len] and labels, without padding."""
    size, length = settings["micro_batch_size"], settings["seq_len"]
    if data is None:
        while True:
            ids = torch.randint(0, vocabulary, (size, length))
            yield {"input_ids": ids, "labels": ids.clone()}
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name) or name, trust_remote_code=False)
    transformers.logging.set_verbosity_error()  # the text is cut below, so its length is no matter
    ids = torch.tensor(tokenizer(data.read_text(encoding="utf-8"))["input_ids"])
    if len(ids) == 0:
        raise SystemExit(f"{data} holds no text.")
    samples = ids.repeat(-(-length // len(ids)))
    samples = samples[: len(samples) // length * length].view(-1, length)
    while True:
        for chosen in torch.randperm(len(samples)).repeat(-(-size // len(samples))).split(size):
            if len(chosen) == size:
                yield example(samples[chosen], tokenizer)
'''

_LINES = '''\
    tokenizer = AutoTokenizer.from_pretrained(folder_of(name) or name, trust_remote_code=False)
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    samples = [ids[:length] for ids in tokenizer(lines)["input_ids"] if ids] if lines else []
    if not samples:
        raise SystemExit(f"{data} holds no text.")
    while True:
        for chosen in torch.randperm(len(samples)).repeat(-(-size // len(samples))).split(size):
            if len(chosen) == size:
                yield {made}
'''

_PADDED = '''\
def batches(settings, vocabulary, data, name):
    """Endless micro batches [micro_batch_size, seq_len]; a line of the text is a sample, cut or padded."""
    size, length = settings["micro_batch_size"], settings["seq_len"]
    if data is None:
        shorter = {shorter}
        while True:
            yield padded([torch.randint(0, vocabulary, (n,)).tolist() for n in shorter], length)
{lines}

def padded(samples, length, tokenizer=None):
    """Samples padded on the right, as transformers' collators do: mask and labels leave the padding out."""
    fill = getattr(tokenizer, "pad_token_id", None) or 0
    ids = torch.tensor([sample + [fill] * (length - len(sample)) for sample in samples])
    mask = torch.tensor([[1] * len(sample) + [0] * (length - len(sample)) for sample in samples])
    batch = example(ids, tokenizer) if tokenizer else {"input_ids": ids, "labels": ids}
    return batch | {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
'''.replace("{lines}", _LINES.replace("{made}", "padded([samples[i] for i in chosen], length, tokenizer)"))

_PACKED = '''\
def batches(settings, vocabulary, data, name):
    """Endless rows of micro_batch_size samples one after the other; a line of the text is a sample, cut."""
    size, length = settings["micro_batch_size"], settings["seq_len"]
    packed = transformers.DataCollatorWithFlattening({lengths})
    if data is None:
        while True:
            yield packed([{"input_ids": ids} for ids in torch.randint(0, vocabulary, (size, length))])
{lines}'''.replace("{lines}", _LINES.replace("{made}", 'packed([{"input_ids": samples[i]} for i in chosen])'))

_SHORTER = "[length - length * (i + 1) // (2 * size) for i in range(size)]"
_SHORTER_BY_ONE = "[length] * (size - 1) + [length - 1]  # one token of padding: the most"

_VARLEN = '''

def varlen(module, query, key, value, mask, dropout=0.0, scaling=None, sliding_window=None, **lengths):
    """FlashAttention-2 over a packed row by torch's own kernels: `flash_attention_2` without its package."""
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
    rows = [t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for t in (query, key, value)]
    starts = [lengths[f"cu_seq_lens_{name}"] for name in "qk"]
    longest = [lengths[f"max_length_{name}"] for name in "qk"]
    left = sliding_window - 1 if sliding_window and len(rows[1]) > sliding_window else None
    out, *_ = torch.ops.aten._flash_attention_forward(
        *rows, *starts, *longest, dropout, True, False, scale=scaling, window_size_left=left
    )
    return out.unsqueeze(0), None


transformers.AttentionInterface.register("torch_varlen", varlen)
transformers.AttentionMaskInterface.register("torch_varlen", lambda **_: None)  # lengths say it all
'''

_UNPADDED = '''

def varlen(module, query, key, value, mask, dropout=0.0, scaling=None, sliding_window=None, **_):
    """FlashAttention-2 without padding, by torch's own kernels: `flash_attention_2` without its package."""
    if query.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
    rows = [t.transpose(1, 2) for t in (query, key, value)]
    size, length = rows[0].shape[:2]
    left = sliding_window - 1 if sliding_window and length > sliding_window else None
    mask = torch.ones((size, length), device=query.device) if mask is None else mask  # none is padding
    padding = transformers.modeling_flash_attention_utils
    *rows, places, starts, longest = padding._upad_input(*rows, mask, length, None)
    out, *_ = torch.ops.aten._flash_attention_forward(
        *rows, *starts, *longest, dropout, module.is_causal, False, scale=scaling, window_size_left=left
    )
    return padding._pad_input(out, places, size, length), None


transformers.AttentionInterface.register("torch_varlen", varlen)
transformers.AttentionMaskInterface.register("torch_varlen", transformers.masking_utils.flash_attention_mask)
'''

_VARLEN_LINE = """\
    if torch.cuda.is_available():
        options["attn_implementation"] = "torch_varlen"
"""
_MOVED = "{key: value.to(accelerator.device) for key, value in next(data).items()}"


def batches(training: Training) -> str:
    """The function that makes micro batches."""
    if training.batching == "packed":
        lengths = "return_flash_attn_kwargs=True" if takes_lengths(training) else ""
        return _PACKED.replace("{lengths}", lengths)
    if training.batching == "padded":
        return _PADDED.replace("{shorter}", _SHORTER_BY_ONE if unpads(training) else _SHORTER)
    return _FULL


def varlen(training: Training) -> str:
    """The attention that is told lengths or takes padding out, registered with transformers; else empty."""
    if unpads(training):
        return _UNPADDED
    return _VARLEN if takes_lengths(training) else ""


def varlen_line(training: Training) -> str:
    """The lines that choose flash attention by lengths, which is there on CUDA alone; else empty."""
    return _VARLEN_LINE if takes_lengths(training) or unpads(training) else ""


def sent(step: str, training: Training) -> str:
    """A step's text whose batches hold whole numbers beside tensors, where lengths are among them."""
    if not takes_lengths(training):
        return step
    return step.replace(_MOVED, "send_to_device(next(data), accelerator.device)")
