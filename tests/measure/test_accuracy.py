"""Errors of predictions against made-up measurements, worked by hand."""

from __future__ import annotations

import csv
import dataclasses
import io

import pytest

from planner import FullFineTuning, Setup, Training, estimate
from planner.accuracy import GROUPS, error_table, family, fit_table, share_error, side_by_side
from planner.errors import PlannerError, SetupError
from planner.measure.selection import csv_text, filtered, of_set
from planner.record import Device, Record, nearest_record, setup_key
from planner.report import PARTS, OutOfMemory
from tests.measure.made_up import MIB, SETUP, made_record


def test_the_sign_of_an_error() -> None:
    assert share_error(110, 100) == pytest.approx(0.1)
    assert share_error(90, 100) == pytest.approx(-0.1)
    assert share_error(1, 0) is None


def test_parts_side_by_side() -> None:
    record = made_record(simulation=1.1)
    both = side_by_side(simulation=record.simulation.report, measurement=record.report)
    rows = {row.parts: row for row in both.parts}
    loose = ("activations", "logits_and_loss", "temporaries")
    assert {name for row in rows for name in row} == set(PARTS)
    assert rows[loose].by_subtraction
    assert rows[loose].measured_bytes == 44 * MIB
    assert rows[loose].simulation_bytes == 70 * MIB
    assert rows[loose].error_bytes("simulation") == 26 * MIB
    assert rows["base_weights",].error("simulation") == 0
    assert rows["base_weights",].estimate_bytes is None
    assert both.peak.error("simulation") == pytest.approx(0.1)
    assert both.reserved.error_bytes("simulation") == 12 * MIB
    assert sum(row.measured_bytes or 0 for row in both.parts) == both.peak.measured_bytes


def test_a_part_that_the_estimate_does_not_know_has_no_error() -> None:
    unknown = estimate(Setup(model="params:7e9", training=Training(precision="textbook")))
    both = side_by_side(estimate=unknown)
    rows = {row.parts[0]: row for row in both.parts}
    assert rows["activations"].estimate_bytes is None
    assert rows["base_weights"].estimate_bytes == 14 * 10**9


def test_a_prediction_is_not_taken_for_a_measurement() -> None:
    record = made_record()
    with pytest.raises(PlannerError, match="simulation was given as the measurement"):
        side_by_side(measurement=record.simulation.report)


def test_the_table_of_errors() -> None:
    full = SETUP.replace(method=FullFineTuning())
    records = [
        made_record(simulation=1.0),
        made_record(simulation=1.02, seq_len=32),
        made_record(simulation=0.97, seq_len=64),
        made_record(simulation=1.5, base=full),
    ]
    table = {
        (row.group, row.name): row
        for row in error_table(records)
        if row.prediction == "simulation" and row.quantity == "peak_allocated_bytes"
    }
    every = table["all", "all"]
    assert (every.runs, every.missing) == (4, 0)
    assert every.median == pytest.approx(0.025)  # of 0, 0.02, 0.03, 0.5
    assert every.worst_over == pytest.approx(0.5)
    assert every.worst_under == pytest.approx(-0.03)
    assert every.worst_over_setup == setup_key(full.to_dict())
    lora = table["method", "lora"]
    assert (lora.runs, lora.worst_over) == (3, pytest.approx(0.02))
    assert table["method", "full"].worst_under is None
    assert table["family", "gpt_neox"].runs == 4
    assert table["recipe", "bf16"].runs == 4
    assert {group for group, _ in table} == set(GROUPS)


def test_this_version_s_predictions_stand_beside_the_stored_ones() -> None:
    record = made_record(estimate=1.1)
    predictions = {"estimate": lambda r: r.estimate.report, "estimate_now": lambda r: r.report}
    rows = error_table([record], predictions)
    errors = {row.prediction: row.median for row in rows if row.group == "all" and "alloc" in row.quantity}
    assert errors == {"estimate": pytest.approx(0.1), "estimate_now": 0.0}


def test_a_missing_prediction_is_counted_and_no_run_invented() -> None:
    rows = error_table([made_record()], {"simulation": lambda _record: None})
    assert [(row.runs, row.missing, row.median) for row in rows if row.group == "all"] == [(0, 1, None)]
    assert error_table([]) == ()


