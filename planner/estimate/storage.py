"""What a saved adapter takes on disk: the exact size of a safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

__all__ = ["SAFETENSORS_LENGTH_BYTES", "safetensors_bytes"]

SAFETENSORS_LENGTH_BYTES = 8  # the header's length as u64; safetensors README, "Format"
_HEADER_ALIGNMENT_BYTES = 8  # safetensors `tensor.rs`: the header is padded with spaces to 8 bytes

# safetensors' own names in the order in which it sorts tensors (`tensor.rs`, enum Dtype, widest
# first), with bytes an element. Only what a trained tensor can be.
_DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_DTYPE_OF_ITEMSIZE = {8: "F64", 4: "F32", 2: "BF16"}


def safetensors_bytes(
    shapes_by_name: Mapping[str, Sequence[int]],
    itemsize: int = 4,
    *,
    dtypes: Mapping[str, str] | None = None,
) -> int:
    """Bytes of the safetensors file that holds these tensors: length, JSON header, data.

    `itemsize` is bytes an element (8 is F64, 4 F32, 2 BF16); `dtypes` names the dtype of a tensor
    that differs (`{"a.bias": "F16"}`). Exact to the byte for files without `__metadata__`.
    Source: https://github.com/huggingface/safetensors, README "Format" and `tensor.rs`.
    """
    kinds = {name: (dtypes or {}).get(name, _DTYPE_OF_ITEMSIZE[itemsize]) for name in shapes_by_name}
    rank = {dtype: position for position, dtype in enumerate(_DTYPES)}
    header: dict[str, dict[str, object]] = {}
    data_bytes = 0
    for name in sorted(shapes_by_name, key=lambda name: (rank[kinds[name]], name)):
        shape = list(shapes_by_name[name])
        end_bytes = data_bytes + math.prod(shape) * _DTYPES[kinds[name]]
        header[name] = {"dtype": kinds[name], "shape": shape, "data_offsets": [data_bytes, end_bytes]}
        data_bytes = end_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    header_bytes = math.ceil(len(text) / _HEADER_ALIGNMENT_BYTES) * _HEADER_ALIGNMENT_BYTES
    return SAFETENSORS_LENGTH_BYTES + header_bytes + data_bytes
