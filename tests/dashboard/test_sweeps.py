"""The Sweeps page: its file checked, its filters, cards, table, and the link of a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from planner import Setup, estimate
from planner.advise import verdict
from planner.catalog.gpus import gpu
from planner.dashboard import sweep_files
from planner.dashboard.links import link_problems
from planner.dashboard.sweep_figure import sweep_alt, sweep_figure
from planner.dashboard.sweep_files import flat_setup, sweep_table, varying, verdicts
from planner.errors import PlannerError
from planner.sweep.jobs import sweep_from
from planner.sweep.run import run_sweep

GRID = """
[[group]]
model = ["openai-community/gpt2", "meta-llama/Llama-3.1-8B"]
method = ["full", "lora"]
seq_len = [256, 1024, 2048]
activation_checkpointing = [true, false]
gpu = "t4"
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """results.csv and results.parquet of a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grid.toml").write_text(GRID)
    run_sweep(sweep_from(folder / "grid.toml"), folder, workers=1)
    return {path.suffix[1:]: path.read_bytes() for path in folder.glob("results.*")}


# --- the file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_both_kinds_hold_the_same_rows(files: dict[str, bytes], kind: str) -> None:
    table = sweep_table(files[kind])
    assert len(table) == 24
    assert list(table["state"]).count("refused") == 4  # gpt2 has 1,024 positions
    assert varying(table) == ["state", "model", "method", "seq_len", "activation_checkpointing"]
    t4 = gpu("t4")
    for row, word in zip(table.to_dict("records"), verdicts(table, t4), strict=True):
        if row["state"] == "refused":
            assert word == "no answer"
            continue
        flat = flat_setup(row)
        assert flat is not None
        setup = Setup.from_dict(flat)
        report = estimate(setup)
        assert report.peak_allocated_bytes == row["peak_allocated_bytes"]
        assert word == verdict(report, t4).word == row["verdict"]
        assert link_problems({key: [str(value)] for key, value in flat.items()}) == {}


def changed(files: dict[str, bytes], change: Callable[[pd.DataFrame], Any]) -> bytes:
    """The table with something wrong in it, as Parquet."""
    table = pd.read_parquet(io.BytesIO(files["parquet"]))
    table = change(table)
    out = io.BytesIO()
    table.to_parquet(out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.drop(columns="peak_allocated_bytes"), "it has no column peak_allocated_bytes"),
        (lambda t: t.head(0), "has no row"),
        (lambda t: t.assign(peak_allocated_bytes="much"), "peak_allocated_bytes is no number"),
        (lambda t: t.assign(peak_allocated_bytes=-1), "peak_allocated_bytes is below 0"),
        (lambda t: t.assign(peak_allocated_bytes=float("inf")), "beyond all bounds"),
        (lambda t: t.assign(model="m" * 5000), "model has a text too long"),
        (lambda t: t.assign(state="fine"), "its column state has words"),
        (lambda t: t.join(pd.DataFrame(1, t.index, [f"c{n}" for n in range(90)])), "at most 100"),
        (lambda t: pd.concat([t] * 900, ignore_index=True), "more than 20,000 rows"),
        (lambda t: t.rename(columns={"error": "e" * 200}), "a column's name is too long"),
    ],
)
def test_a_table_that_is_no_sweep_s_is_one_line(files: dict[str, bytes], change: Any, told: str) -> None:
    with pytest.raises(PlannerError, match=told) as caught:
        sweep_table(changed(files, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1", b"PAR1" + b"\0" * 500 + b"PAR1", b"\xff\xfe\x00", b'"' * 50_000, b"a,b\n1,2,3\n4\n"],
)
def test_bytes_that_are_no_table_are_one_line(data: bytes) -> None:
    with pytest.raises(PlannerError) as caught:
        sweep_table(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_file_beyond_its_size_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_files, "LARGEST_BYTES", 1000)
    with pytest.raises(PlannerError, match="larger than"):
        sweep_table(b"verb,state\n" * 1000)


def test_a_parquet_that_unpacks_to_too_much_is_not_read(files: dict[str, bytes]) -> None:
    """10,000 rows of one long text take some kilobytes packed."""
    big = changed(files, lambda t: pd.concat([t] * 800, ignore_index=True).assign(place="x" * 1999))
    assert len(big) < 1 << 20
    from unittest import mock

    with (
        mock.patch.object(sweep_files, "_LARGEST_UNPACKED_BYTES", 1 << 10),
        pytest.raises(PlannerError, match="unpacks to more than"),
    ):
        sweep_table(big)


def test_a_csv_of_too_many_columns_is_not_read() -> None:
    with pytest.raises(PlannerError, match="columns"):
        sweep_table(",".join(f"c{n}" for n in range(5000)).encode())


# --- the picture -------------------------------------------------------------------------------------------


def test_the_picture_draws_every_setup_by_its_verdict(files: dict[str, bytes]) -> None:
    table = sweep_table(files["parquet"])
    table = table.assign(v=verdicts(table, gpu("t4")))
    answered = table[table["peak_allocated_bytes"].notna()]
    for across in ("seq_len", "model", "activation_checkpointing", "total_parameters", "base_weights_bytes"):
        figure = sweep_figure(answered, across, across, "v")
        assert sum(len(trace.x) for trace in figure.data) == len(answered) == 20
        assert {trace.name for trace in figure.data} == set(answered["v"])
        assert len({trace.marker.symbol for trace in figure.data}) == len(figure.data)
    said = sweep_alt(answered, "Sequence length", "v")
    assert said.startswith("Peak allocated memory of 20 setups against Sequence length: from ")
    many = pd.concat([answered] * 300, ignore_index=True)
    drawn = sum(len(trace.x) for trace in sweep_figure(many, "seq_len", "s", "v").data)
    assert 1500 <= drawn <= 2000


# --- the page ----------------------------------------------------------------------------------------------


@pytest.fixture
def open_sweeps(open_app) -> Callable[..., Any]:
    """The Sweeps page, with a file where one is given."""

    def opened(data: bytes | None = None, kind: str = "parquet", **link: str) -> Any:
        app = open_app(**link).switch_page("planner/dashboard/sweeps.py").run()
        if data is not None:
            app.file_uploader(key="_sweep_upload").set_value((f"results.{kind}", data, "application/x")).run()
        return app

    return opened


def metrics(app: Any) -> dict[str, str]:
    """Label -> value."""
    return {metric.label: metric.value for metric in app.metric}


def test_without_a_file_the_page_says_how_to_make_one(open_sweeps, tmp_path: Path) -> None:
    app = open_sweeps()
    assert not app.exception
    assert "No sweep is open." in app.info[0].value
    example, command = app.code[0].value, app.code[1].value
    (tmp_path / "sweep.toml").write_text(example)
    assert len(sweep_from(tmp_path / "sweep.toml").jobs) == 24
    assert command == "python -m planner sweep sweep.toml"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_cards_filters_and_the_link_of_a_row(open_sweeps, files: dict[str, bytes], kind: str) -> None:
    app = open_sweeps(files[kind], kind, gpu="t4")
    assert not app.exception
    found = metrics(app)
    assert found["Setups"] == "24"
    assert int(found["Fit"]) + int(found["Tight"]) + int(found["Do not fit"]) == 20
    assert len(app.dataframe[0].value) == 24
    app.multiselect(key="_sweep_model").set_value(["meta-llama/Llama-3.1-8B"]).run()
    assert metrics(app)["Setups"] == "12"
    app.number_input(key="_sweep_row").set_value(1).run()
    assert any("No such row" in caption.value for caption in app.caption)
    first = int(app.dataframe[0].value["Row"].iloc[0])
    app.number_input(key="_sweep_row").set_value(first).run()
    (button,) = app.get("link_button")
    assert "model=meta-llama/Llama-3.1-8B" in button.proto.url
    assert "gpu=t4" in button.proto.url
    assert not app.exception


def test_another_gpu_in_the_sidebar_changes_the_verdicts(open_sweeps, files: dict[str, bytes]) -> None:
    small, large = (metrics(open_sweeps(files["parquet"], gpu=name)) for name in ("t4", "h200"))
    assert int(large["Fit"]) > int(small["Fit"])


def test_what_is_no_sweep_is_one_line_on_the_page(open_sweeps) -> None:
    app = open_sweeps(b"<script>alert(1)</script>", "csv")
    assert not app.exception
    assert len(app.error) == 1
    assert "no column verb" in app.error[0].value
    assert "No sweep is open." in app.info[0].value


def test_hostile_words_stay_words(open_sweeps) -> None:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["verb", "state", "error", "model", "method", "peak_allocated_bytes", "source", "*x*<b>"])
    writer.writerow(["estimate", "done", "", "<img src=x>", "lora", 5, "estimate", "<i>"])
    writer.writerow(["estimate", "failed", "<script>", "../../etc", "nonsense", "", "", 7])
    app = open_sweeps(out.getvalue().encode(), "csv")
    assert not app.exception
    assert metrics(app)["Setups"] == "2"
    page = "".join(str(html.proto.body) for html in app.get("html"))
    assert "<script>" not in page
    assert "<img" not in page
