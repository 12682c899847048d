"""The Sweeps page in a real browser: a file, its filters, every size, both modes, the link to the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from planner.sweep.jobs import sweep_from
from planner.sweep.run import run_sweep
from tests.dashboard.browsing import eventually, serious_findings, settle, wide
from tests.dashboard.test_simulate_browser import SIZES

GRID = """
[[group]]
model = ["openai-community/gpt2", "meta-llama/Llama-3.1-8B"]
method = ["full", "lora"]
micro_batch_size = [1, 2, 4]
seq_len = [64, 256, 1024, 2048]
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of 48 setups, 12 of them none."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "grid.toml").write_text(GRID)
    run_sweep(sweep_from(folder / "grid.toml"), folder, workers=1)
    return folder


def upload(page: Any, name: str, data: bytes) -> None:
    """Choose a file."""
    page.locator(".st-key-_sweep_upload input[type=file]").set_input_files(
        {"name": name, "mimeType": "application/octet-stream", "buffer": data}
    )


def setups(page: Any) -> str:
    """The number on the first card."""
    return str(page.locator("[data-testid=stMetricValue]").first.inner_text())


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_a_sweep_stands_at_every_size_and_axe_is_content(open_page, results: Path, mode: str) -> None:
    page = open_page("sweeps?gpu=rtx-4090", mode=mode)
    assert page.locator("h1").count() == 1
    page.get_by_text("No sweep is open.").wait_for()
    upload(page, "results.parquet", (results / "results.parquet").read_bytes())
    page.locator(".st-key-_sweep_figure .js-plotly-plot .main-svg").first.wait_for(timeout=60_000)
    settle(page)
    assert setups(page) == "48"
    page.wait_for_timeout(1000)
    assert serious_findings(page) == []
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(400)
        eventually(page, lambda: wide(page) <= 0, f"no sideways scroll at {width} px")


def test_filtered_downloaded_and_planned(open_page, results: Path) -> None:
    page = open_page("sweeps?gpu=rtx-4090")
    upload(page, "results.csv", (results / "results.csv").read_bytes())
    eventually(page, lambda: page.locator("[data-testid=stMetricValue]").count() == 4, "the cards")
    box = page.locator(".st-key-_sweep_method input")
    box.click()
    box.fill("lora")
    box.press("Enter")
    eventually(page, lambda: setups(page) == "24", "half of the setups")
    settle(page)
    with page.expect_download() as waiting:
        page.locator(".st-key-_sweep_csv button").click()
    lines = waiting.value.path().read_text().splitlines()
    assert len(lines) == 1 + 24
    assert all(",lora," in line for line in lines[1:])
    address = page.get_by_role("link", name="Open on the page Plan").get_attribute("href")
    assert "seq_len=64" in address, address
    planned = open_page(address.partition("/?")[2].join(["?", ""]))
    for key, value in (("model", "openai-community/gpt2"), ("seq_len", "64")):
        box = planned.locator(f".st-key-{key} input")
        eventually(planned, lambda box=box, value=value: box.input_value() == value, f"{key} {value}")


def test_a_large_file_is_taken_and_a_hostile_one_is_one_line(open_page, results: Path) -> None:
    head, *rows = (results / "results.csv").read_text().splitlines()
    wide_rows = "\n".join([head, *rows * 120])
    assert len(wide_rows) > 1_200_000  # beyond what a config.json or records may be
    page = open_page("sweeps")
    upload(page, "results.csv", wide_rows.encode())
    eventually(page, lambda: page.locator("[data-testid=stMetricValue]").count() == 4, "the cards")
    assert setups(page) == f"{48 * 120:,}"
    upload(page, "results.parquet", b"PAR1" + b"\0" * 2000)
    page.get_by_text("neither Parquet nor CSV").first.wait_for(timeout=30_000)
    assert "Traceback" not in page.content()
