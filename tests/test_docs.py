"""The documents are true: every command in them runs, every output is what it prints today.

Every `console` block of README.md and docs/settings.md is a command and its whole output; the Python example
stands before the `text` block with what it prints. `python -m tests.test_docs` writes today's outputs there.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from planner.accuracy import error_table
from planner.measure.records import shelf
from planner.optimizers import Optimizer
from planner.record import Record
from planner.units import MIB
from tests.measure.made_up import made_record
from tests.peft_runs import LONGEST, SIMULATED, error, peft_runs
from tests.published import qlora_runs

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCUMENTS = (README, ROOT / "docs" / "settings.md")
WIDTH = 100  # columns of the outputs
PUBLISHED = re.compile(r"(<!-- published -->\n).*?(<!-- end -->)", re.DOTALL)
PHASES = re.compile(r"(<!-- published phases -->\n).*?(<!-- end -->)", re.DOTALL)
PEFT_RUNS = re.compile(r"(<!-- published peft -->\n).*?(<!-- end -->)", re.DOTALL)
SIMULATIONS = ROOT / "planner/measure/published/simulations.json"
OPTIMIZERS = re.compile(r"(<!-- optimizers -->\n).*?(<!-- end -->)", re.DOTALL)
BATCHING = re.compile(r"(<!-- batching -->\n).*?(<!-- end -->)", re.DOTALL)
KERNELS = re.compile(r"(<!-- kernels -->\n).*?(<!-- end -->)", re.DOTALL)
CHECKPOINTS = re.compile(r"(<!-- checkpoints -->\n).*?(<!-- end -->)", re.DOTALL)
RECORDED = re.compile(r"(<!-- recorded -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def written() -> str:
    """All documents, one after the other."""
    return "\n".join(path.read_text() for path in DOCUMENTS)


def blocks(language: str, text: str | None = None) -> list[str]:
    """The fenced code blocks of the documents in one language."""
    return [body for name, body in BLOCK.findall(text or written()) if name == language]


def printed(command: list[str]) -> str:
    """Standard output of a command that succeeds, trailing spaces dropped, in a terminal of WIDTH columns."""
    answer = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": str(WIDTH), "NO_COLOR": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert answer.returncode == 0, f"{command}: {answer.returncode}\n{answer.stderr}"
    return "\n".join(line.rstrip() for line in answer.stdout.strip("\n").splitlines()) + "\n"


def planner(arguments: list[str]) -> str:
    """What `planner ARGUMENTS` prints."""
    return printed([sys.executable, "-m", "planner", *arguments])


def console(block: str) -> tuple[list[str], str]:
    """A console block: the words after `$ planner`, and the output below."""
    line, _, output = block.partition("\n")
    while line.endswith("\\"):
        more, _, output = output.partition("\n")
        line = line[:-1] + more
    dollar, program, *arguments = shlex.split(line)
    assert (dollar, program) == ("$", "planner"), line
    return arguments, output


def answered(block: str) -> str:
    """The console block with what its command prints today."""
    arguments, output = console(block)
    return block.removesuffix(output) + planner(arguments)


EXAMPLES = blocks("console")


@pytest.mark.parametrize("block", EXAMPLES, ids=lambda block: console(block)[0][0])
def test_an_example_prints_what_stands_there(block: str) -> None:
    assert answered(block) == block


def test_the_python_example_prints_what_stands_there() -> None:
    (code,) = blocks("python")
    (output,) = blocks("text")
    assert len(code.strip().splitlines()) <= 10
    assert printed([sys.executable, "-W", "error", "-c", code]) == output


def test_the_readme_s_table_lists_every_verb_and_no_other() -> None:
    from planner.cli.parser import VERBS

    assert sorted(re.findall(r"^\| `planner ([a-z]+)` \|", written(), re.MULTILINE)) == sorted(VERBS)


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`(--[a-z-]+)", written()))))
def test_a_flag_of_the_readme_exists(flag: str) -> None:
    assert flag in flags_of_all_verbs()


@functools.cache
def flags_of_all_verbs() -> frozenset[str]:
    """Every flag that some verb's help names."""
    from planner.cli.parser import VERBS

    return frozenset(re.findall(r"--[a-z-]+", " ".join(planner([verb, "--help"]) for verb in VERBS)))


