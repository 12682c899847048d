"""Every parameter of a transformers model, found by building its class on the `meta` device.

Run as a process: `python -m planner.training.inventory` reads {"config": ..., "task": ...} from standard
input and prints one JSON object, {"tensors": [...], ...} or {"error": "..."}. Never runs remote code,
never asks the network, holds no weights. `planner.catalog.inventory` starts it and keeps the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections import defaultdict
from typing import Any, get_args

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from planner.model import Kind, Role, Task
from planner.training.built_attention import asked_for, built_attention

__all__ = ["class_for", "config_of", "inventory", "tensors_of"]

_TASK_MAPPINGS: tuple[tuple[Task, str], ...] = (
    ("seq2seq-lm", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ("masked-lm", "MODEL_FOR_MASKED_LM_MAPPING"),
    ("causal-lm", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("causal-lm", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    ("seq2seq-lm", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING"),
)
# How a checkpoint was stored or run last time; the planner counts the unquantized class.
_NOT_ARCHITECTURE = ("auto_map", "quantization_config", "_attn_implementation", "attn_implementation")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # a part of the name that is a number
_POSITION = re.compile(r"wpe|position|relative_attention_bias|pos_emb|rel_attn_bias")
_MLP = re.compile(
    r"(^|[._])(mlp|ffn?|feed_forward|fc\d|fc_in|fc_out|intermediate|wi|wi_\d|wo)([._]|$)|\.output\.dense"
)
_ATTENTION = re.compile(r"att(n|ention)")
_PROJECTION = re.compile(r"(^|\.)(q|k|v|o|qkv|out|query|key|value)_?(proj)?(\.|$)")
_MOST_BYTES = 4 << 30  # private memory of the process; torch and a large model on `meta` take some 0.6 GB


class Unbuildable(Exception):
    """Why no model can be built; the message ends a sentence that starts with the model's id."""


def inventory(config: dict[str, Any], task: Task | None = None) -> dict[str, Any]:
    """The tensors of the class that `config` and `task` choose, as `planner.catalog.inventory` reads them."""
    built_config = config_of(config)
    cls, found_task = class_for(built_config, config.get("architectures"), task)
    if cls.config_class is type(built_config).sub_configs.get("text_config"):  # as AutoModel.from_config does
        built_config = built_config.get_text_config()
    with torch.device("meta"):
        model = cls._from_config(built_config, attn_implementation="eager")
    text_config = built_config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    return {
        "task": found_task,
        "class": cls.__name__,
        "max_positions": positions if isinstance(positions, int) and positions > 0 else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tensors": tensors_of(model),
        "attention": built_attention(model, text_config),
    }


