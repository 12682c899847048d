"""The exported files: they run, with exactly the planned model, method and settings."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator

from planner import catalog
from planner.catalog.resolve import resolve
from planner.cli.export import write
from planner.errors import PlannerError, SetupError
from planner.estimate.parameters import parameters
from planner.export import BITSANDBYTES, LIGER, REQUIREMENTS, exported
from planner.export.methods import PIECES
from planner.export.script import script
from planner.optimizers import EIGHT_BIT, FROM_BITSANDBYTES, Optimizer
from planner.spec import Adapter, BitFit, FullFineTuning, LoRA, PeftConfig, PeftOfSize, QLoRA, Setup, Training
from planner.training.batches import tokens_asked_for
from planner.training.recipe import no_autocast
from planner.training.run import TrainingRun

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 96, "n_positions": 64,
    },
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 96, "max_position_embeddings": 64,
    },
    "bert": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 96, "max_position_embeddings": 64,
    },
    "t5": {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_kv": 16,
        "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 96, "decoder_start_token_id": 0,
        "is_encoder_decoder": True, "pad_token_id": 0,
    },
}  # fmt: skip
METHODS = {
    "full": FullFineTuning(),
    "lora": LoRA(lora_rank=4, lora_dropout=0.1),
    "lora all-linear": LoRA(lora_rank=2, target_modules=("all-linear",), lora_alpha=3.5),
    "lora biases": LoRA(lora_rank=2, lora_bias="all"),
    "houlsby": Adapter(adapter_kind="houlsby", adapter_size=8),
    "pfeiffer": Adapter(adapter_kind="pfeiffer", adapter_reduction_factor=4),
    "bitfit": BitFit(),
}
TRAINED = re.compile(r"^trained parameters: ([0-9,]+), planned ([0-9,]+)$", re.MULTILINE)


def planned(model: str = "gpt2", method: Any = None, **training: Any) -> Setup:
    """A setup of a tiny model with random weights."""
    found = resolve(f"a {model}", config_text=json.dumps(SMALL[model]))
    return Setup(model=found, method=method, training=Training(**{"seq_len": 8, **training}))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(setup, "--steps", "1")` exports, runs train.py in this process on the CPU; what it prints."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def runs(setup: Setup, *words: str) -> str:
        write(exported(setup), tmp_path / "run", force=True)
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        AcceleratorState._reset_state(reset_partial_state=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(tmp_path / "run" / "train.py"), run_name="__main__")
        AcceleratorState._reset_state(reset_partial_state=True)
        return capsys.readouterr().out

    return runs


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("method", ["full", "lora", "houlsby", "bitfit"])
def test_the_script_trains_what_was_planned(run, method: str, precision: str, optimizer: str) -> None:
    setup = planned(method=METHODS[method], precision=precision, optimizer=optimizer)
    printed = run(setup, "--steps", "2")
    expected = f"{parameters(setup).trainable:,}"
    assert TRAINED.search(printed).groups() == (expected, expected)
    losses = [float(loss) for loss in re.findall(r"^step \d: loss (\S+)$", printed, re.MULTILINE)]
    assert len(losses) == 2
    assert all(3 < loss < 7 for loss in losses)  # ln 96 is 4.6: random tokens of a vocabulary of 96


@pytest.mark.parametrize(  # T5 has no biases
    "model, method", [(m, n) for m in SMALL for n in METHODS if (m, n) != ("t5", "bitfit")]
)
def test_the_script_s_model_is_the_planner_s(tmp_path, model: str, method: str) -> None:
    """Every parameter: name, shape, dtype, and whether it is trained."""
    setup = planned(model, METHODS[method])
    write(exported(setup), tmp_path / "run")
    parts = runpy.run_path(str(tmp_path / "run" / "train.py"), run_name="train")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = parts["attached"](parts["loaded"]("model", settings), settings)
        expected = TrainingRun(setup, torch.device("meta"), _no_phases)
        expected.prepare()
    assert _shown(built) == _shown(expected.net)
    assert sum(p.numel() for p in built.parameters() if p.requires_grad) == parameters(setup).trainable


def _no_phases(_name: str, _step: int | None) -> Any:
    import contextlib

    return contextlib.nullcontext()


def _shown(net: Any) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in net.named_parameters()}


@pytest.mark.parametrize("method", [FullFineTuning(), LoRA(lora_rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize("model", ["qwen2", "bert"])
def test_each_loop_and_loss_trains_alike(run, model: str, method: Any) -> None:
    """HF Trainer's loop and a loss in chunks change what is alive, and not what is learned."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    found = resolve("small", config_text=json.dumps(SMALL[model] | no_dropout))

    micro_batches = 2 if model == "qwen2" else 1  # BERT takes the number of labels and does not divide by it

    def losses(**changes: Any) -> list[float]:
        training = Training(
            seq_len=8,
            micro_batch_size=160,
            gradient_accumulation_steps=micro_batches,
            precision="fp32",
            **changes,
        )
        printed = run(Setup(model=found, method=method, training=training), "--steps", "3")
        return [float(loss) for loss in re.findall(r"^step \d: loss (\S+)$", printed, re.MULTILINE)]

    plain = losses()
    assert len(plain) == 3
    assert len(set(plain)) > 1
    assert losses(loop="trainer") == pytest.approx(plain, abs=2e-4)
    if model == "qwen2":  # BERT's loss is refused in chunks
        assert losses(loss="chunked") == pytest.approx(plain, abs=2e-4)
        assert losses(loop="trainer", loss="chunked") == pytest.approx(plain, abs=2e-4)
        assert losses(loss="liger", kernels="liger") == plain  # on the CPU the model's own


