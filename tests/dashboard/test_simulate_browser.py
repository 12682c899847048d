"""Simulation, Measure and Accuracy in a real browser over a real server, with the real simulating process."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from planner.measure.records import append
from tests.dashboard.browsing import eventually, serious_findings, settle, wide
from tests.measure.made_up import made_record

linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc, which Linux has")
SMALL = "?model=EleutherAI/pythia-70m&gpu=t4&seq_len=64"
LARGE = "?model=meta-llama/Llama-3.1-405B&gpu=h200&method=full&seq_len=4096"
SIZES = ((390, 844), (1366, 768), (1920, 1080))
WORKER = "planner.simulate.worker"


def workers_of(server: int) -> list[int]:
    """Process ids of the simulating processes that this server has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server and WORKER in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def gone(pid: int) -> bool:
    """Whether no such process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def soon(holds: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait for something outside of the page."""
    ends_at = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends_at, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


def simulate(page) -> None:
    """Press the button and wait for its end."""
    page.locator(".st-key-_simulate button:visible").click()
    page.get_by_text("Simulated peak").first.wait_for(timeout=120_000)
    settle(page)


def bar_rows(page) -> list[str]:
    """The labels of the stacked bars, top first."""
    chart = page.locator(".st-key-_bars .js-plotly-plot").last  # the one before it may not have gone yet
    chart.wait_for(timeout=60_000)
    return chart.evaluate("plot => plot.data ? plot.data[0].y.map(String) : []")  # none while it is redrawn



@linux
def test_a_simulation_adds_rows_and_torch_stays_out_of_the_server(start_server, open_page) -> None:
    server = start_server()
    page = open_page(SMALL, at=server.address)
    assert len(bar_rows(page)) == 2
    assert workers_of(server.process.pid) == [], "nothing is started before it is asked for"
    simulate(page)
    eventually(page, lambda: len(bar_rows(page)) == 4, "a simulated row for each method")
    assert sum("simulated" in row for row in bar_rows(page)) == 2
    assert page.locator(".st-key-_timeline .js-plotly-plot").count() == 1
    (worker,) = workers_of(server.process.pid)

    other = open_page(f"{SMALL}&micro_batch_size=2", at=server.address)
    simulate(other)
    assert workers_of(server.process.pid) == [worker], "two sessions share one process"
    assert "libtorch" in Path(f"/proc/{worker}/maps").read_text(), "this look finds torch where it is"
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()

    page.locator(".st-key-seq_len input").fill("128")
    page.locator(".st-key-seq_len input").press("Enter")
    eventually(page, lambda: len(bar_rows(page)) == 2, "no simulation of another setup")

    other.context.close()
    time.sleep(1)
    assert not gone(worker), "somebody who has simulated is still here"
    page.context.close()
    soon(lambda: gone(worker), "the end of the process after the last tab")


@linux
def test_cancel_ends_the_process_and_a_crash_is_one_line(start_server, open_page) -> None:
    server = start_server()
    page = open_page(LARGE, at=server.address)
    page.locator(".st-key-_simulate button:visible").click()
    page.locator(".st-key-_cancel_simulation button").wait_for(timeout=30_000)
    soon(lambda: workers_of(server.process.pid), "a process")
    (worker,) = workers_of(server.process.pid)
    settle(page)  # the button has found its place
    page.locator(".st-key-_cancel_simulation button").click()
    soon(lambda: gone(worker), "its end")
    page.locator(".st-key-_simulate button:visible").wait_for(timeout=30_000)
    settle(page)

    page.locator(".st-key-_simulate button:visible").click()
    soon(lambda: workers_of(server.process.pid), "another process")
    (worker,) = workers_of(server.process.pid)
    os.kill(worker, signal.SIGKILL)
    page.get_by_text("The simulation failed").wait_for(timeout=30_000)
    assert "SIGKILL" in page.locator("[data-testid=stMain]").inner_text()
    assert page.get_by_role("button", name="Try again").count() == 1


