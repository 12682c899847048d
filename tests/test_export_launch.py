"""Launching a shared run: accelerate's own parser takes the files, and two CPU processes run the script."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from planner.catalog.resolve import resolve
from planner.cli.export import write
from planner.export import DEEPSPEED, exported
from planner.export.launch import ACCELERATE_FILE
from planner.spec import Adapter, LoRA, Setup, Sharding, Training

SMALL = {
    "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 96, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "ddp": {"num_gpus": 4},
    "fsdp": {"num_gpus": 8},
    "fsdp-grad-op": {"num_gpus": 16},
    "hsdp": {"num_gpus": 16},
    "zero1": {"num_gpus": 8},
    "zero2": {"num_gpus": 16, "cpu_offload": "optimizer"},
    "zero3": {"num_gpus": 8, "cpu_offload": "parameters"},
}
# accelerate takes FSDP on accelerators only; torch runs it on CPU processes as well
ON_CPU = """
import os, runpy, sys
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
rank = f"rank {dist.get_rank()} of {dist.get_world_size()}"
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
print(f"{rank}: {AcceleratorState().distributed_type.value}", flush=True)
os._exit(0)  # gloo's threads may outlive the interpreter and abort it
"""


def planned(kind: str, method: Any = None, training: dict[str, Any] | None = None, **keys: Any) -> Setup:
    return Setup(
        model=resolve("a qwen2", config_text=json.dumps(SMALL)),
        method=method,
        training=Training(**{"seq_len": 8, "precision": "bf16-mixed", **(training or {})}),
        sharding=Sharding(sharding=kind, **{**KINDS[kind], **keys}),  # type: ignore[arg-type]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    def made(setup: Setup) -> Path:
        write(exported(setup), tmp_path / "run", force=True)
        return tmp_path / "run"

    return made


def launch_arguments(path: Path, *words: str) -> Any:
    """What `accelerate launch` understands, by its own parser and checks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ("--config_file", str(path / ACCELERATE_FILE), *words, str(path / "train.py"))
    arguments = launch_command_parser().parse_args(list(words))
    return _validate_launch_command(arguments)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_takes_the_configuration(kind: str, folder: Any) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    setup = planned(kind)
    path = folder(setup)
    found = load_config_from_file(str(path / ACCELERATE_FILE))
    sharding = setup.sharding
    assert (found.num_processes, found.num_machines) == (sharding.num_gpus, sharding.nodes)
    assert found.mixed_precision == "bf16"
    arguments = launch_arguments(path)
    assert bool(arguments.use_fsdp) == sharding.is_fsdp
    assert bool(arguments.use_deepspeed) == (sharding.zero_stage > 0)
    if sharding.is_fsdp:
        assert str(arguments.fsdp_version) == "2"
        assert arguments.fsdp_transformer_layer_cls_to_wrap == "Qwen2DecoderLayer"
        reshards = str(arguments.fsdp_reshard_after_forward).lower() == "true"
        assert reshards == sharding.reshard_after_forward
    if sharding.zero_stage:
        assert arguments.zero_stage == sharding.zero_stage
        assert arguments.offload_param_device == ("cpu" if sharding.zero_stage == 3 else "none")
        assert DEEPSPEED in (path / "requirements.txt").read_text().splitlines()
    assert bool(arguments.use_parallelism_config) == (kind == "hsdp")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("zero")])
def test_torchrun_gets_the_environment_that_accelerate_would_export(kind: str, folder: Any) -> None:
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = folder(planned(kind))
    arguments = launch_arguments(path, "--main_process_port", "0")
    theirs = prepare_multi_gpu_env(arguments)
    lines = (path / "torchrun.sh").read_text().splitlines()
    ours = dict(line.removeprefix("export ").split("=") for line in lines if line.startswith("export "))
    assert ours["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for name, value in ours.items():
        assert theirs[name] == value, name
    assert ("ACCELERATE_USE_FSDP" in ours) == (kind != "ddp")


@pytest.mark.parametrize("kind", KINDS)
def test_shells_read_the_commands(kind: str, folder: Any) -> None:
    path = folder(planned(kind))
    names = {file.name for file in path.glob("*.sh*")} | {"slurm.sbatch"}
    assert ("torchrun.sh" in names) == (not kind.startswith("zero"))
    for name in names:
        subprocess.run(["bash", "-n", str(path / name)], check=True)
    sharding = planned(kind).sharding
    slurm = (path / "slurm.sbatch").read_text()
    assert f"#SBATCH --nodes={sharding.nodes}\n" in slurm
    assert f"#SBATCH --gpus-per-node={sharding.per_node}\n" in slurm


def test_one_gpu_has_no_launch_files() -> None:
    model = resolve("a qwen2", config_text=json.dumps(SMALL))
    alone = Setup(model=model, training=Training(seq_len=8))
    assert set(exported(alone)) == {
        "README.txt", "model/config.json", "requirements.txt", "settings.json", "train.py",
    }  # fmt: skip
    assert "num_gpus" not in json.loads(exported(alone)["settings.json"])


def launched(path: Path, script: str, *words: str) -> str:
    """What two CPU processes print that `accelerate launch` starts."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", ACCELERATE_FILE,
        "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0",
        script, "--model", "model", "--steps", "2", *words,
    ]  # fmt: skip
    values = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=path, env=values, start_new_session=True, **pipes) as launcher:
        try:
            output, errors = launcher.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)  # its ranks too, where they hang
    assert launcher.returncode == 0, errors[-3000:]
    return output


def test_two_cpu_processes_run_ddp(folder: Any) -> None:
    path = folder(planned("ddp", num_gpus=2, training={"precision": "fp32"}))
    printed = launched(path, "train.py")
    assert printed.count("trained parameters: ") == 1  # one rank speaks for all
    assert "step 2: loss " in printed


@pytest.mark.parametrize(
    ("method", "keys", "training", "saved"),
    [
        (None, {}, {"gradient_accumulation_steps": 2, "clip_grad_norm": 1.0}, "model.safetensors"),
        (LoRA(lora_rank=2), {"reduce_dtype": "fp32", "prefetch": 2}, {}, "adapter_model.safetensors"),
        (Adapter(adapter_size=4), {}, {"precision": "fp32"}, "trained.safetensors"),
    ],
)
def test_two_cpu_processes_run_fsdp2(
    method: Any, keys: dict[str, Any], training: dict[str, Any], saved: str, folder: Any
) -> None:
    from safetensors.torch import load_file

    setup = planned("fsdp", method, training, num_gpus=2, **keys)
    path = folder(setup)
    (path / "on_cpu.py").write_text(ON_CPU)
    printed = launched(path, "on_cpu.py", "--out", "saved")
    assert {"rank 0 of 2: FSDP", "rank 1 of 2: FSDP"} <= set(printed.splitlines())
    assert "step 2: loss " in printed
    planned_count = json.loads((path / "settings.json").read_text())["planned"]["trainable_parameters"]
    assert f"trained parameters: {planned_count:,}, planned {planned_count:,}" in printed
    tensors = load_file(path / "saved" / saved)
    tensors.pop("lm_head.weight", None)  # tied to the embeddings, and written out
    assert sum(tensor.numel() for tensor in tensors.values()) == planned_count
