"""`--method peft:PATH`: what the file becomes, and every way in which it is no such file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from planner.cli.peft_file import peft_method
from planner.errors import SetupError

PLAIN = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "somebody/else",
    "init_lora_weights": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "use_rslora": True,
    "modules_to_save": None,
    "rank_pattern": {},
}


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(values: Any) -> str:
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        return f"peft:{tmp_path}"

    return write


def test_a_plain_lora_is_the_method_lora(written: Any) -> None:
    assert peft_method(written(PLAIN)) == {
        "method": "lora",
        "lora_rank": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "lora_bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
        {"layers_to_transform": [0]},
        {"target_modules": ".*q_proj"},
        {"target_modules": None},
        {"target_modules": ["attention"]},
        {"init_lora_weights": "pissa"},
        {"some_option_of_tomorrow": 1},
        {"peft_type": "IA3"},
    ],
    ids=str,
)
def test_anything_more_stays_pefts_own(written: Any, option: dict[str, Any]) -> None:
    assert peft_method(written(PLAIN | option)) == {"method": "peft", "peft_config": PLAIN | option}


def test_the_file_or_its_folder_can_be_named(written: Any, tmp_path: Path) -> None:
    assert peft_method(written(PLAIN)) == peft_method(f"peft:{tmp_path}/adapter_config.json")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds no JSON object"),
        (b"{}", "has no peft_type"),
        (b'{"peft_type": 3}', "has no peft_type"),
        (b"[" * 100_000, "is not JSON"),
        (b" " * (1024 * 1024 + 1), "more than 1,048,576 bytes"),
    ],
    ids=["empty", "binary", "list", "bare", "number", "deep", "long"],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(SetupError, match=words) as error:
        peft_method(f"peft:{path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["", "none.json", "a" * 5000, "a\0b"], ids=["folder", "none", "long", "null"]
)
def test_no_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(SetupError) as error:
        peft_method(f"peft:{tmp_path}/{name}")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SetupError, match="is no file"):
        peft_method(f"peft:{tmp_path}/pipe")


def test_the_command_takes_it(answer: Any, written: Any) -> None:
    found = answer("estimate", "--model", "gpt2", "--method", written(PLAIN | {"target_modules": ["c_attn"]}))
    assert found["setup"]["method"] == "lora"
    assert found["setup"]["lora_rank"] == 4
    assert not found["not_known"]


def test_the_estimate_says_what_only_a_simulation_knows(answer: Any, written: Any) -> None:
    found = answer("estimate", "--model", "gpt2", "--method", written({"peft_type": "VERA"}))
    assert {"activations", "adapter_weights", "optimizer_states"} <= set(found["not_known"])


def test_flags_of_other_methods_do_not_belong_to_it(planner_command: Any, written: Any) -> None:
    refused = planner_command(
        "estimate", "--model", "gpt2", "--method", written(PLAIN), "--lora-rank", "8", code=2
    )
    assert refused.stderr.startswith("planner: --lora-rank does not belong to --method peft:PATH")
    assert refused.stderr.count("\n") == 1