@linux
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["ended", "killed"])
def test_no_process_outlives_its_server(start_server, open_page, how) -> None:
    server = start_server()
    page = open_page(LARGE, at=server.address)
    page.locator(".st-key-_simulate button:visible").click()
    soon(lambda: workers_of(server.process.pid), "a process")
    (worker,) = workers_of(server.process.pid)
    page.goto("about:blank")  # or the page reports the lost connection
    server.process.send_signal(how)
    soon(lambda: server.process.poll() is not None, "the server's end")
    soon(lambda: gone(worker), "the process's end")


@linux
def test_a_closed_tab_takes_its_running_simulation_along(start_server, open_page) -> None:
    server = start_server()
    page = open_page(LARGE, at=server.address)
    page.locator(".st-key-_simulate button:visible").click()
    soon(lambda: workers_of(server.process.pid), "a process")
    (worker,) = workers_of(server.process.pid)
    page.context.close()
    soon(lambda: gone(worker), "its end")


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", ["measure", "accuracy"])
def test_the_pages_stand_at_every_size_and_axe_finds_nothing_serious(open_page, name, mode) -> None:
    page = open_page(f"{name}{SMALL}", mode=mode)
    assert page.locator("h1").count() == 1
    if name == "accuracy":
        page.locator(".st-key-_errors .js-plotly-plot .main-svg").first.wait_for(timeout=60_000)
    page.wait_for_timeout(1000)
    assert serious_findings(page) == []
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(400)
        eventually(page, lambda: wide(page) <= 0, f"no sideways scroll at {width} px")


def upload(page, data: bytes) -> None:
    """Choose a file of records."""
    page.locator(".st-key-_records_upload input[type=file]").set_input_files(
        {"name": "records.jsonl", "mimeType": "application/jsonl", "buffer": data}
    )


def test_an_uploaded_record_stands_beside_the_prediction_in_this_session_only(open_page) -> None:
    link = "measure?model=EleutherAI/pythia-70m&lora_rank=4&seq_len=16"
    page = open_page(link)
    upload(page, json.dumps(made_record(estimate=1.01).to_dict()).encode())
    page.get_by_text("1 record read").wait_for(timeout=30_000)
    settle(page)
    main = page.locator("[data-testid=stMain]")
    assert "Imaginary GPU" in main.inner_text()
    assert "Uploaded" in main.inner_text()
    page.get_by_role("link", name="Accuracy").click()
    page.get_by_text("Uploaded by you (1)").wait_for(timeout=30_000)
    assert "Imaginary GPU" not in open_page(link).locator("[data-testid=stMain]").inner_text()


def test_a_hostile_upload_is_one_line(open_page) -> None:
    page = open_page("measure")
    for data, line in (
        (b"[" * 90_000, "not a line of JSON"),
        (b"<script>alert(1)</script>", "not a line of JSON"),
    ):
        upload(page, data)
        page.get_by_text(line).first.wait_for(timeout=30_000)
        settle(page)
        assert "Traceback" not in page.content()


def test_accuracy_is_filtered_and_downloaded(start_server, open_page, tmp_path) -> None:
    for precision in ("bf16", "fp32"):
        append(made_record(precision=precision), tmp_path / "records.jsonl")
    server = start_server(PLANNER_RECORDS_DIR=str(tmp_path))
    page = open_page("accuracy", at=server.address)
    assert page.locator("[data-testid=stMetric]").first.inner_text().split() == ["Runs", "2"]
    box = page.locator(".st-key-_filter_ours_recipe input")
    box.click()
    box.fill("fp32")
    box.press("Enter")
    metric = page.locator("[data-testid=stMetric]").first
    eventually(page, lambda: metric.inner_text().split() == ["Runs", "1"], "one run")
    settle(page)
    with page.expect_download() as waiting:
        page.locator(".st-key-_runs_json button").click()
    (run,) = json.loads(waiting.value.path().read_text())
    assert run["setup"]["precision"] == "fp32"
    with page.expect_download() as waiting:
        page.locator(".st-key-_runs_csv button").click()
    assert len(waiting.value.path().read_text().splitlines()) == 2
