"""Pins, the number of tasks and the training script in a real browser: address, download, titles."""

from __future__ import annotations

import io
import json
import zipfile
from urllib.parse import parse_qs, urlsplit

import pytest

from planner.export import exported
from planner.spec import LoRA, Setup
from tests.dashboard.browsing import eventually, serious_findings, settle, wide

GPT2 = "model:openai-community/gpt2~method:lora~gpu:t4~lora_rank:16"
COMPARED = ".st-key-_compared .js-plotly-plot .main-svg"


def query(page) -> dict[str, list[str]]:
    """The parameters in the page's address."""
    return parse_qs(urlsplit(page.url).query)


def test_a_pin_is_in_the_address_stays_over_the_pages_and_comes_back_from_it(open_page) -> None:
    page = open_page("?seq_len=256")
    page.locator(".st-key-_pin button").first.click()  # with a tooltip it is there twice
    page.wait_for_selector(COMPARED)
    settle(page)
    pinned = "model:meta-llama/Llama-3.1-8B~method:lora~gpu:rtx-4090~seq_len:256"
    assert query(page) == {"seq_len": ["256"], "pin_1": [pinned]}
    page.get_by_role("radio", name="full").click()
    eventually(page, lambda: "method" in query(page), "the method in the address")
    settle(page)
    page.get_by_role("link", name="Method").click()
    page.wait_for_function("document.querySelector('h1')?.innerText === 'How the number is made'")
    assert page.title() == "Method | VRAM Planner"
    page.get_by_role("link", name="Plan").click()
    page.wait_for_selector(COMPARED)
    settle(page)
    assert query(page)["pin_1"] == [pinned]
    again = open_page(f"?{urlsplit(page.url).query}")
    again.wait_for_selector(COMPARED)
    settle(again)
    table = "table:has(th:text-is('Pin 1'))"
    assert again.locator(table).inner_text() == page.locator(table).inner_text()
    again.locator(".st-key-_unpin_1 button").click()
    eventually(again, lambda: "pin_1" not in query(again), "no pin in the address")
    eventually(again, lambda: again.locator(COMPARED).count() == 0, "no comparison on the page")


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_three_pins_on_a_phone_do_not_scroll_sideways_and_axe_finds_nothing_serious(open_page, mode) -> None:
    page = open_page(
        "?" + "&".join(f"pin_{n}={GPT2}~seq_len:{64 * n}" for n in (1, 2, 3)), size=(390, 844), mode=mode
    )
    page.wait_for_selector(COMPARED)
    page.wait_for_timeout(1000)
    eventually(page, lambda: wide(page) <= 0, "no sideways scroll")
    assert serious_findings(page) == []


def test_the_training_script_is_downloaded_whole(open_page) -> None:
    page = open_page("?model=openai-community/gpt2&seq_len=64")
    with page.expect_download() as waiting:
        page.locator(".st-key-_export button").first.click()
    assert waiting.value.suggested_filename == "vram-plan.zip"
    with zipfile.ZipFile(io.BytesIO(waiting.value.path().read_bytes())) as archive:
        found = {name.removeprefix("vram-plan/"): archive.read(name).decode() for name in archive.namelist()}
    setup = Setup(model="openai-community/gpt2", method=LoRA(), gpu="rtx-4090").replace(seq_len=64)
    assert found == exported(setup)
    assert json.loads(found["settings.json"])["seq_len"] == 64


def test_the_number_of_tasks_is_in_the_address(open_page) -> None:
    page = open_page()
    box = page.locator(".st-key-tasks input")
    box.fill("12")
    box.press("Enter")
    eventually(page, lambda: query(page) == {"tasks": ["12"]}, "the tasks in the address")
    settle(page)
    assert "12 full copies" in page.locator("[data-testid=stMain]").inner_text()


def test_the_icon_is_the_page_s_own(open_page) -> None:
    icon = open_page().evaluate("document.querySelector('link[rel~=icon]').href")
    assert icon.startswith("data:image/svg+xml") or icon.endswith(".svg")