def test_the_hand_worked_example_is_what_the_planner_answers() -> None:
    """7 billion parameters at 2 + 2 + 8 bytes, GB = 10^9 bytes, from the exact JSON answer."""
    arguments = "compare --model params:7e9 --precision textbook --trainable-params 4e6 --tasks 5 --json"
    answer = json.loads(planner(arguments.split()))
    full, chosen, disk = answer["full"], answer["chosen"], answer["storage"]

    def gb(size_bytes: int) -> str:
        return f"{size_bytes / 10**9:.10g} GB"

    def mb(size_bytes: int) -> str:
        return f"{size_bytes / 10**6:.10g} MB"

    base, added = gb(chosen["parts"]["base_weights"]), mb(chosen["parts"]["adapter_weights"])
    trained = {part: mb(chosen["parts"][part]) for part in ("gradients", "optimizer_states")}
    totals = gb(full["peak_allocated_bytes"]), gb(chosen["peak_allocated_bytes"])
    rows = [
        f"× 2 B = {gb(full['parts']['base_weights'])} | {base} frozen + {added} |",
        f"× 2 B = {gb(full['parts']['gradients'])} | {trained['gradients']} |",
        f"× 8 B = {gb(full['parts']['optimizer_states'])} | {trained['optimizer_states']} |",
        f"| total | **{totals[0]}** | **{totals[1]}**, {100 * answer['reduction']:.1f} % less |",
        f"5 × 14 GB = **{gb(disk['full_copies_bytes'])}** as full copies",
        f"14 GB + 5 × 8 MB = **{gb(disk['base_and_adapters_bytes'])}** as one base and five adapters",
    ]
    assert [row for row in rows if row not in written()] == []
    assert totals == ("84 GB", "14.048 GB")


def test_the_matrix_of_the_readme_is_what_the_planner_counts() -> None:
    arguments = "params --model meta-llama/Llama-3.1-8B --method lora --lora-rank 8 --target-modules q_proj"
    (matrix,) = json.loads(planner([*arguments.split(), "--json"]))["adapted"]
    rows, columns = matrix["shape"]
    text = (
        f"One {rows} × {columns} matrix has {matrix['full']:,} parameters; LoRA of rank 8 trains "
        f"{matrix['trainable']:,} instead, {100 * matrix['reduction']:.1f} % fewer."
    )
    assert text in " ".join(written().split())


def test_the_recipes_of_the_readme_take_the_bytes_it_says() -> None:
    rows = re.findall(
        r"^\| (`[a-z0-9-]+`(?:, `[a-z0-9-]+`)*) \|.*\| (\d+) \|$", written(), re.MULTILINE
    )
    said = {name: int(size) for names, size in rows for name in re.findall(r"`([^`]+)`", names)}
    for precision, size in said.items():
        answer = json.loads(
            planner(["estimate", "--model", "params:1e9", "--precision", precision, "--json"])
        )
        kept = ("base_weights", "gradients", "optimizer_states")
        assert sum(answer["parts"][part] for part in kept) == size * 10**9, precision
    assert set(said) == {"fp32", "bf16", "fp16", "bf16-mixed", "fp16-mixed", "textbook"}


def catalogue_counts() -> dict[str, int]:
    """How many models and GPUs the catalogues hold."""
    return {
        "models": len(json.loads(planner(["models", "--json"]))["models"]),
        "GPUs": len(json.loads(planner(["gpus", "--json"]))["gpus"]),
    }


def test_counts_in_the_readme_are_those_of_the_catalogue() -> None:
    for what, number in catalogue_counts().items():
        assert re.findall(rf"\((\d+) {what}\)", written()) == [str(number)]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/settings.md"])
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text()):
        assert target.startswith("https://") or (ROOT / name).parent.joinpath(target).exists(), (
            f"{name} links to {target}"
        )


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/settings.md"])
def test_paths_that_are_named_exist(name: str) -> None:
    named = set(
        re.findall(r"`((?:planner|tests|benchmarks|scripts|docs)/[\w./-]*)`", (ROOT / name).read_text())
    )
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_contributing_fits_on_a_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 80


def one_line(marker: str) -> str:
    """The single command line between `<!-- marker -->` and `<!-- end -->`."""
    (body,) = re.findall(rf"<!-- {marker} -->\n```\w*\n(.*?)```\n<!-- end -->", README.read_text(), re.DOTALL)
    (line,) = body.strip().splitlines()
    return str(line)


def test_the_two_commands_start_from_nothing_but_python() -> None:
    page, test = one_line("page command"), one_line("test command")
    for command in (page, test):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -r requirements.txt")
        assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0
    assert page.endswith("&& .venv/bin/streamlit run app.py")
    assert " -r tests/requirements.txt && " in test
    assert test.endswith("&& .venv/bin/pytest -n 2 --dist loadfile")  # files on two processors


