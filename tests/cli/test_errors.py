"""Every refusal is one line on stderr, an empty stdout, and the right exit code."""

from __future__ import annotations

import pytest

LLAMA = ("--model", "meta-llama/Llama-3.2-1B")
LORA = (*LLAMA, "--method", "lora")
BARE = ("--model", "params:7e9")

BAD = [
    ((), "no verb is given"),
    (("--json",), "no verb is given before --json"),
    (("--seq-len", "5", "estimate"), "no verb is given before --seq-len"),
    (("--verison",), "did you mean --version"),
    (("estimate", *BARE, "--"), "unknown flag '--'"),
    (("estimate", "params:7e9"), "unexpected word 'params:7e9'"),
    (("estimte", *BARE), "did you mean estimate"),
    (("estimate",), "model is missing"),
    (("estimate", "--model", ""), "model is missing"),
    (("estimate", "--mdoel", "x"), "did you mean --model"),
    (("estimate", "--micro", "4", *BARE), "did you mean --micro-batch-size?"),
    (("estimate", *BARE, "--seq-len"), "--seq-len needs a value"),
    (("estimate", *BARE, "--activation-checkpointing=yes"), "takes no value"),
    (("estimate", *BARE, "--seq-len", "0"), "seq_len must be a whole number of at least 1, got 0."),
    (("estimate", *BARE, "--seq-len", "-5"), "seq_len must be a whole number of at least 1, got -5."),
    (("estimate", *BARE, "--seq-len", "1.5"), "seq_len must be a whole number"),
    (("estimate", *BARE, "--seq-len", "1000000000000"), "seq_len must be at most"),
    (("estimate", *BARE, "--micro-batch-size", "four"), "micro_batch_size must be a whole number"),
    (("estimate", *BARE, "--gradient-accumulation-steps", "0"), "gradient_accumulation_steps must be"),
    (("estimate", *BARE, "--precision", "bf32"), "precision must be one of"),
    (("estimate", *BARE, "--optimizer", "adam"), "optimizer must be one of"),
    (("estimate", *BARE, "--attention", "flash", "--precision", "fp32"), "needs a 16-bit precision"),
    (("estimate", *BARE, "--clip-grad-norm", "0"), "clip_grad_norm must be a number above 0"),
    (("estimate", *BARE, "--torch-compile"), "torch_compile is not covered: the compiler decides"),
    (("estimate", *BARE, "--gpu", "rtx-5091"), "unknown GPU 'rtx-5091'; did you mean"),
    (("estimate", *BARE, "--gpu", "0GiB"), "is not a size"),
    (("estimate", *BARE, "--gpu", ""), "unknown GPU ''"),
    (("estimate", *BARE, "--method", "loar"), "did you mean lora, qlora?"),
    (("estimate", *BARE, "--method", "lora"), "is only a number of parameters"),
    (("estimate", *BARE, "--method", "peft"), "needs trainable_params"),
    (("estimate", *BARE, "--trainable-params", "-4e6"), "'-4e6' is not a number of parameters"),
    (("estimate", *BARE, "--trainable-params", "8e9"), "more than the model's"),
    (("estimate", "--model", "params:many"), "'many' is not a number of parameters"),
    (("estimate", "--model", "params:0"), "is not a number of parameters"),
    (("estimate", "--model", "no/such\nmodel"), "model"),
    (("estimate", "--model", "./no-such/config.json"), "config.json"),
    (("estimate", *LLAMA, "--lora-rank", "8"), "lora_rank does not belong to method full"),
    (("estimate", "--model", "gpt2", "--seq-len", "1025"), "is beyond the 1,024 positions"),
    (("estimate", *LLAMA, "--method", "bitfit"), "has none"),
    (("estimate", *LORA, "--lora-rank", "4096"), "is above every target matrix"),
    (("estimate", *LORA, "--lora-dropout", "1"), "lora_dropout must be a number from 0 and below 1"),
    (("estimate", *LORA, "--lora-alpha", "nan"), "lora_alpha must be a number above 0, got nan"),
    (("estimate", *LORA, "--target-modules", "qproj"), "did you mean q_proj"),
    (("estimate", *LORA, "--target-modules", ","), "target_modules is empty"),
    (("estimate", *LORA, "--target-modules", "q_proj", "v_proj"), "unexpected word 'v_proj'"),
    (("params", *LORA, "--target-modules", "attention,q_proj"), "mixes a preset with names"),
    (("compare", *LLAMA), "compare sets full fine-tuning beside another method"),
    (("compare", *LORA, "--tasks", "0"), "tasks must be a whole number of at least 1, got 0."),
    (("compare", *LORA, "--tasks", "many"), "tasks must be a whole number of at least 1, got 'many'."),
    (("fit", *LLAMA), "no GPU is given"),
    (("simulate", *LORA, "--lora-rank", "0"), "lora_rank must be a whole number of at least 1, got 0."),
    (("models", "--name", "no-such-model"), "no model's id contains"),
    (("gpus", "--name", "h1000"), "did you mean"),
]


@pytest.mark.parametrize(
    ("words", "says"), BAD, ids=lambda value: " ".join(value)[:60] if value else "nothing"
)
def test_a_bad_setup_is_one_line_and_exit_code_2(command, words, says):
    done = command(*words)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("planner: ")
    assert done.stderr.endswith("\n")
    assert done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr


@pytest.mark.parametrize("words", [words for words, _ in BAD[2::8]], ids=" ".join)
def test_with_json_an_error_is_the_same_line(command, words):
    plain, as_json = command(*words), command(*words, "--json")
    assert (as_json.returncode, as_json.stdout) == (2, "")
    assert as_json.stderr == plain.stderr


def test_debug_adds_the_traceback(command):
    done = command("estimate", "--model", "params:none", "--debug")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("planner: ")


@pytest.mark.parametrize("verb", ["estimate", "simulate"])
@pytest.mark.parametrize("batching", ["full", "packed"])
def test_flash_attention_is_refused_on_a_card_that_has_none(planner_command, verb, batching) -> None:
    words = ("--model", "gpt2", "--precision", "fp16", "--gpu", "t4", "--attention", "flash")
    answer = planner_command(verb, *words, "--batching", batching, code=2)
    assert answer.stdout == ""
    assert answer.stderr == (
        "planner: attention flash needs capability 8.0, t4 has 7.5; choose attention sdpa, efficient or "
        "eager.\n"
    )
