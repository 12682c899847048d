"""The pages in a real browser over a real server: what AppTest cannot see."""

from __future__ import annotations

import csv
import io
import json
from urllib.parse import parse_qs, urlsplit

import pytest

from planner import catalog
from planner.report import PARTS, MemoryReport
from tests.dashboard.browsing import eventually, serious_findings, settle

VERDICT = "[data-testid=stAlert]"
SIZES = ((390, 844), (1366, 768), (1920, 1080))


def verdict(page) -> str:
    """The verdict's sentence."""
    return (
        str(page.locator(VERDICT).last.inner_text()).strip().split("\n")[-1]
    )  # the icon's name stands first


def shows(page, **values: str) -> None:
    """Wait until the inputs show these values."""
    for name, value in values.items():
        box = page.locator(f".st-key-{name} input")
        eventually(page, lambda box=box, value=value: box.input_value() == value, f"{name} is {value}")


def fill(page, name: str, text: str) -> None:
    """Type into an input and commit."""
    box = page.locator(f".st-key-{name} input")
    box.fill(text)
    box.press("Enter")
    settle(page)


def query(page) -> dict[str, list[str]]:
    """The parameters in the page's address."""
    return parse_qs(urlsplit(page.url).query)


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_first_load(open_page, size, mode) -> None:
    page = open_page(size=size, mode=mode)
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
    assert page.title() == "Plan | VRAM Planner"
    assert page.locator("h1").all_inner_texts() == ["Does it fit?"]
    assert verdict(page).startswith(("Fits", "Tight", "Does not fit"))
    box = page.locator(VERDICT).last.bounding_box()
    assert box["y"] + box["height"] <= size[1], "the verdict is not on the first screen"
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    wide = page.evaluate(
        "(e => e.scrollWidth - e.clientWidth)(document.querySelector('[data-testid=stMain]'))"
    )
    assert wide <= 0, "the page scrolls sideways"
    dark = (
        page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
        == "rgb(15, 22, 32)"
    )
    assert dark == (mode == "dark")


def test_the_first_figure_is_on_the_first_screen(open_page) -> None:
    page = open_page(size=(1366, 768))
    chart = page.locator(".st-key-_bars .js-plotly-plot")
    chart.wait_for(timeout=60_000)
    box = chart.bounding_box()
    assert box["y"] + box["height"] <= 768
    assert page.locator(".st-key-_bars .bars path").count() >= 2 * len(PARTS)


def test_an_input_changes_the_verdict_and_the_address_and_a_link_brings_it_back(open_page) -> None:
    page = open_page()
    before = verdict(page)
    fill(page, "seq_len", "256")
    eventually(page, lambda: verdict(page) != before, "another verdict")
    assert query(page) == {"seq_len": ["256"]}
    page.get_by_role("radio", name="full").click()
    eventually(page, lambda: verdict(page).startswith("Does not fit"), "the verdict of full fine-tuning")
    assert query(page) == {"seq_len": ["256"], "method": ["full"]}

    page.get_by_role("button", name="Copy link").click()
    text = page.locator("[data-testid=stPopoverBody] code").inner_text().replace("\n", "")
    link = parse_qs(urlsplit(text).query)
    assert link["v"] == ["1"]
    assert {"model", "gpu", "precision", "optimizer", "micro_batch_size", "attention"} < set(link)
    again = open_page(f"?{urlsplit(text).query}")
    assert verdict(again) == verdict(page)
    shows(again, seq_len="256")


def test_the_back_button_undoes_an_input(open_page) -> None:
    page = open_page("?seq_len=1024")
    before = verdict(page)
    page.goto(page.url.replace("1024", "64"))
    page.wait_for_selector("h1")
    settle(page)
    assert verdict(page) != before
    page.go_back()
    page.wait_for_selector("h1")
    settle(page)
    assert verdict(page) == before


def test_apply_changes_input_address_and_verdict(open_page) -> None:
    page = open_page("?method=full")
    assert verdict(page).startswith("Does not fit")
    page.locator(".st-key-_apply_nearest button").click()
    eventually(page, lambda: verdict(page).startswith("Fits"), "a verdict that fits")
    assert "method" not in query(page)  # LoRA is the page's default


def test_reset_leaves_a_clean_address(open_page) -> None:
    page = open_page("?seq_len=64&micro_batch_size=2&gpu=t4")
    page.get_by_role("button", name="Reset").click()
    eventually(page, lambda: query(page) == {}, "a clean address")
    shows(page, seq_len="512")