def test_predicted_against_real_fit() -> None:
    """1000 MiB, of which others hold 100 and the context 500: 400 are left."""
    failure = OutOfMemory(phase="forward", requested_bytes=1, free_bytes=0)

    def ran(reserved_factor: float, *, full: bool) -> Record:
        record = made_record(simulation=reserved_factor)  # of 120 MiB reserved
        if not full:
            return record
        report = dataclasses.replace(record.report, out_of_memory=failure)
        return dataclasses.replace(record, report=report)

    records = [
        ran(400 / 120, full=False), ran(401 / 120, full=True), ran(402 / 120, full=False), ran(1, full=True),
        ran(1, full=True),
    ]
    rows = {row.prediction: row for row in fit_table(records)}
    assert (rows["simulation"].right, rows["simulation"].fitted_against) == (2, 1)
    assert rows["simulation"].failed_against == 2
    assert fit_table(records, {"none": lambda _record: None})[0].right == 0


def test_a_record_from_before_a_setting_was_there_is_near_in_the_others_alone() -> None:
    record = made_record(seq_len=32)
    older = {key: value for key, value in record.setup.items() if key != "zero_grad"}
    near = nearest_record(SETUP, [dataclasses.replace(record, setup=older)])
    assert near is not None
    assert near.differences == (f"seq_len 32 instead of {SETUP.training.seq_len}",)


def test_the_nearest_record() -> None:
    records = [
        made_record(seq_len=64),
        made_record(seq_len=32),
        made_record(seq_len=16, date="2000-01-01"),
        made_record(seq_len=16, date="2001-01-01"),
    ]
    exact = nearest_record(SETUP, records)
    assert exact is not None
    assert (exact.exact, exact.label, exact.record.date) == (True, "measured", "2001-01-01")
    near = nearest_record(SETUP.replace(seq_len=48), records)
    assert near is not None
    assert not near.exact
    assert near.label == "nearest measured run (seq_len 64 instead of 48)"
    assert nearest_record(SETUP.replace(method=FullFineTuning()), records) is None
    assert nearest_record(SETUP, []) is None


def test_the_gpu_of_a_setup_does_not_make_it_another() -> None:
    found = nearest_record(SETUP.replace(gpu="t4"), [made_record()])
    assert found is not None
    assert found.exact


def test_families() -> None:
    assert family(SETUP.to_dict()) == "gpt_neox"
    assert family({"model": "mine", "model_config": {"model_type": "llama"}}) == "llama"
    assert family({"model": "params:7e9"}) == "unknown"


def test_filters() -> None:
    other = Device(name="Other Card", capability=(1, 0), total_bytes=1, driver="1")
    records = (made_record(), made_record(seq_len=32, device=other, set_name="unseen"))
    assert filtered(records, ["seq_len=32"]) == records[1:]
    assert filtered(records, ["device=imagin", "method=LoRA"]) == records[:1]
    assert filtered(records, ["family=gpt_neox", "set=unseen"]) == records[1:]
    assert filtered(records, ["date=1999"]) == ()
    assert filtered(records, ["torch=0.0.0+test", "activation_checkpointing=false"]) == records
    with pytest.raises(SetupError, match="did you mean seq_len"):
        filtered(records, ["seqlen=32"])
    with pytest.raises(SetupError, match="key=value"):
        filtered(records, ["lora"])
    assert of_set(records, "unseen") == records[1:]
    assert of_set(records, "matrix") == ()
    with pytest.raises(SetupError, match="--set"):
        of_set(records, "mine")


def test_the_table_for_a_spreadsheet() -> None:
    records = (made_record(estimate=1.1), made_record(seq_len=32))
    rows = list(csv.DictReader(io.StringIO(csv_text(records))))
    assert [row["seq_len"] for row in rows] == ["16", "32"]
    assert rows[0]["peak_allocated_bytes"] == str(100 * MIB)
    assert float(rows[0]["estimate_peak_allocated_bytes_error"]) == pytest.approx(0.1)
    assert rows[0]["logits_and_loss_bytes"] == ""  # not known is not 0
    assert rows[0]["base_weights_bytes"] == str(40 * MIB)