def test_hf_trainer_s_loop_divides_by_the_labels_of_the_whole_step(tmp_path) -> None:
    """Micro batches that ask for 7 and 2 of their labels weigh as their labels do."""
    setup = planned("qwen2", loop="trainer", precision="fp32", gradient_accumulation_steps=2)
    write(exported(setup), tmp_path / "run")
    parts = runpy.run_path(str(tmp_path / "run" / "train.py"), run_name="train")
    ids = torch.arange(8).view(1, 8)
    few = ids.clone()
    few[:, :6] = -100
    batches = [{"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": few}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = json.loads((tmp_path / "run" / "settings.json").read_text())
        net = parts["loaded"]("model", settings)
        counted = parts["asked_for"](net, batches)
        assert int(counted["num_items_in_batch"]) == int(tokens_asked_for(batches, net, "causal-lm")) == 7 + 2
        net.eval()
        means = [float(net(**batch).loss) for batch in batches]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        found = parts["one_step"](Accelerator(cpu=True), net, optimizer, [], iter(batches), settings)
    assert found == pytest.approx((7 * means[0] + 2 * means[1]) / 9, abs=1e-5)
    assert found != pytest.approx(sum(means) / 2, abs=1e-4)


def test_only_what_a_loop_needs_is_written() -> None:
    plain = script(planned("qwen2"))
    trainer = script(planned("qwen2", loop="trainer", loss="chunked"))
    for words in ("inspect", "CausalLMOutput", "checkpoint(", "asked_for"):
        assert words not in plain, words
        assert words in trainer, words
    fused = script(planned("qwen2", loss="liger"))
    assert "liger" not in plain + trainer
    assert '"fused_linear_cross_entropy": True,\n    "cross_entropy": False,' in fused
    assert "(model, settings)\n    model = with_liger(model, accelerator.device)\n    model.train()" in fused
    kernels = script(planned("qwen2", kernels="liger"))
    assert 'KERNELS = {\n    "fused_linear_cross_entropy": False,\n    "cross_entropy": False,\n}' in kernels
    both = script(planned("qwen2", kernels="liger", loss="liger"))
    assert 'KERNELS = {\n    "fused_linear_cross_entropy": True,\n    "cross_entropy": False,\n}' in both
    chunked = script(planned("qwen2", kernels="liger", loss="chunked"))
    assert chunked.index("model = chunked(model)") < chunked.index("model = with_liger(model")
    for text in (plain, trainer, fused, kernels, both, chunked):
        compile(text, "train.py", "exec")
        assert max(map(len, text.splitlines())) <= 110


def test_one_step_changes_the_trained_tensors_and_no_other(tmp_path, run) -> None:
    setup = planned(method=METHODS["houlsby"], gradient_accumulation_steps=2, micro_batch_size=2,
                    clip_grad_norm=1.0, activation_checkpointing=True, precision="fp32")  # fmt: skip
    run(setup, "--steps", "2", "--out", str(tmp_path / "trained"))
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "trained" / "trained.safetensors")
    assert len(saved) == 4 * 2 * 2  # down, up and their biases; two adapters in each of two layers
    assert all(".adapter." in name for name in saved)
    assert all(tensor.abs().sum() > 0 for tensor in saved.values())  # three of the four start as zero


def test_the_step_is_clipped_and_accumulated_as_planned(run, monkeypatch) -> None:
    """What the script asks of torch: calls counted, values seen."""
    clips, backwards, steps = [], [], []
    clip, step = torch.nn.utils.clip_grad_norm_, torch.optim.SGD.step
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, n, **k: clips.append(n) or clip(p, n, **k)
    )
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: steps.append(self) or step(self, *a))
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self, **k: backwards.append(float(self)) or backward(self, **k)
    )
    setup = planned(optimizer="sgd", precision="fp32", clip_grad_norm=0.25, gradient_accumulation_steps=3)
    printed = run(setup, "--steps", "2")
    assert clips == [0.25, 0.25]
    assert len(steps) == 2
    assert len(backwards) == 6
    first = float(re.search(r"step 1: loss (\S+)", printed)[1])
    assert first == pytest.approx(sum(backwards[:3]), abs=1e-3)


