"""peft's initialisations that ask for the values of weights, on `meta`: they leave what they leave on CUDA.

Each form stands for a function of peft 0.20 and 0.21 and keeps its tensors: their shapes, types and how
long they live. What solvers (cuSOLVER, cuBLAS) take for themselves meanwhile is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["INITS"]

Function = Callable[..., Any]


def _assigned(original: Function) -> Function:
    """`lora_A.weight.data = ...`: where the weight was made on the host, `meta` takes no other's data."""

    def init(layer: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if layer.get_base_layer().weight.device.type == "meta":
            for linears in (layer.lora_A, layer.lora_B):
                if adapter_name in linears:
                    linears[adapter_name].weight = _without_values(linears[adapter_name].weight)
        original(layer, adapter_name, *args, **kwargs)

    return init


def _without_values(weight: torch.Tensor) -> nn.Parameter:
    """A parameter of the same shape on `meta` that takes nothing: the host's, before it is replaced."""
    with _disable_current_modes():
        return nn.Parameter(torch.empty_like(weight, device="meta"))


def _corda(original: Function) -> Function:
    """LoraLayer.corda_init after `preprocess_corda`: its three factors lie at the layer, in fp32."""
    assigned = _assigned(original)

    def init(layer: Any, adapter_name: str, *args: Any) -> None:
        linear = layer.get_base_layer()
        if linear.weight.device.type == "meta":
            rank = layer.r[adapter_name]
            linear.eigens = SimpleNamespace(
                U_WC=torch.empty(layer.out_features, rank, device="meta"),
                S_WC=torch.empty(rank, device="meta"),
                V_WC=torch.empty(layer.in_features, rank, device="meta"),
            )
        assigned(layer, adapter_name, *args)

    return init


def _lora_ga(original: Function) -> Function:
    """LoraLayer.lora_ga_init after `preprocess_loraga`: the weight's gradient lies at the layer."""
    assigned = _assigned(original)

    def init(layer: Any, adapter_name: str, *args: Any) -> None:
        linear = layer.get_base_layer()
        if linear.weight.device.type == "meta":
            linear._peft_loraga_grad = torch.empty_like(linear.weight)
        assigned(layer, adapter_name, *args)

    return init


def _mica(original: Function) -> Function:
    """LoraLayer.mica_init: skipped on `meta`; B becomes the last left singular vectors, A zeros."""

    def init(layer: Any, adapter_name: str) -> None:
        weight = layer.get_base_layer().weight
        if weight.device.type != "meta":
            original(layer, adapter_name)
            return
        rank, matrix = layer.r[adapter_name], weight.to(torch.float32)
        matrix = matrix.T if layer.fan_in_fan_out else matrix
        if rank > min(matrix.shape):
            raise ValueError(f"MiCA needs r of at most {min(matrix.shape)} here, got {rank}")
        left, _, _ = torch.linalg.svd(matrix, full_matrices=False)
        last = left[:, -rank:].contiguous()
        first = torch.zeros(rank, matrix.shape[1], device=weight.device)
        layer.lora_B[adapter_name].weight = nn.Parameter(last.to(weight.dtype))
        layer.lora_A[adapter_name].weight = nn.Parameter(first.to(weight.dtype))

    return init


def _kasa(original: Function) -> Function:
    """KasaLinearVariant.init: deferred on `meta`; the diagonal is made and the weight truncated at once."""

    def init(module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        original(module, adapter_name, config=config, **kwargs)
        deferred: set[str] = getattr(module, "_lora_kasa_truncation_deferred", set())
        weight = module.get_base_layer().weight
        if adapter_name in deferred and weight.device.type == "meta":
            from peft.tuners.lora.variants import KasaLinearVariant

            deferred.discard(adapter_name)
            KasaLinearVariant._truncate_base_weight(module, module.r[adapter_name])

    return init


def _monteclora(original: Function) -> Function:
    """MontecloraLinearVariant.init: the sampler waits for a real device on `meta`; it is made at once."""

    def init(module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        original(module, adapter_name, config=config, **kwargs)
        if adapter_name not in module.lora_monteclora_sampler:
            from peft.tuners.lora.variants import MontecloraLinearVariant

            sampler = MontecloraLinearVariant._create_sampler(module, adapter_name, config.monteclora_config)
            module.lora_monteclora_sampler[adapter_name] = sampler

    return init


def _loftq(original: Function) -> Function:
    """loftq_utils.loftq_init: the weight quantized and dequantized again, and the residual's two factors."""

    def init(weight: torch.Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> Any:
        if weight.device.type != "meta":
            return original(weight, num_bits, reduced_rank, num_iter=num_iter)
        wide = weight.to(torch.float32)
        for _ in range(num_iter):
            dequantized = torch.empty_like(wide)
            left, values, right = torch.linalg.svd(wide - dequantized, full_matrices=False)
            root = torch.sqrt(torch.diag(values)[:, :reduced_rank])
            factor_b, factor_a = left @ root, root.T @ right
        return dequantized.to(weight.dtype), factor_a, factor_b

    return init


def _adamss(original: Function) -> Function:
    """adamss.layer.clustering_Z: rows in clusters of one size (k-means' sizes depend on the weights)."""

    def clusters(rows: torch.Tensor, num_subspaces: int, iternum: int) -> Any:
        if rows.device.type != "meta":
            return original(rows, num_subspaces, iternum)
        count = min(num_subspaces, rows.shape[0])
        return torch.arange(rows.shape[0], device="cpu") * count // rows.shape[0], count

    return clusters


def _boft(original: Function) -> Function:
    """BOFTLayer.update_layer: its permutation stays in the host's memory; here it takes none of it."""

    def update(layer: Any, *args: Any, **kwargs: Any) -> None:
        original(layer, *args, **kwargs)
        if layer.get_base_layer().weight.device.type == "meta":
            layer.boft_P = torch.zeros(1, device="cpu").expand(layer.boft_P.shape)

    return update


def _boft_order(original: Function) -> Function:
    """BOFTLayer.block_butterfly_perm: which row goes where is nothing that memory depends on."""

    def order(layer: Any, n: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        if layer.get_base_layer().weight.device.type != "meta":
            return original(layer, n, *args, **kwargs)  # type: ignore[no-any-return]
        return torch.arange(n, device="cpu")

    return order


def _boft_matrix(original: Function) -> Function:
    """BOFTLayer.perm2mat, which writes row by row."""

    def matrix(layer: Any, indices: torch.Tensor) -> torch.Tensor:
        if layer.get_base_layer().weight.device.type != "meta":
            return original(layer, indices)  # type: ignore[no-any-return]
        return torch.zeros(1, device="cpu").expand(len(indices), len(indices))

    return matrix


def _frod_projections(original: Function) -> Function:
    """FrodModel._init_frod_projections: from all weights, in the host's memory, for each kind of layer."""

    def init(tuner: Any, config: Any, adapter_name: str) -> None:
        from peft.tuners._buffer_dict import BufferDict
        from peft.tuners.frod.model import _category_from_key
        from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

        if next(tuner.model.parameters()).device.type != "meta":
            original(tuner, config, adapter_name)
            return
        wanted = tuner._prepare_adapter_config(config, tuner.get_model_config(tuner.model))
        wanted = _maybe_include_all_linear_layers(wanted, tuner.model)
        if not hasattr(tuner, "frod_V"):
            tuner.frod_V, tuner.frod_s_indices, tuner.frod_s_size = (nn.ModuleDict() for _ in range(3))
        for key, module in tuner.model.named_modules():
            category = _category_from_key(key)
            if category in tuner.frod_V or not tuner._check_target_module_exists(wanted, key):
                continue
            weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
            width = weight.shape[1]
            chosen = min(int(width * width * config.sparse_rate), width * (width - 1))
            sizes = {
                "frod_V": torch.empty(width, width, dtype=weight.dtype, device="cpu"),
                "frod_s_indices": torch.empty(2, chosen, dtype=torch.int64, device="cpu"),
                "frod_s_size": torch.tensor([width, width]),
            }
            for name, tensor in sizes.items():
                getattr(tuner, name)[category] = BufferDict({}, persistent=config.save_projection)
                getattr(tuner, name)[category][adapter_name] = tensor

    return init


def _frod_factors(original: Function) -> Function:
    """FrodLayer._calculate_frod_u_and_lambda, solved in the host's memory: a matrix and its row of norms."""

    def factors(layer: Any, projection: torch.Tensor, weight: torch.Tensor) -> Any:
        if weight.device.type != "meta":
            return original(layer, projection, weight)
        rows, columns = weight.shape
        return torch.empty(rows, columns, device="cpu"), torch.empty(columns, device="cpu")

    return factors


def _frod_tensors(original: Function) -> Function:
    """frod.layer.Linear._get_frod_tensors reads the size of a matrix from the device."""

    def tensors(layer: Any, adapter: str, **kwargs: Any) -> Any:
        if layer.frod_s_size[adapter].device.type == "meta":
            width = layer.in_features
            object.__setattr__(layer, "frod_s_size", {adapter: torch.tensor([width, width])})
        return original(layer, adapter, **kwargs)

    return tensors


_LORA = "peft.tuners.lora.layer:LoraLayer"
INITS: dict[str, Callable[[Function], Function]] = {
    f"{_LORA}.pissa_init": _assigned,
    f"{_LORA}.olora_init": _assigned,
    f"{_LORA}.corda_init": _corda,
    f"{_LORA}.lora_ga_init": _lora_ga,
    f"{_LORA}.loftq_init": _assigned,
    f"{_LORA}.mica_init": _mica,
    "peft.tuners.lora.layer:loftq_init": _loftq,
    "peft.tuners.lora.variants:KasaLinearVariant.init": _kasa,
    "peft.tuners.lora.variants:MontecloraLinearVariant.init": _monteclora,
    "peft.tuners.adamss.layer:clustering_Z": _adamss,
    "peft.tuners.boft.layer:BOFTLayer.update_layer": _boft,
    "peft.tuners.boft.layer:BOFTLayer.block_butterfly_perm": _boft_order,
    "peft.tuners.boft.layer:BOFTLayer.perm2mat": _boft_matrix,
    "peft.tuners.frod.model:FrodModel._init_frod_projections": _frod_projections,
    "peft.tuners.frod.layer:FrodLayer._calculate_frod_u_and_lambda": _frod_factors,
    "peft.tuners.frod.layer:Linear._get_frod_tensors": _frod_tensors,
}