def test_continuous_integration_runs_the_readme_s_command() -> None:
    extraction = "sed -n '/<!-- test command -->/,/<!-- end -->/p' README.md | grep -v -e '^<!--' -e '^```'"
    assert extraction in (ROOT / ".ci" / "run").read_text()
    found = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == one_line("test command")


def rewritten(text: str) -> str:
    """A document with today's outputs."""

    def fresh(match: re.Match[str]) -> str:
        language, body = match.groups()
        if language == "console":
            body = answered(body)
        elif language == "text":
            (code,) = blocks("python", text)
            body = printed([sys.executable, "-c", code])
        return f"```{language}\n{body}```"

    for what, number in catalogue_counts().items():
        text = re.sub(rf"\(\d+ {what}\)", f"({number} {what})", text)
    text = PUBLISHED.sub(lambda found: found[1] + published_table() + found[2], text)
    text = RECORDED.sub(lambda found: found[1] + recorded_text() + found[2], text)
    text = OPTIMIZERS.sub(lambda found: found[1] + optimizer_table() + found[2], text)
    text = BATCHING.sub(lambda found: found[1] + batching_table() + found[2], text)
    text = KERNELS.sub(lambda found: found[1] + kernels_table() + found[2], text)
    text = CHECKPOINTS.sub(lambda found: found[1] + checkpoints_table() + found[2], text)
    text = PEFT_RUNS.sub(lambda found: found[1] + peft_runs_table() + found[2], text)
    text = PHASES.sub(lambda found: found[1] + phases_table() + found[2], text)
    return BLOCK.sub(fresh, text)


def published_table() -> str:
    """The published runs against the packaged simulations and today's estimates, peak allocated memory."""
    from planner import Setup, estimate
    from planner.measure.published import published_runs

    def row(label: str, errors: list[float]) -> str:
        middle = statistics.median(errors)
        return f"| {label} | {len(errors)} | {middle:+.2%} | {max(errors):+.2%} | {min(errors):+.2%} |"

    rows = ["| prediction | runs | median | worst over | worst under |", "| --- | --- | --- | --- | --- |"]
    for method, name in (("lora", "LoRA"), ("qlora", "QLoRA, nf4")):
        runs = [run for run in published_runs() if run.setup["method"] == method]
        errors = [run.simulated_allocated_bytes / run.peak_allocated_bytes - 1 for run in runs]
        rows.append(row(f"simulation, {name}", errors))
        estimates = [estimate(Setup.from_dict(run.setup)).peak_allocated_bytes for run in runs]
        errors = [size / run.peak_allocated_bytes - 1 for size, run in zip(estimates, runs, strict=True)]
        rows.append(row(f"formulas, {name}", errors))
    return "\n".join(rows).replace("%", " %").replace("-0.00 %", "0.00 %").replace("+0.00 %", "0.00 %") + "\n"


def test_the_table_of_published_runs_is_today_s() -> None:
    assert f"<!-- published -->\n{published_table()}<!-- end -->" in written()


def peft_runs_table() -> str:
    """peft's own runs against their packaged simulation, peak reserved memory, by how far off."""
    packaged = json.loads(SIMULATED.read_text())["runs"]
    off = {run["id"]: error(run, packaged[run["id"]][0]) for run in peft_runs()}
    rows = ["| off by | runs | median | worst over | worst under |", "| --- | --- | --- | --- | --- |"]
    for label, low, high in (
        ("all", 0.0, 1.0),
        ("up to 0.25 %", 0.0, 0.0025),
        ("0.25 to 1 %", 0.0025, 0.01),
        ("more than 1 %", 0.01, 1.0),
    ):
        errors = [value for value in off.values() if low <= abs(value) < high]
        middle, over, under = statistics.median(errors), max(errors), min(errors)
        rows.append(
            f"| {label} | {len(errors)} | {middle:+.2%} | {over:+.2%} | {under:+.2%} |".replace("%", " %")
        )
    return "\n".join(rows).replace("  %", " %") + "\n"


def test_the_table_of_peft_s_own_runs_is_the_packaged_one() -> None:
    assert f"<!-- published peft -->\n{peft_runs_table()}<!-- end -->" in README.read_text()


def test_the_readme_names_the_inferred_length() -> None:
    assert f"{LONGEST} tokens" in README.read_text()


