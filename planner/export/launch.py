"""Launching a shared run: accelerate's own configuration, and commands for accelerate, torchrun and SLURM.

Keys and environment as accelerate 1.15 reads them (commands/config/config_args.py, utils/launch.py); its own
parser reads the file in a test, and two CPU processes run it.
"""

from __future__ import annotations

from typing import Any

from planner.sharding import Sharding
from planner.spec import Setup

__all__ = ["ACCELERATE_FILE", "launch_files", "launch_lines"]

ACCELERATE_FILE = "accelerate.yaml"
_MIXED = {"bf16-mixed": "bf16", "fp16-mixed": "fp16"}
_PORT = 29500  # accelerate's and torchrun's own default


def launch_files(setup: Setup) -> dict[str, str]:
    """File name -> text: accelerate.yaml, launch.sh, torchrun.sh (none for DeepSpeed) and slurm.sbatch."""
    files = {
        ACCELERATE_FILE: "\n".join(_yaml(_configuration(setup))) + "\n",
        "launch.sh": _accelerate(setup.sharding),
        "slurm.sbatch": _slurm(setup.sharding),
    }
    if not setup.sharding.zero_stage:
        files["torchrun.sh"] = _torchrun(setup)
    return files


def launch_lines(setup: Setup) -> str:
    """What README.txt says of them."""
    sharding = setup.sharding
    each = "" if sharding.nodes == 1 else f" of {sharding.nodes} machines, on each of them"
    lead = f"Launch it on {sharding.num_gpus} GPUs{each} ({sharding.sharding}):"
    return f"{lead}\n\n    sh launch.sh --steps 3\n"


def _configuration(setup: Setup) -> dict[str, Any]:
    """accelerate's configuration; true and false as YAML has them."""
    sharding = setup.sharding
    kind = "FSDP" if sharding.is_fsdp else "DEEPSPEED" if sharding.zero_stage else "MULTI_GPU"
    values: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": kind,
        "downcast_bf16": "'no'",
        "enable_cpu_affinity": False,
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": _MIXED.get(setup.training.precision, "'no'"),
        "num_machines": sharding.nodes,
        "num_processes": sharding.num_gpus,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": False,
    }
    if sharding.is_fsdp:
        values["fsdp_config"] = _fsdp(setup)
    if sharding.sharding == "hsdp":
        values["parallelism_config"] = {
            "parallelism_config_dp_replicate_size": sharding.nodes,
            "parallelism_config_dp_shard_size": sharding.per_node,
        }
    if sharding.zero_stage:
        values["deepspeed_config"] = _deepspeed(setup)
    return dict(sorted(values.items()))


def _fsdp(setup: Setup) -> dict[str, Any]:
    """FSDP2 by transformers' layer class. Checkpointing is the model's own, which train.py turns on."""
    sharding, shape = setup.sharding, setup.model.architecture
    unit = sharding.shard_unit or (shape.layer_class if shape else "")
    values: dict[str, Any] = {
        "fsdp_activation_checkpointing": False,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": sharding.cpu_offload == "parameters",
        "fsdp_reshard_after_forward": sharding.reshard_after_forward,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_version": 2,
    }
    if unit:
        values["fsdp_transformer_layer_cls_to_wrap"] = unit
    return dict(sorted(values.items()))


def _deepspeed(setup: Setup) -> dict[str, Any]:
    """DeepSpeed's stage and offload; everything else its defaults."""
    sharding, training = setup.sharding, setup.training
    values: dict[str, Any] = {
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "offload_optimizer_device": "none" if sharding.cpu_offload == "none" else "cpu",
        "offload_param_device": "cpu" if sharding.cpu_offload == "parameters" else "none",
        "zero3_init_flag": False,
        "zero3_save_16bit_model": sharding.zero_stage == 3,
        "zero_stage": sharding.zero_stage,
    }
    if training.clip_grad_norm is not None:
        values["gradient_clipping"] = training.clip_grad_norm
    if sharding.nodes > 1:
        values["deepspeed_multinode_launcher"] = "standard"
    return dict(sorted(values.items()))


def _yaml(values: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_yaml(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {str(value).lower() if isinstance(value, bool) else value}")
    return lines


def _accelerate(sharding: Sharding) -> str:
    several = ""
    if sharding.nodes > 1:
        several = (
            '\\\n    --machine_rank "${MACHINE_RANK:?0 on the first machine, then 1, 2, ...}" '
            f'\\\n    --main_process_ip "${{MAIN_IP:?address of the first machine}}" '
            f"\\\n    --main_process_port {_PORT} "
        )
    return (
        "#!/bin/sh\n"
        f"# {_whole(sharding)}\n"
        'cd "$(dirname "$0")" || exit 1\n'
        f'exec accelerate launch --config_file {ACCELERATE_FILE} {several}train.py "$@"\n'
    )


def _torchrun(setup: Setup) -> str:
    """torchrun does not read accelerate.yaml: what it says goes through the environment."""
    sharding = setup.sharding
    exports = "".join(f"export {name}={value}\n" for name, value in _environment(setup).items())
    rendezvous = "--standalone"
    if sharding.nodes > 1:
        rendezvous = (
            '--node-rank "${MACHINE_RANK:?0 on the first machine, then 1, 2, ...}" '
            f'\\\n    --master-addr "${{MAIN_IP:?address of the first machine}}" --master-port {_PORT}'
        )
    return (
        "#!/bin/sh\n"
        f"# {_whole(sharding)}\n"
        'cd "$(dirname "$0")" || exit 1\n'
        f"{exports}"
        f"exec torchrun --nnodes {sharding.nodes} --nproc-per-node {sharding.per_node} {rendezvous} "
        '\\\n    train.py "$@"\n'
    )


def _environment(setup: Setup) -> dict[str, str]:
    """What `accelerate launch` would export for this configuration, as train.py needs it."""
    found = {"ACCELERATE_MIXED_PRECISION": _MIXED.get(setup.training.precision, "no")}
    if not setup.sharding.is_fsdp:
        return found
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    found["ACCELERATE_USE_FSDP"] = "true"
    for key, value in _fsdp(setup).items():
        found[names.get(key, key.upper())] = str(value).lower() if isinstance(value, bool) else str(value)
    if setup.sharding.sharding == "hsdp":
        found["ACCELERATE_USE_PARALLELISM_CONFIG"] = "true"
        found["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] = str(setup.sharding.nodes)
        found["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(setup.sharding.per_node)
    return found


def _slurm(sharding: Sharding) -> str:
    return f"""\
#!/bin/bash
# {_whole(sharding)}
#SBATCH --job-name=vram-plan
#SBATCH --nodes={sharding.nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={sharding.per_node}
#SBATCH --exclusive
# account, partition and time are your cluster's: sbatch --account ... --partition ... --time ... slurm.sbatch
export MAIN_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export WORDS="$*"
srun bash -c 'accelerate launch --config_file {ACCELERATE_FILE} --machine_rank "$SLURM_NODEID" \\
    --main_process_ip "$MAIN_IP" --main_process_port {_PORT} train.py $WORDS'
"""


def _whole(sharding: Sharding) -> str:
    number = f"{sharding.per_node} GPUs" if sharding.per_node > 1 else "1 GPU"
    where = "one machine" if sharding.nodes == 1 else f"each of {sharding.nodes} machines"
    return f"{sharding.sharding} on {number} of {where}"
