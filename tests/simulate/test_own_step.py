"""Anyone's own step: bytes by hand, phases, devices, and what cannot be simulated."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from planner import simulate, simulate_step
from planner.errors import SetupError, TraceError
from planner.report import MemoryReport
from planner.simulate.own_step import simulated_own_step
from tests.simulate.small import LLAMA, setup_of

CUBLAS = 4096 * 1024 * 2 + 16 * 1024 * 8  # CublasHandlePool.cpp, a thread
CUBLASLT = 1024 * 1024  # CublasHandlePool.cpp, a thread that fuses a bias


def up(size_bytes: int) -> int:
    """Rounded to the allocator's 512 bytes."""
    return -(-size_bytes // 512) * 512


def mlp() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 10))
    return model, torch.optim.AdamW(model.parameters())


def train(state: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    model, optimizer = state
    x = torch.randn(64, 128)
    y = torch.randint(0, 10, (64,))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


WEIGHTS = up(512 * 128 * 4) + up(512 * 4) + up(10 * 512 * 4) + up(10 * 4)


def phases(report: MemoryReport, step: int) -> dict[str, Any]:
    return {phase.name: phase for phase in report.phases if phase.step == step}


def test_an_mlp_with_adamw_byte_by_byte() -> None:
    report = simulate_step(mlp, train)
    workspace = 2 * CUBLAS + CUBLASLT  # two threads multiply, the forward one fuses the biases
    inputs = up(64 * 128 * 4) + up(64 * 8)
    assert report.parameters.total == report.parameters.trainable == 128 * 512 + 512 + 512 * 10 + 10
    assert report.parts.to_dict() == {
        "base_weights": WEIGHTS,
        "adapter_weights": 0,
        "gradients": WEIGHTS,
        "optimizer_states": 2 * WEIGHTS,
        "activations": inputs,  # the step's own x and y live to its end
        "logits_and_loss": 0,
        "temporaries": WEIGHTS,  # torch/optim/adam.py, _multi_tensor_adamw: torch._foreach_sqrt
        "workspace": workspace,
    }
    assert report.peak_phase == "optimizer_step"
    assert report.peak_site is not None
    assert report.peak_site.op == "aten._foreach_sqrt.default"
    first, second = phases(report, 1), phases(report, 2)
    assert report.phases[0].allocated_bytes == WEIGHTS
    # saved for the backward pass: x, y, both sides of GELU, logits' log-softmax; the loss and its weight
    hidden, logits = up(64 * 512 * 4), up(64 * 10 * 4)
    saved = inputs + 2 * hidden + logits + 2 * 512
    assert first["forward"].allocated_bytes == WEIGHTS + saved + CUBLAS + CUBLASLT
    assert first["optimizer_step"].allocated_bytes == 3 * WEIGHTS + workspace  # x, y are gone
    assert second["forward"].allocated_bytes == 3 * WEIGHTS + saved + workspace
    assert second["optimizer_step"].peak_allocated_bytes == report.peak_allocated_bytes


@pytest.mark.parametrize("device", [None, "cuda", "cuda:0", torch.device("cuda"), "meta", 0])
def test_every_name_of_the_device_is_the_simulated_one(device: Any) -> None:
    def step(state: tuple[nn.Module, torch.optim.Optimizer]) -> None:
        model, optimizer = state
        x = torch.randn(64, 128, device=device)
        y = torch.randint(0, 10, (64,), device=device)
        assert x.device.type == "meta"
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert simulate_step(mlp, step).phases == simulate_step(mlp, train).phases


def test_a_script_for_cuda_runs_unchanged() -> None:
    def build() -> SimpleNamespace:
        model = nn.Sequential(nn.Linear(128, 512), nn.GELU(), nn.Linear(512, 10)).to("cuda")
        optimizer = torch.optim.AdamW(model.cuda().parameters())
        data = TensorDataset(
            torch.zeros(4, 128, device="cpu"), torch.zeros(4, dtype=torch.int64, device="cpu")
        )
        return SimpleNamespace(model=model, optimizer=optimizer, loader=DataLoader(data, 2, shuffle=True))

    seen = []

    def step(state: SimpleNamespace) -> None:
        for x, y in state.loader:
            assert x.device.type == "cpu"
            loss = F.cross_entropy(state.model(x.to("cuda", non_blocking=True)), y.pin_memory().cuda())
            loss.backward()
            nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
            state.optimizer.step()
            state.optimizer.zero_grad()
            seen.append(loss.item())
        torch.cuda.synchronize()

    report = simulate_step(build, step)
    assert len(seen) == 4
    assert report.parts.optimizer_states == 2 * WEIGHTS
    assert [phase.name for phase in report.phases[1:7]] == ["forward", "backward", "optimizer_step"] * 2


@pytest.mark.parametrize("name, states", [("AdamW8bit", 2), ("PagedAdamW8bit", 2), ("Lion8bit", 1)])
def test_optimizers_of_bitsandbytes_run_in_a_step_of_one_s_own(name: str, states: int) -> None:
    """Their codes are made on the host and brought to the device with the first 8-bit tensor."""
    optimizers = pytest.importorskip("bitsandbytes").optim

    def build() -> Any:
        model = nn.Linear(512, 512, device="cuda")
        return model, getattr(optimizers, name)(model.parameters())

    def step(state: Any) -> None:
        state[0](torch.ones(8, 512)).sum().backward()
        state[1].step()
        state[1].zero_grad()

    report = simulate_step(build, step)
    weight, absmax, bias, codes = 512 * 512, 4 * 512 * 512 // 256, 4 * 512, 1024
    paged = weight if name.startswith("Paged") else 0
    assert report.parts.optimizer_states == states * (weight - paged + absmax + bias + codes)
    assert report.provenance.get("paged_bytes", 0) == states * paged


def test_step_counters_stay_on_the_cpu_and_fused_ones_do_not() -> None:
    def run(fused: bool) -> MemoryReport:
        def build() -> Any:
            model = nn.Linear(64, 64, bias=False)
            return model, torch.optim.AdamW(model.parameters(), fused=fused)

        def step(state: Any) -> None:
            state[0](torch.ones(8, 64)).sum().backward()
            state[1].step()
            counters = {s["step"].device.type for s in state[1].state.values()}
            assert counters == ({"meta"} if fused else {"cpu"})
            state[1].zero_grad()

        return simulate_step(build, step)

    kept = 2 * 64 * 64 * 4
    assert phases(run(False), 2)["optimizer_step"].allocated_bytes + 512 == (
        phases(run(True), 2)["optimizer_step"].allocated_bytes
    )
    assert run(True).parts.optimizer_states == kept + 512  # torch/optim/adamw.py: a step on the device


def test_a_transformer_with_dropout_is_the_same_twice() -> None:
    def build() -> Any:
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.1, batch_first=True)
        model = nn.TransformerEncoder(layer, 2)
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    def step(state: Any) -> None:
        state["model"](torch.randn(4, 32, 64)).mean().backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()

    first, second = simulate_step(build, step), simulate_step(build, step)
    assert first == second
    assert first.parts.optimizer_states == 0
    assert first.peak_site is not None
    assert first.peak_site.module.startswith("layers.")
    layer = 4 * 64 * 64 + 4 * 64 + 2 * 64 * 128 + 128 + 64 + 4 * 64
    assert first.parameters.total == 2 * layer