def optimizer_table() -> str:
    """Full fine-tuning of one model with each optimizer: states, what its step takes beside them, peak."""
    from planner import Setup, Training, estimate
    from planner.units import gib

    rows = ["| optimizer | states | temporaries of its step | peak |", "| --- | --- | --- | --- |"]
    for name in get_args(Optimizer):
        report = estimate(Setup(model="meta-llama/Llama-3.1-8B", training=Training(optimizer=name)))
        step = report.phases[-1]
        states = gib(report.parts.optimizer_states)
        if paged := report.provenance.get("paged_bytes"):
            states += f", {gib(paged)} paged"
        # the phase ends without its gradients and without what the step took
        taken = step.peak_allocated_bytes - step.allocated_bytes - estimated_gradients()
        rows.append(f"| `{name}` | {states} | {gib(taken)} | {gib(report.peak_allocated_bytes)} |")
    return "\n".join(rows) + "\n"


def estimated_gradients() -> int:
    """Bytes of all gradients of the table's model in bf16."""
    from planner import Setup, Training, estimate

    phases = estimate(
        Setup(model="meta-llama/Llama-3.1-8B", training=Training(optimizer="sgd", zero_grad="zero"))
    ).phases
    none = estimate(Setup(model="meta-llama/Llama-3.1-8B", training=Training(optimizer="sgd"))).phases
    return phases[-1].allocated_bytes - none[-1].allocated_bytes


def test_the_table_of_optimizers_is_today_s() -> None:
    assert f"<!-- optimizers -->\n{optimizer_table()}<!-- end -->" in written()


def batching_table() -> str:
    """Peaks by formula of one batch held in each way, per attention, with and without checkpoints."""
    from planner import LoRA, Setup, Training, estimate
    from planner.units import gib

    head = "| samples | attention | peak | with checkpointing |"
    rows = [head, "| --- | --- | --- | --- |"]
    choices = [(kind, name) for kind in ("full", "padded", "packed") for name in ("flash", "sdpa", "eager")]
    for batching, attention in choices:
        training = Training(
            micro_batch_size=8, seq_len=1024, loss="chunked", batching=batching, attention=attention
        )
        setup = Setup(model="meta-llama/Llama-3.1-8B", method=LoRA(), training=training)
        peaks = [
            gib(estimate(setup.replace(activation_checkpointing=saves)).peak_allocated_bytes)
            for saves in (False, True)
        ]
        rows.append(f"| `{batching}` | `{attention}` | {' | '.join(peaks)} |")
    return "\n".join(rows) + "\n"


