"""The tables that a test run prints at its end, by the name of the property that carries their rows.

A test adds a row with `record_property(name, row)`, which pytest-xdist hands on.
"""

TABLES = {
    "published_t4_runs": (
        "simulation against published runs of a Tesla T4 (fitcheck-llm 0.3.1, MIT), MiB too much",
        f"{'run':<62} {'resident':>9} {'forward':>9} {'backward':>9} {'optimizer':>9} {'reserved':>9}",
    ),
    "published_t4_qlora_runs": (
        "simulation against published QLoRA runs of the same card: MiB too much, share too much",
        f"{'run':<62} {'resident':>9} {'forward':>9} {'backward':>9} {'optimizer':>9} {'step':>8} {'peak':>8}"
        f" {'reserved':>9}",
    ),
    "published_t4_runs_estimated": (
        "estimate against the same published runs, share too much",
        f"{'run':<62} {'resident':>9} {'forward':>9} {'backward':>9} {'optimizer':>9} {'peak':>9}",
    ),
    "published_peft_runs": (
        "simulation against peft's own runs on an NVIDIA L40S, peak reserved MiB, share too much",
        f"{'run':<40} {'published':>9} {'off':>8}  {'versions'}",
    ),
    "estimate_against_simulation": (
        "estimate against simulation, peak allocated memory",
        f"{'setup':<62} {'simulated MiB':>13} {'peak':>8}  worst part, worst phase of the second step",
    ),
}
