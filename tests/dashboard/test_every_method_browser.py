"""Every method in a real browser: rows become simulated by themselves, Stop ends it, no sideways scroll."""

from __future__ import annotations

from tests.dashboard.browsing import eventually, settle, wide

SMALL = "?model=EleutherAI/pythia-70m&gpu=t4&seq_len=64"
TABLE = "[role=region][aria-label='Every method, sorted by peak']"


def sources(page) -> list[str]:
    """The third column: predicted, simulated or simulate."""
    return page.locator(f"{TABLE} tbody tr td:nth-child(4)").all_inner_texts()



def test_methods_are_simulated_one_by_one_until_stopped(start_server, open_page) -> None:
    page = open_page(SMALL, at=start_server().address)
    page.locator(".st-key-_every_method label").click()
    page.locator(TABLE).wait_for(timeout=30_000)
    settle(page)
    assert "predicted" in sources(page)
    assert "simulated" not in sources(page)
    page.locator(".st-key-_every_method_simulate button:visible").click()
    eventually(page, lambda: sources(page).count("simulated") >= 4, "rows simulated without another click")
    page.set_viewport_size({"width": 390, "height": 844})
    eventually(page, lambda: wide(page) <= 0, "no sideways scroll on a phone")
    page.locator(".st-key-_every_method_stop button:visible").click()
    page.locator(".st-key-_every_method_simulate button:visible").wait_for(timeout=30_000)
    settle(page)
    stands = sources(page).count("simulated")
    page.wait_for_timeout(3000)
    assert sources(page).count("simulated") <= stands + 1