def checkpoints_table() -> str:
    """Peaks by formula with every layer checkpointed, some, or none, and with the inputs on the host."""
    from planner import LoRA, Setup, Training, estimate
    from planner.units import gib

    choices: dict[str, dict[str, Any]] = {
        "none": {"activation_checkpointing": False},
        "every layer": {},
        "every layer, inputs on the host": {"checkpoint_offload": True},
        "every 2nd layer": {"checkpoint_every": 2},
        "every 4th layer": {"checkpoint_every": 4},
    }
    rows = ["| checkpoints | peak | on the host |", "| --- | --- | --- |"]
    for words, chosen in choices.items():
        values = {"activation_checkpointing": True, "micro_batch_size": 4, "seq_len": 8192, "loss": "liger"}
        setup = Setup(
            model="meta-llama/Llama-3.1-8B", method=LoRA(), training=Training(**{**values, **chosen})
        )
        report = estimate(setup)
        host = report.provenance.get("offloaded_bytes", 0)
        rows.append(f"| {words} | {gib(report.peak_allocated_bytes)} | {gib(host) if host else 'nothing'} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_checkpoints_is_today_s() -> None:
    assert f"<!-- checkpoints -->\n{checkpoints_table()}<!-- end -->" in written()


def kernels_table() -> str:
    """Peaks by formula with torch's kernels and Liger's, with and without its loss."""
    from planner import LoRA, Setup, Training, estimate
    from planner.units import gib

    methods = {"full fine-tuning": None, "LoRA, all linear layers": LoRA(target_modules=("all-linear",))}
    rows = [f"| loss | kernels | {' | '.join(methods)} | ... with checkpointing |", "| --- " * 5 + "|"]
    for loss in ("full", "liger"):
        for kernels in ("torch", "liger"):
            training = Training(micro_batch_size=8, seq_len=2048, loss=loss, kernels=kernels)
            full, lora = (
                Setup(model="Qwen/Qwen3-0.6B", method=method, training=training)
                for method in methods.values()
            )
            setups = (full, lora, lora.replace(activation_checkpointing=True))
            peaks = [gib(estimate(setup).peak_allocated_bytes) for setup in setups]
            rows.append(f"| `{loss}` | `{kernels}` | {' | '.join(peaks)} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_kernels_is_today_s() -> None:
    assert f"<!-- kernels -->\n{kernels_table()}<!-- end -->" in written()


def test_the_table_of_batching_is_today_s() -> None:
    assert f"<!-- batching -->\n{batching_table()}<!-- end -->" in written()


def phases_table() -> str:
    """The published QLoRA runs against their packaged simulation, phase by phase: the worst of each model."""
    names = ("resident_before_step", "peak_forward", "peak_backward", "peak_optimizer")
    simulated = json.loads(SIMULATIONS.read_text())["phases"]
    models: dict[str, list[tuple[float, ...]]] = {}
    for run in qlora_runs():
        measured, found = run["measured_mib"], [size / MIB for size in simulated[run["id"]]]
        step = max(found) - found[0]
        real_step = measured["peak_allocated"] - measured["resident_before_step"]
        off = (*(mine - measured[name] for mine, name in zip(found, names, strict=True)), step - real_step)
        shares = (step / real_step - 1, max(found) / measured["peak_allocated"] - 1)
        models.setdefault(run["model"].rpartition("/")[2], []).append((*off, *shares))
    rows = [
        "| model | runs | resident | forward | backward | optimizer | step | step | peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, runs in models.items():
        worst = [max(column, key=abs) for column in zip(*runs, strict=True)]
        cells = [f"{value:+.1f} MiB" for value in worst[:5]] + [f"{value:+.2%}" for value in worst[5:]]
        rows.append(" | ".join([f"| {model}", str(len(runs)), *cells]) + " |")
    text = "\n".join(rows).replace("%", " %")
    return re.sub(r"[+-](0\.0+ )", r"\1", text) + "\n"


def test_the_table_of_phases_is_today_s() -> None:
    assert f"<!-- published phases -->\n{phases_table()}<!-- end -->" in written()


def recorded_text(records: Sequence[Record] | None = None) -> str:
    """The packaged records against the predictions kept with them, in the words of README.md."""
    if records is None:
        records = [record for record in shelf().records if record.origin == "packaged"]
    if not records:
        return (
            "**Our own measurements.** None yet: no CUDA device has run `planner measure` so far, and no "
            "record is\npackaged. `planner records --accuracy` prints this table for the records that a "
            "machine has.\n"
        )
    text = "**Our own measurements**, made by `python -m planner measure`:\n"
    for name in sorted({record.set for record in records}):
        runs = [record for record in records if record.set == name]
        text += f"\n{machines(runs)}\n\n{error_rows(runs)}"
    return text + "\n![predicted against measured memory of every run](docs/accuracy.png)\n"


def machines(runs: Sequence[Record]) -> str:
    """How many runs of which set, on what, with what and when."""

    def each(values: Iterable[str]) -> str:
        return ", ".join(sorted(set(values)))

    dates = sorted(run.date[:10] for run in runs)
    packages = ("torch", "transformers", "peft")
    versions = ", ".join(f"{name} {each(run.versions[name] for run in runs)}" for name in packages)
    full = sum(run.report.out_of_memory is not None for run in runs)
    return (
        f"{len(runs) - full} runs of `{runs[0].set or 'single setups'}` ({full} more out of memory), "
        f"{each(f'{run.device.name}, driver {run.device.driver}' for run in runs)}; {versions}; "
        f"{dates[0]} to {dates[-1]}:"
    )


def error_rows(runs: Sequence[Record]) -> str:
    """Errors by method and family, of peak allocated memory; of all runs in peak reserved memory too."""

    def percent(share: float | None) -> str:
        return "" if share is None else f"{100 * share:+.3f} %"

    head = ("runs of", "prediction", "memory", "runs", "median", "worst over", "worst under")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in error_table(runs):
        allocated = row.quantity == "peak_allocated_bytes"
        if row.group == "recipe" or not (allocated or row.group == "all"):
            continue
        group = row.group if row.group == "all" else f"{row.group} {row.name}"
        cells = [group, row.prediction, "allocated" if allocated else "reserved", str(row.runs)]
        cells += [percent(row.median).lstrip("+"), percent(row.worst_over), percent(row.worst_under)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def test_what_is_said_of_our_own_measurements_is_what_is_packaged() -> None:
    assert f"<!-- recorded -->\n{recorded_text()}<!-- end -->" in written()


def test_records_would_be_told_with_their_machine_and_their_errors() -> None:
    text = recorded_text([made_record(set_name="matrix"), made_record(seq_len=32, set_name="matrix")])
    assert "2 runs of `matrix` (0 more out of memory), Imaginary GPU, driver 0.0; torch 0.0.0+test, " in text
    assert re.search(r"^\| all \| simulation \| allocated \| 2 \| ", text, re.MULTILINE)
    assert re.search(r"^\| family gpt_neox \| estimate \| allocated \| 2 \| ", text, re.MULTILINE)


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(rewritten(path.read_text()))