def config_of(config: dict[str, Any]) -> Any:
    """transformers' configuration object. Raises Unbuildable."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        if config.get("auto_map"):
            raise Unbuildable(
                f"its architecture {model_type!r} runs code from the hub (auto_map in config.json), and the "
                "planner never runs remote code; choose a model that transformers itself provides."
            )
        raise Unbuildable(
            f"transformers {transformers.__version__} has no model_type {model_type!r}; install a version "
            "that has it, or choose another model."
        )
    values = {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}
    return CONFIG_MAPPING[model_type].from_dict(values)


def class_for(config: Any, architectures: Any, task: Task | None) -> tuple[Any, Task]:
    """The language model class and its task: as asked, as `architectures` says, or as transformers maps."""
    choices: list[tuple[Task, Any]] = []
    for choice, mapping_name in _TASK_MAPPINGS:
        found = getattr(modeling_auto, mapping_name).get(type(config), ())
        choices += [(choice, cls) for cls in (found if isinstance(found, (list, tuple)) else (found,))]
    if task is not None:
        choices = [choice for choice in choices if choice[0] == task]
    if not choices:
        wanted = f"for {task}" if task else f"({', '.join(get_args(Task))})"
        raise Unbuildable(f"transformers has no {config.model_type} language model {wanted}.")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    for choice, cls in choices:
        if cls.__name__ == named:
            return cls, choice
    if not getattr(config, "is_encoder_decoder", False):
        choices.sort(key=lambda choice: choice[0] == "seq2seq-lm")
    return choices[0][1], choices[0][0]


def tensors_of(model: nn.Module) -> list[dict[str, Any]]:
    """Every parameter, equal ones of several layers folded into one entry with `*` for the index."""
    modules = dict(model.named_modules())
    ends = _embeddings_and_heads(model)
    first_names: dict[int, str] = {}
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        source = first_names.setdefault(id(parameter), name)
        folded, layer = _folded(name)
        holder = modules[name.rpartition(".")[0]]
        kind = _kind(holder, name.rpartition(".")[2])
        role = ends.get(id(holder)) or _role(name, kind)
        tied_to = None if source == name else _folded(source)[0] if _folded(source)[1] == layer else source
        groups[folded, tuple(parameter.shape), role, kind, tied_to].extend([] if layer is None else [layer])
    return [
        {"name": name, "shape": shape, "role": role, "kind": kind, "layers": sorted(layers), "tied_to": tied}
        for (name, shape, role, kind, tied), layers in groups.items()
    ]


def _folded(name: str) -> tuple[str, int | None]:
    """The name with `*` for its first index, and that index: model.layers.3.mlp -> model.layers.*.mlp, 3."""
    found = _INDEX.search(name)
    if not found:
        return name, None
    return f"{name[: found.start()]}*{name[found.end() :]}", int(found[0])


def _embeddings_and_heads(model: Any) -> dict[int, Role]:
    """The modules that transformers itself names as the input embedding and the head, by identity."""
    roles: dict[int, Role] = {}
    for accessor, role in (("get_output_embeddings", "head"), ("get_input_embeddings", "embedding")):
        module = asked_for(model, accessor)
        if module is not None:
            roles[id(module)] = role  # type: ignore[assignment]
    return roles


def _kind(module: nn.Module, leaf: str) -> Kind:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    is_norm = "norm" in type(module).__name__.casefold() and leaf in ("weight", "bias")
    return "norm" if is_norm else "parameter"


def _role(name: str, kind: Kind) -> Role:
    """What a tensor is for, by its name: a display matter, no number depends on it."""
    module = name.rpartition(".")[0].casefold()
    parts = module.split(".")
    if kind == "norm":
        return "norm"
    if _POSITION.search(module):
        return "position"
    if kind == "embedding":
        return "embedding"
    if parts[0] in ("lm_head", "cls", "embed_out", "output_projection", "vocab_head"):
        return "head"
    if parts[-1] in ("gate", "router") or "router" in parts[-2:]:
        return "router"
    if any("expert" in part and "shared" not in part for part in parts):
        return "experts"
    if any("shared_expert" in part for part in parts):
        return "mlp"
    if _ATTENTION.search(module):
        return "attention"
    if _MLP.search(module) or "dense_h_to_4h" in module or "dense_4h_to_h" in module:
        return "mlp"
    return "attention" if _PROJECTION.search(module) else "other"


def _one_line(error: BaseException) -> str:
    """The start of an error's message in one line, without local paths."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"(?<![\w:/.])/(?:[\w.+@-]+/)+[\w.+@-]*", "<path>", text)
    return text if len(text) <= 240 else text[:237] + "..."


def _limit_memory() -> None:
    """An absurd config ends in a MemoryError here, not in the machine's swap (where the system can)."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_BYTES, _MOST_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Read the request, print the answer; nothing else reaches standard output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _limit_memory()
    try:
        request = json.load(sys.stdin)
        answer = inventory(request["config"], request.get("task"))
    except Unbuildable as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "building it takes too much memory; its config.json asks for an impossible model."}
    except Exception as error:  # whatever transformers raises for this config is the answer
        said = f"{type(error).__name__}: {_one_line(error)}"
        answer = {"error": f"transformers {transformers.__version__} cannot build it: {said}"}
    with answers:
        json.dump(answer, answers)


if __name__ == "__main__":
    main()
