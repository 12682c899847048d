"""`planner fit` for several GPUs: the table, the cheapest sharding, and one GPU as it always was."""

from __future__ import annotations

RUN = (
    "--model", "meta-llama/Llama-3.1-8B", "--precision", "bf16-mixed", "--optimizer", "adamw-fused",
    "--activation-checkpointing", "--seq-len", "1024", "--gpu", "h100",
)  # fmt: skip


def test_a_number_of_gpus_alone_gets_the_cheapest_sharding_that_fits(answer):
    found = answer("fit", *RUN, "--num-gpus", "8")
    best = found["shardings"]["cheapest"]
    assert found["report"]["setup"]["sharding"] == best["sharding"]
    assert best["word"] == "fits"
    fitting = [o for o in found["shardings"]["options"] if o["num_gpus"] == 8 and o["word"] == "fits"]
    assert best["sent_bytes"] == min(option["sent_bytes"] for option in fitting)


def test_a_sharding_that_is_given_is_kept(answer):
    found = answer("fit", *RUN, "--num-gpus", "8", "--sharding", "zero3")
    assert found["report"]["setup"]["sharding"] == "zero3"
    assert found["report"]["nccl_bytes"][0] < found["report"]["nccl_bytes"][1]


def test_one_gpu_has_no_shardings(answer):
    found = answer("fit", *RUN)
    assert "shardings" not in found
    assert "num_gpus" not in found["report"]["setup"]
    assert answer("fit", *RUN, "--num-gpus", "1") == found


def test_the_table_names_every_kind_and_the_cheapest(command):
    done = command("fit", *RUN, "--num-gpus", "16")
    assert done.returncode == 0
    for words in ("Shared by 16", "fsdp-grad-op", "hsdp", "zero3", "cheapest that fits is", "NVIDIA H200"):
        assert words in done.stdout


def test_a_wrong_number_is_one_line(command):
    done = command("fit", *RUN, "--num-gpus", "eight")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "planner: num_gpus must be a whole number of at least 1, got 'eight'.\n"
