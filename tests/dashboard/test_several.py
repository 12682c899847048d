"""Several GPUs on the Plan page: inputs, section, figure and tables, and the same in a browser."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from planner import Setup, Training
from planner.advise.shardings import shardings
from planner.dashboard import answers
from planner.dashboard.formulas import terms
from planner.dashboard.links import DEFAULTS
from planner.dashboard.several import by_number, by_number_alt, by_number_table, needs_table, options_table
from planner.estimate import estimate
from planner.units import GIB, gib
from tests.dashboard.browsing import settle

SETUP = Setup(
    model="meta-llama/Llama-3.1-8B",
    gpu="h100",
    training=Training(precision="bf16-mixed", activation_checkpointing=True, optimizer="adamw-fused"),
).replace(num_gpus=8, sharding="fsdp")


def change(app, **values: object):
    """Set inputs as a visitor does, and run again."""
    for name, value in values.items():
        app.number_input(key=name).set_value(value) if isinstance(value, int) else app.selectbox(
            key=name
        ).set_value(value)
    return app.run()


def headings(app) -> list[str]:
    return [one.value for one in app.subheader]


def test_one_gpu_shows_no_section_and_asks_for_none(open_app) -> None:
    app = open_app()
    assert "Several GPUs" not in headings(app)
    assert app.number_input(key="num_gpus").value == 1


def test_a_number_of_gpus_brings_a_sharding_and_takes_it_away_again(open_app) -> None:
    app = change(open_app(), num_gpus=8)
    assert not app.exception
    assert app.session_state["sharding"] == "fsdp"
    assert "Several GPUs" in headings(app)
    assert not app.error or "does not fit" in app.error[0].value.lower()
    planned = answers.setup_of(DEFAULTS).replace(num_gpus=8, sharding="fsdp")
    assert app.metric[0].value == gib(estimate(planned).peak_allocated_bytes)
    app = change(app, num_gpus=1)
    assert app.session_state["sharding"] == "none"
    assert "Several GPUs" not in headings(app)


def test_what_no_launcher_starts_is_said_in_a_line(open_app) -> None:
    app = change(open_app(), num_gpus=12)
    assert any("does not fill nodes of 8 GPUs" in box.value for box in app.error)


def test_the_figure_has_a_line_for_each_kind_and_the_card() -> None:
    found = shardings(SETUP)
    figure = by_number(found)
    names = [trace.name for trace in figure.data]
    assert names == ["ddp", "zero1", "zero2", "fsdp-grad-op", "fsdp", "zero3", "hsdp"]
    fsdp = figure.data[names.index("fsdp")]
    at = list(fsdp.x).index(8)
    assert fsdp.y[at] == estimate(SETUP).peak_allocated_bytes / GIB
    assert len(figure.layout.shapes) == 1
    assert "fsdp" in by_number_alt(found, 8) or "zero3" in by_number_alt(found, 8)


def test_the_tables_say_what_the_figure_says() -> None:
    found = shardings(SETUP)
    table = by_number_table(found)
    for option in found.options:
        assert gib(option.peak_allocated_bytes) in table
    here = options_table([option for option in found.options if option.num_gpus == 8], "fsdp")
    assert "<b>fsdp</b>" in here
    assert "<b>zero3</b>" not in here
    assert "NVIDIA H100 80GB HBM3" in needs_table(found.needs)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_the_formulas_are_those_of_the_sharding(kind: str) -> None:
    setup = SETUP.replace(sharding=kind)
    report = estimate(setup)
    found = {term.part: term for term in terms(setup, report)}
    alone = {term.part: term for term in terms(SETUP.replace(num_gpus=1, sharding="none"), report)}
    changed = {part for part in found if found[part].formula != alone[part].formula}
    assert {"gradients"} <= changed
    assert ("base_weights" in changed) == (kind != "ddp")
    for part, term in found.items():
        assert term.result == gib(getattr(report.parts, part))
        assert term.source


def test_in_a_browser_the_number_is_set_in_the_folded_part(open_page) -> None:
    page = open_page("?model=meta-llama/Llama-3.2-1B&method=full&gpu=h100")
    page.locator(".st-key-_sharding_settings summary").click()
    number = page.locator(".st-key-num_gpus input")
    number.fill("8")
    number.press("Enter")
    page.wait_for_selector(".st-key-_by_number .js-plotly-plot .main-svg")
    settle(page)
    asked = parse_qs(urlsplit(page.url).query)
    assert asked["num_gpus"] == ["8"]
    assert asked["sharding"] == ["fsdp"]
    assert page.get_by_text("All numbers are of one GPU of 8").is_visible()
    again = open_page(f"?{urlsplit(page.url).query}")
    again.wait_for_selector(".st-key-_by_number .js-plotly-plot .main-svg")
    settle(again)
    table = "table:has(th:text-is('Sent a step'))"
    assert again.locator(table).inner_text() == page.locator(table).inner_text()