@pytest.mark.parametrize("zero_grad", ["none", "zero"])
@pytest.mark.parametrize("optimizer", get_args(Optimizer))
def test_the_script_has_the_planned_optimizer(run, monkeypatch, optimizer: Any, zero_grad: Any) -> None:
    """The same class, settings and states as in the planner's own step, two steps on the CPU."""
    if optimizer in FROM_BITSANDBYTES:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        from bitsandbytes.optim import GlobalOptimManager

        monkeypatch.setattr(GlobalOptimManager, "_instance", None)  # one for the process that never forgets
    wide = resolve("wide", config_text=json.dumps(SMALL["qwen2"] | {"hidden_size": 64, "vocab_size": 128}))
    training = Training(seq_len=8, optimizer=optimizer, precision="fp32", zero_grad=zero_grad)
    setup = Setup(model=wide, training=training)
    made: list[Any] = []
    zeroed: list[bool] = []
    zero, start = torch.optim.Optimizer.zero_grad, torch.optim.Optimizer.__init__
    monkeypatch.setattr(
        torch.optim.Optimizer, "__init__", lambda self, *a, **k: made.append(self) or start(self, *a, **k)
    )
    monkeypatch.setattr(
        torch.optim.Optimizer,
        "zero_grad",
        lambda self, set_to_none=True: zeroed.append(set_to_none) or zero(self, set_to_none),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of paged states on the CPU
        own = TrainingRun(setup, torch.device("cpu"), _no_phases, autocast=no_autocast)
        own.prepare()
        own.step(1)
        own.step(2)
    run(setup, "--steps", "2")
    mine, theirs = made[0], made[1]
    assert type(mine) is type(theirs)
    assert mine.defaults.items() <= theirs.defaults.items()  # accelerate adds torch's own
    assert _states(mine) == _states(theirs)
    eight_bits = any(torch.uint8 in kind for state in _states(mine) for kind in state.values())
    assert eight_bits == (optimizer in EIGHT_BIT)  # tensors of 4,096 numbers and more
    assert zeroed == [zero_grad == "none"] * 4


def _states(optimizer: Any) -> list[Any]:
    """Shape and type of every state, parameter by parameter."""
    return [
        {name: (v.shape, v.dtype) for name, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


@pytest.mark.parametrize("model", ["gpt2", "bert", "t5"])
def test_the_script_trains_on_a_text(tmp_path, run, model: str) -> None:
    setup = planned(model, METHODS["lora"], micro_batch_size=3)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "config.json").write_text(exported(setup)["model/config.json"])
    _tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 10)
    printed = run(setup, "--steps", "2", "--model", str(folder), "--data", str(text))
    assert "step 2: loss" in printed


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[MASK]", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="[UNK]", mask_token="[MASK]")


def test_pretrained_weights_are_loaded_where_a_folder_has_them(tmp_path, run) -> None:
    setup = planned(precision="fp32", optimizer="sgd")
    run(setup, "--steps", "1", "--out", str(tmp_path / "trained"))
    assert (tmp_path / "trained" / "model.safetensors").is_file()
    parts = runpy.run_path(str(tmp_path / "run" / "train.py"), run_name="train")
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    again = parts["loaded"](str(tmp_path / "trained"), settings)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "trained" / "model.safetensors")
    for name, tensor in again.named_parameters():
        if name in saved:
            assert torch.equal(tensor, saved[name]), name


def test_peft_s_own_configuration_is_exported_too(run) -> None:
    method = PeftConfig(
        peft_config_json=json.dumps({
            "peft_type": "IA3", "target_modules": ["c_attn", "mlp.c_proj"],
            "feedforward_modules": ["mlp.c_proj"], "peft_version": "0.1",
            "base_model_name_or_path": "somebody/else",
        })
    )  # fmt: skip
    printed = run(planned(method=method, precision="fp32"), "--steps", "1")
    assert printed.startswith(
        "trained parameters: 448\n"
    )  # 2 layers x (3 x 32 + 4 x 32): a value an output or input