def test_a_click_in_the_grid_sets_both_inputs(open_page) -> None:
    page = open_page(size=(1366, 2600))
    figure = page.locator("[class*=st-key-_grid_] .js-plotly-plot")
    figure.wait_for(timeout=60_000)
    squares = figure.locator(".scatterlayer .trace:nth-child(2) .points path")
    assert squares.count() >= 2
    box = squares.first.bounding_box()
    wanted = figure.evaluate("plot => plot.data[1].customdata[0].slice(0, 2).map(String)")
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    settle(page)
    shows(page, micro_batch_size=wanted[0], seq_len=wanted[1])
    assert query(page)["seq_len"] == [wanted[1]]


def test_downloads_hold_the_numbers_on_the_page(open_page) -> None:
    page = open_page()
    with page.expect_download() as waiting:
        page.locator(".st-key-_csv button").click()
    lines = list(csv.reader(io.StringIO(waiting.value.path().read_text())))
    assert [line[0] for line in lines[1:]] == [*PARTS, "peak_allocated_bytes"]
    with page.expect_download() as waiting:
        page.locator(".st-key-_json button").click()
    reports = {k: MemoryReport.from_dict(v) for k, v in json.loads(waiting.value.path().read_text()).items()}
    assert list(reports) == lines[0][1:] == ["Full fine-tuning, predicted", "LoRA, predicted"]
    assert [str(r.peak_allocated_bytes) for r in reports.values()] == lines[-1][1:]


def test_wrong_values_in_a_link_are_named_and_the_defaults_stay(open_page) -> None:
    page = open_page("?gpu=nonsense&seq_len=-5&method=lorra")
    said = " ".join(page.locator(VERDICT).all_inner_texts())
    for part in ("unknown GPU 'nonsense'", "seq_len must be", "did you mean lora, qlora?"):
        assert part in said
    assert verdict(page).startswith(("Fits", "Tight"))
    assert query(page) == {}


def test_a_config_json_is_uploaded_and_a_hostile_one_refused(open_page) -> None:
    page = open_page()
    config = json.dumps(catalog.catalogue_entry("openai-community/gpt2")["config"]).encode()
    for text, ending in ((b"[" * 100_000, "nests deeper"), (config, None)):
        page.get_by_role("button", name="Use my own config.json").click()
        page.locator(".st-key-_upload input[type=file]").set_input_files(
            {"name": "config.json", "mimeType": "application/json", "buffer": text}
        )
        page.wait_for_selector("[data-testid=stFileChip]")
        settle(page)
        page.locator(".st-key-_use_config button").click()
        page.get_by_role("button", name="Back to the catalogue").wait_for()
        settle(page)
        said = " ".join(page.locator(VERDICT).all_inner_texts())
        assert (ending in said) if ending else "nests" not in said
        assert "Traceback" not in page.content()
        if ending:
            page.get_by_role("button", name="Back to the catalogue").click()
            page.get_by_role("button", name="Use my own config.json").wait_for()
    assert (
        "of 124.9 M" in page.locator("[data-testid=stMetric]").nth(2).inner_text()
    )  # GPT-2 and its adapters


def test_the_inputs_stay_when_the_page_changes(open_page) -> None:
    page = open_page()
    fill(page, "seq_len", "320")
    page.get_by_role("link", name="Method").click()
    page.wait_for_function("document.querySelector('h1')?.innerText === 'How the number is made'")
    settle(page)
    assert "320 tokens" in page.locator("[data-testid=stMain]").inner_text()
    assert query(page) == {"seq_len": ["320"]}
    page.get_by_role("link", name="Plan").click()
    page.wait_for_function("document.querySelector('h1')?.innerText === 'Does it fit?'")
    settle(page)
    shows(page, seq_len="320")


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("link", ["", "?method=full", "method"], ids=["fits", "does-not-fit", "method"])
def test_axe_finds_nothing_serious(open_page, link, mode) -> None:
    page = open_page(link, mode=mode)
    page.wait_for_timeout(1500)
    assert serious_findings(page) == []


def test_the_keyboard_walks_the_inputs_in_their_order(open_page) -> None:
    page = open_page()
    page.wait_for_timeout(3_000)  # a sidebar that is still being drawn loses the focus
    reached: list[str] = []
    for _ in range(40):
        page.keyboard.press("Tab")
        page.wait_for_timeout(50)
        key = page.evaluate(
            "document.activeElement.closest('[class*=st-key-]')?.className.match(/st-key-(\\w+)/)[1]"
        )
        if key and key not in reached:
            reached.append(key)
    inputs = ["model", "method", "seq_len", "micro_batch_size", "activation_checkpointing", "gpu"]
    assert [key for key in reached if key in inputs] == inputs
    assert reached.index("_reset") > reached.index("gpu")
