"""One JSON object on stdout, help for everything, and nothing heavy imported."""

from __future__ import annotations

import argparse
import dataclasses
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from planner.cli.flags import HELP, flag
from planner.cli.parser import VERBS, program
from planner.report import PARTS, MemoryReport
from planner.spec import METHODS, Setup, Sharding, Training
from planner.version import __version__

LORA = (
    "--model", "meta-llama/Llama-3.2-3B", "--method", "lora", "--lora-rank", "32",
    "--target-modules", "q_proj,v_proj", "--micro-batch-size", "4", "--seq-len", "768", "--precision", "bf16",
)  # fmt: skip
HEAVY = ("torch", "transformers", "peft", "pandas", "numpy", "streamlit", "plotly", "rich", "huggingface_hub")


def test_estimate_answers_with_the_report_of_the_contract(answer):
    found = answer("estimate", *LORA)
    assert found["source"] == "estimate"
    setup = found["setup"]
    assert setup["model"] == "meta-llama/Llama-3.2-3B"
    assert (setup["method"], setup["lora_rank"], setup["target_modules"]) == (
        "lora",
        32,
        ["q_proj", "v_proj"],
    )
    assert (setup["micro_batch_size"], setup["seq_len"], setup["precision"]) == (4, 768, "bf16")
    assert found["parameters"]["total"] == 3221924864  # the contract's example
    assert found["parameters"]["trainable"] == 9175040
    assert list(found["parts"]) == list(PARTS)
    assert found["peak_allocated_bytes"] == sum(found["parts"].values())
    assert "verdict" not in found
    assert MemoryReport.from_dict(found).to_dict() == found


def test_a_gpu_adds_the_verdict(answer):
    found = answer("estimate", *LORA, "--gpu", "h100")
    assert found["verdict"]["word"] == "fits"
    assert answer("estimate", *LORA, "--gpu", "8GiB")["verdict"]["word"] == "does not fit"


def test_params_counts_as_the_estimate_does(answer):
    found = answer("params", *LORA)
    assert found["parameters"] == answer("estimate", *LORA)["parameters"]
    assert sum(row["parameters"] for row in found["trained"]) == found["parameters"]["trainable"]
    assert (
        sum(row["trainable"] * row["count"] for row in found["adapted"]) == found["parameters"]["trainable"]
    )
    assert sum(found["base_by_role"].values()) == found["parameters"]["total"] - found["parameters"]["added"]


def test_compare_sets_full_fine_tuning_beside_the_method(answer):
    found = answer("compare", *LORA, "--gpu", "24GiB")
    assert found["full"]["setup"]["method"] == "full"
    assert found["chosen"]["setup"]["method"] == "lora"
    assert found["full"]["setup"]["seq_len"] == found["chosen"]["setup"]["seq_len"] == 768
    assert set(found["verdicts"]) == {"full", "chosen"}
    assert found["verdicts"]["full"]["word"] == "does not fit"


def test_fit_answers_how_much_fits(answer):
    found = answer("fit", *LORA, "--gpu", "h100")
    assert found["verdict"]["word"] == "fits"
    assert found["largest_micro_batch"] >= 4
    assert found["largest_seq_len"] >= 768
    assert found["smallest_gpu"] in {gpu["name"] for gpu in answer("gpus")["gpus"]}
    assert found["report"]["setup"]["gpu"] == "h100"
    prices = {change["price"] for change in found["changes"]}
    assert prices <= {"nothing", "time", "numerics", "data", "method"}


def test_models_and_gpus_say_their_source(answer):
    models = answer("models")["models"]
    assert all(row["source"] and row["parameters"] > 0 for row in models)
    assert answer("models", "--name", "llama-3.2-3b")["models"][0]["parameters"] == 3212749824
    gpus = answer("gpus")["gpus"]
    assert all(row["source"] and row["total_bytes"] > 0 for row in gpus)
    assert [row["driver_name"] for row in answer("gpus", "--name", "Tesla T4")["gpus"]] == ["Tesla T4"]


def test_methods_answers_with_a_sorted_table_and_why(answer):
    found = answer("methods", *LORA, "--gpu", "l4")
    peaks = [row["peak_allocated_bytes"] for row in found["rows"] if row["peak_allocated_bytes"] is not None]
    assert peaks == sorted(peaks)
    assert len(peaks) >= 5
    row = next(row for row in found["rows"] if row["title"] == "LoRA, r = 32")
    assert row["peak_allocated_bytes"] == answer("estimate", *LORA)["peak_allocated_bytes"]
    assert (row["trainable"], row["target_modules"]) == (9175040, ["q_proj", "v_proj"])
    assert row["verdict"] == answer("estimate", *LORA, "--gpu", "l4")["verdict"]["word"]
    assert found["compared_with"] == "LoRA, r = 8"
    assert "trainable parameters" in found["sentence"]
    assert [one["title"] for one in found["left_out"]] == ["BitFit"]