def test_autocast_keeps_the_cast_weights_until_it_ends() -> None:
    def allocated(cache: bool) -> list[int]:
        def build() -> Any:
            return nn.Linear(256, 256, bias=False)

        def step(model: Any) -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=cache):
                y = model(model(model(torch.ones(8, 256))))  # the last two keep the weight
                assert y.dtype == torch.bfloat16
            y.sum().backward()
            model.zero_grad()

        return [phase.peak_allocated_bytes for phase in simulate_step(build, step).phases]

    weight = 256 * 256 * 2
    with_cache, without = allocated(True), allocated(False)
    assert without[1] - with_cache[1] == weight  # a copy for each use


def test_checkpointing_computes_again_on_the_device() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(64, 1024, bias=False), nn.Linear(1024, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            places = torch.arange(1024)  # no device: also when it runs again in the backward pass
            return x + self.down(self.up(x) * places)

    def build() -> nn.Module:
        return nn.ModuleList([Block(), Block(), Block()])

    def run(kind: bool | None) -> MemoryReport:
        def step(blocks: Any) -> None:
            x = torch.ones(128, 64)
            for block in blocks:
                x = block(x) if kind is None else checkpoint(block, x, use_reentrant=kind)
            x.sum().backward()

        return simulate_step(build, step, gpu="a100-40gb")

    plain, again = phases(run(None), 1), phases(run(False), 1)
    wide, places = 128 * 1024 * 4, 1024 * 8  # of each block `down` keeps its input, the product `places`
    assert plain["forward"].allocated_bytes - again["forward"].allocated_bytes == 3 * (wide + places)
    assert again["backward"].peak_allocated_bytes - again["forward"].allocated_bytes > wide


def test_gradients_accumulate_and_two_models_have_phases_of_their_own() -> None:
    def build() -> Any:
        parts = {name: nn.Linear(64, 64, bias=False) for name in ("generator", "critic")}
        return parts, [torch.optim.AdamW(part.parameters()) for part in parts.values()]

    def step(state: Any) -> None:
        for part, optimizer in zip(state[0].values(), state[1], strict=True):
            for _ in range(2):
                part(torch.ones(4, 64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    report = simulate_step(build, step)
    names = [phase.name for phase in report.phases if phase.step == 1]
    assert names == ["forward", "backward", "forward", "backward", "optimizer_step"] * 2
    assert report.parts.optimizer_states == 4 * 64 * 64 * 4
    assert report.peak_site is not None


def test_a_model_of_transformers_is_as_simulate_has_it() -> None:
    setup = setup_of(LLAMA, precision="fp32")

    def build() -> Any:
        from planner.training.build import loaded, skeleton

        net = loaded(skeleton(setup.model, dtype=torch.float32), torch.device("meta")).train()
        return net, torch.optim.AdamW(net.parameters(), lr=1e-4)

    def step(state: Any) -> None:
        net, optimizer = state
        ids = torch.randint(0, 1000, (2, 128))
        labels = ids.clone()
        outputs = net(input_ids=ids, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    own, whole = simulate_step(build, step, gpu="h100"), simulate(setup, gpu="h100")
    assert own.peak_reserved_bytes == whole.peak_reserved_bytes
    assert own.parts == whole.parts
    assert own.peak_site == whole.peak_site
    assert [p.name for p in own.phases] == [p.name for p in whole.phases if p.name != "attach"]


def test_a_full_device_ends_the_run_in_the_report() -> None:
    roomy = simulate_step(mlp, train)
    assert roomy.peak_reserved_bytes is not None
    report = simulated_own_step(mlp, train, limit_bytes=roomy.peak_reserved_bytes - 1)
    assert report.out_of_memory is not None
    assert simulated_own_step(mlp, train, limit_bytes=roomy.peak_reserved_bytes).out_of_memory is None


def test_the_step_is_named_and_the_versions_are_those_in_use() -> None:
    report = simulate_step(mlp, train)
    assert report.setup == {"step": f"{__name__}.train"}
    assert set(report.provenance) == {"planner", "torch"}
    assert MemoryReport.from_dict(report.to_dict()) == report


def _nonzero(model: nn.Module) -> None:
    y = model(torch.ones(4, 8))
    y[y > 0].sum().backward()


def _copied(model: nn.Module) -> None:
    model(torch.ones(4, 8)).cpu()


def _listed(model: nn.Module) -> None:
    model(torch.ones(4, 8)).tolist()


@pytest.mark.parametrize(
    "step, words",
    [
        (_nonzero, "aten.index.Tensor"),
        (_copied, "aten._to_copy.default"),
        (_listed, "cannot be simulated"),
    ],
)
def test_what_needs_values_ends_with_the_name_of_the_operation(step: Any, words: str) -> None:
    with pytest.raises(TraceError, match=words.replace(".", r"\.")) as error:
        simulate_step(lambda: nn.Linear(8, 8), step)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: None, "returned no module"),
        (lambda: nn.Linear(2, 2, device="cpu"), "parameters on cpu"),
    ],
)
def test_a_state_that_cannot_be_trained_is_refused(build: Any, words: str) -> None:
    with pytest.raises(SetupError, match=words):
        simulate_step(build, lambda _state: None)


def test_an_interrupted_step_leaves_torch_as_it_was() -> None:
    before = (F.softmax, F.dropout, torch.autocast, torch.autograd._engine_run_backward, DataLoader.__iter__)

    def step(_model: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate_step(lambda: nn.Linear(2, 2), step)
    after = (F.softmax, F.dropout, torch.autocast, torch.autograd._engine_run_backward, DataLoader.__iter__)
    assert after == before
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert torch.ones(1).device.type == "cpu"
    assert F.dropout(torch.ones(2, device="meta"), 0.5).shape == (2,)


def test_no_hugging_face_is_imported() -> None:
    code = (
        "import sys; from torch import nn; from planner import simulate_step; "
        "simulate_step(lambda: nn.Linear(2, 2), lambda m: m.weight.sum().backward()); "
        "sys.exit(bool({'transformers', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_a_function_held_by_its_own_name_takes_cudas_form_too() -> None:
    attention, dropout, softmax = F.scaled_dot_product_attention, F.dropout, torch.softmax

    def by_name(x: torch.Tensor) -> torch.Tensor:
        return softmax(dropout(attention(x, x, x), 0.1), -1, dtype=torch.float32)

    def by_module(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(F.dropout(F.scaled_dot_product_attention(x, x, x), 0.1), -1, dtype=torch.float32)

    def run(function: Any) -> MemoryReport:
        def step(weight: torch.Tensor) -> None:
            checkpoint(function, weight * 2, use_reentrant=False).sum().backward()

        return simulate_step(lambda: nn.Parameter(torch.ones(1, 2, 64, 64, dtype=torch.float16)), step)

    assert run(by_name).phases == run(by_module).phases