def test_the_command_writes_a_folder_that_runs(tmp_path, planner_command) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL["qwen2"]))
    out = tmp_path / "run"
    words = ["--model", str(config), "--method", "lora", "--seq-len", "8", "--out", str(out)]
    answer = json.loads(planner_command("export", *words, "--json").stdout)
    assert answer["files"] == sorted(answer["files"])
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == set(
        answer["files"]
    )
    done = subprocess.run(
        [sys.executable, str(out / "train.py"), "--steps", "1"],  # one's own config.json: random weights
        cwd=tmp_path,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    counted = json.loads(planner_command("params", *words[:-2], "--json").stdout)["parameters"]["trainable"]
    assert TRAINED.search(done.stdout).groups() == (f"{counted:,}",) * 2


def test_a_folder_with_files_is_refused_and_force_touches_its_own_files_only(tmp_path) -> None:
    out = tmp_path / "run"
    files = exported(planned())
    write(files, out)
    (out / "notes.txt").write_text("mine")
    (out / "train.py").write_text("changed")
    with pytest.raises(SetupError, match="has files already"):
        write(files, out)
    assert (out / "train.py").read_text() == "changed"
    write(files, out, force=True)
    assert (out / "train.py").read_text() == files["train.py"]
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="is a file"):
        write(files, tmp_path / "file", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]  # no temporary folder is left


def test_nothing_is_half_written_where_the_disk_refuses(tmp_path, monkeypatch) -> None:
    written = Path.write_text

    def full(path: Path, *words: Any, **more: Any) -> int:
        if path.name == "train.py":
            raise OSError(28, "No space left on device")
        return written(path, *words, **more)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PlannerError, match="No space left on device"):
        write(exported(planned()), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "setup, says",
    [
        (lambda: Setup(model="params:7e9"), "no layers to run"),
        (lambda: Setup(model="gpt2", method=PeftOfSize(trainable_params=1000)), "no layers to run"),
        (lambda: Setup(model="gpt2", training=Training(precision="textbook")), "sum worked by hand"),
    ],
)
def test_what_no_library_runs_is_refused_in_one_line(setup, says: str) -> None:
    with pytest.raises(SetupError, match=says):
        exported(setup())


@pytest.mark.parametrize("model", catalog.models())
def test_the_settings_of_every_catalogue_model_are_those_of_the_setup(model: str) -> None:
    setup = Setup(model=model, method=LoRA(target_modules=("attention",)), training=Training(seq_len=64))
    files = exported(setup)
    values = json.loads(files["settings.json"])
    assert values["model"] == model
    assert values["planned"]["trainable_parameters"] == parameters(setup).trainable
    names = values.pop("target_modules")
    assert parameters(setup.replace(target_modules=tuple(names))) == parameters(setup)
    assert len(names) <= 12, "the endings of the attention layers are few"
    flat = setup.to_dict()
    kept = {key for key in flat if key not in ("model_config", "target_modules", "lora_alpha")}
    assert {key: values[key] for key in kept} == {key: flat[key] for key in kept}
    assert json.loads(files["model/config.json"]).get("auto_map") is None
    assert files == exported(setup)


def test_a_name_cannot_reach_the_code() -> None:
    """train.py is put together from fixed pieces: no text of the setup is in it."""
    hostile = resolve('"""\nimport os\n{x}', config_text=json.dumps(SMALL["gpt2"]))
    for method in METHODS.values():
        assert (
            exported(Setup(model=hostile, method=method, training=Training(seq_len=8)))["train.py"]
            == exported(planned(method=method))["train.py"]
        )


@pytest.mark.parametrize("method", PIECES)
def test_the_script_is_plain_python_that_uses_what_it_imports(method: str) -> None:
    methods = {
        "adapter": METHODS["houlsby"],
        "peft-config": PeftConfig(peft_config_json='{"peft_type": "IA3"}'),
        "qlora": QLoRA(),
    }
    text = exported(planned(method=methods.get(method) or METHODS[method]))["train.py"]
    tree = ast.parse(text)
    imported = [
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(imported) - used == set()
    assert max(map(len, text.splitlines())) <= 110
    assert not any(
        isinstance(node, ast.ImportFrom) and node.module.startswith("planner") for node in ast.walk(tree)
    )


def test_the_requirements_are_the_tested_ranges() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert list(REQUIREMENTS) == extras["simulate"]
    assert exported(planned())["requirements.txt"].splitlines() == extras["simulate"]
    assert extras["qlora"] == [BITSANDBYTES]
    eight_bits = exported(planned(optimizer="lion-8bit"))
    assert eight_bits["requirements.txt"].splitlines() == [*extras["simulate"], BITSANDBYTES]
    assert "bitsandbytes" not in exported(planned())["train.py"]
    assert extras["liger"] == [LIGER]
    for asked in ({"loss": "liger"}, {"kernels": "liger"}):
        fused = exported(planned("qwen2", **asked))
        assert fused["requirements.txt"].splitlines() == [*extras["simulate"], LIGER]