@pytest.mark.parametrize(
    "words",
    [
        ("estimate", *LORA, "--gpu", "l4"),
        ("params", *LORA),
        ("methods", *LORA, "--gpu", "l4"),
        ("compare", *LORA),
        ("fit", *LORA, "--gpu", "l4"),
        ("fit", "--model", "params:7e9", "--gpu", "l4"),
        ("models",),
        ("gpus",),
    ],
    ids=lambda words: words[0],
)
def test_people_get_tables(command, words):
    done = command(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "─" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 120


def test_version(command):
    assert command("--version").stdout == f"planner {__version__}\n"


@pytest.mark.parametrize(
    "verb", [(), *((name,) for name in VERBS)], ids=lambda verb: "".join(verb) or "planner"
)
def test_help_is_printed_and_is_no_error(command, verb):
    done = command(*verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: planner")
    for name in VERBS if not verb else ():
        assert name in done.stdout


def test_every_verb_and_every_flag_has_help():
    for name, parser in program().verbs.items():
        assert parser.description, name
        for action in parser._actions:
            assert action.help, f"{name} {action.option_strings}"
            if not isinstance(action, argparse._HelpAction):
                parser.format_help()  # a stray % in a help text raises here


def test_every_field_of_a_setup_is_a_flag():
    classes = (Training, Sharding, *METHODS.values())
    fields = {item.name for cls in classes for item in dataclasses.fields(cls)}
    assert set(HELP) == fields | {"model", "method", "gpu"}
    for verb in ("estimate", "simulate", "params", "compare", "methods", "fit"):
        assert {flag(name) for name in HELP} <= set(program().verbs[verb].flag_names())


def test_every_field_survives_the_command_line(answer):
    typed = {
        "micro_batch_size": 2, "seq_len": 128, "gradient_accumulation_steps": 3, "precision": "bf16-mixed",
        "optimizer": "adamw-fused", "attention": "eager", "clip_grad_norm": 1.5, "lora_rank": 4,
        "lora_alpha": 12.0, "lora_dropout": 0.1, "lora_bias": "none", "target_modules": "all-linear",
        "zero_grad": "zero", "loop": "trainer", "loss": "chunked", "batching": "padded",
        "kernels": "liger", "checkpoint_every": 2,
    }  # fmt: skip
    flags = {"activation_checkpointing": True, "checkpoint_offload": True}
    assert set(typed) | set(flags) == {
        item.name for cls in (Training, METHODS["lora"]) for item in dataclasses.fields(cls)
    }
    words = [word for name, value in typed.items() for word in (flag(name), str(value))]
    model = ("--model", "meta-llama/Llama-3.2-1B", "--method", "lora")
    setup = answer("estimate", *model, *words, *map(flag, flags))["setup"]
    assert setup == {"model": model[1], "method": "lora", **flags, **typed}
    assert Setup.from_dict(setup).to_dict() == setup


def test_nothing_heavy_is_imported_for_json():
    code = (
        "import sys; from planner.cli import main; code = main(sys.argv[1:]); "
        f"sys.exit(code or repr([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    for verb in ("estimate", "params", "compare", "methods", "fit"):
        words = [verb, *LORA, "--gpu", "h100", "--json"]
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60
        )
        assert done.stderr == "[]\n", done.stderr


def test_that_the_import_test_can_fail():
    code = "import sys, rich; sys.exit(repr([name for name in ('rich',) if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "['rich']\n"


# Modules of the standard library that take 0.07 s where a cold estimate takes 0.18 s.
YARDSTICK = (
    "import asyncio, concurrent.futures, ctypes, decimal, email.mime.text, http.server, logging.config, "
    "multiprocessing.pool, sqlite3, tarfile, unittest.mock, xml.dom.minidom"
)


def test_a_cold_estimate_is_fast(command):
    """0.3 s of processor time, or four times the yardstick where a busy machine makes all of it slower."""

    def seconds(run: Callable[[], Any]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run().returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def yardstick() -> Any:
        return subprocess.run([sys.executable, "-c", YARDSTICK], check=False)

    estimates, yardsticks = [], []
    for _ in range(4):
        estimates.append(seconds(lambda: command("estimate", *LORA, "--json")))
        yardsticks.append(seconds(yardstick))
    assert min(estimates) < max(0.3, 4 * min(yardsticks))


def test_simulate_answers_with_the_same_report(answer):
    words = ("--model", "gpt2", "--method", "lora", "--seq-len", "16", "--gpu", "t4")
    found = answer("simulate", *words)
    assert found["source"] == "simulation"
    assert found["parameters"] == answer("params", *words)["parameters"]
    assert found["peak_allocated_bytes"] == sum(found["parts"].values())
    assert found["peak_reserved_bytes"] >= found["peak_allocated_bytes"]
    assert found["verdict"]["word"] == "fits"
    assert "the simulated peak" in found["verdict"]["sentence"]
