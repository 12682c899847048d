"""Packaged records: runs that this project measured on a CUDA device, one JSON object a line in `*.jsonl`.

No line is ever edited: where a record and a prediction disagree, the prediction is mended. Keys of a line:

    schema                  1
    date                    UTC, ISO 8601
    set                     the list of setups it belongs to: "matrix", "unseen", or "" for a single run
    command, seed           how it was started, and torch's seed
    device                  name, capability, total_bytes (CUDA's totalGlobalMem), driver
    versions                torch, cuda, transformers, peft, accelerate, planner, python
    environment             settings of torch's allocator and of cuBLAS, where they are set
    setup                   what was asked; a model outside the catalogue brings its model_config
    report                  what was measured: by_subtraction names the part that is a remainder, not_known
                            the parts that this remainder contains
    estimate, simulation    both predictions of the same moment and the same versions, or {"error": ...}

`planner records --validate` reads every line and names those it refuses. Runs of your own are appended to
`records.jsonl` in your data folder (`PLANNER_RECORDS_DIR` moves it), never here.
"""
