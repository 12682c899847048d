"""What the modules of a built model say of their attention."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["asked_for", "built_attention"]

# By transformers' names, the first that a module has: widths of queries and keys, and of values.
_QUERIES = ("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
_VALUES = ("v_head_dim",)
_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "dropout_rate")


def built_attention(model: Any, text_config: Any) -> dict[str, Any]:
    """The fields of `planner.model.AttentionShape`, read from the part of the model that takes text."""
    return {
        "fused": bool(type(model)._supports_sdpa),
        "head_dims": sorted(_head_dims(model)),
        "window": _window(text_config),
        "dropout": max((_number(text_config, name) for name in _DROPOUTS), default=0.0),
    }


def _head_dims(model: Any) -> set[tuple[int, int]]:
    modules = dict(model.named_modules())
    embedding = asked_for(model, "get_input_embeddings")
    place = next((name for name, module in modules.items() if module is embedding), "")
    while place:  # towers of images and sound lie beside the part that holds the embedding
        place = place.rpartition(".")[0]
        inside = f"{place}." if place else ""
        found = {pair for name, m in modules.items() if name.startswith(inside) and (pair := _pair(m))}
        if found:
            return found
    return {pair for module in modules.values() if (pair := _pair(module))}


def asked_for(model: Any, accessor: str) -> nn.Module | None:
    """The module that an accessor of transformers' names, None where a class has none."""
    try:
        module = getattr(model, accessor)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return module if isinstance(module, nn.Module) else None


def _pair(module: nn.Module) -> tuple[int, int] | None:
    if not hasattr(module, "is_causal") and "attention" not in type(module).__name__.casefold():
        return None
    queries = next((w for name in _QUERIES if isinstance(w := getattr(module, name, None), int)), None)
    values = next((w for name in _VALUES if isinstance(w := getattr(module, name, None), int)), queries)
    return None if queries is None or values is None else (queries, values)


def _window(text_config: Any) -> int | None:
    """The fewest tokens for which a layer masks more than the tokens to come."""
    kinds = _value(text_config, "layer_types")
    sliding, chunk = _value(text_config, "sliding_window"), _value(text_config, "attention_chunk_size")
    taken = []
    if isinstance(sliding, int) and (kinds is None or "sliding_attention" in kinds):
        taken.append(sliding)
    if isinstance(chunk, int) and (kinds is None or "chunked_attention" in kinds):
        taken.append(chunk)
    return min((window for window in taken if window > 0), default=None)


def _number(config: Any, name: str) -> float:
    value = _value(config, name)
    return float(value) if isinstance(value, (int, float)) else 0.0


def _value(config: Any, name: str) -> Any:
    """None too where layers differ: transformers refuses a single answer then."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None
