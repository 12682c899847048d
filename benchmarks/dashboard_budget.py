"""How fast the page is, in a real browser, beside what it may take: `python -m benchmarks.dashboard_budget`.

Every figure is printed with its budget. Ratios matter more than seconds on a shared machine, so the exit code
is 0 unless `--strict` is given.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import time
from typing import Any

from benchmarks.page_server import ARGUMENTS, ROOT, page_server, percentile

SEQ_LENS = (64, 128, 192, 256, 320, 384, 448, 640, 704, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072)
VERDICT = "[data-testid=stAlert]"
KIB = 1024
# name -> (title, unit, budget); None: no budget is set, the figure is watched.
BUDGET: dict[str, tuple[str, str, float | None]] = {
    "ready_s": ("Server ready", "s", 3),
    "cold_verdict_s": ("Verdict, first visitor of a fresh server", "s", None),
    "first_paint_s": ("First paint, warm", "s", None),
    "verdict_s": ("Verdict visible, warm", "s", 3),
    "input_p50_ms": ("Input to new verdict, p50", "ms", 300),
    "input_p95_ms": ("Input to new verdict, p95", "ms", 600),
    "rerun_ms": ("Script rerun, median", "ms", 60),
    "estimate_ms": ("estimate(), median", "ms", 1),
    "load_kib": ("First load over the wire", "KiB", None),
    "again_kib": ("The same page opened again", "KiB", None),
    "input_kib": ("One input over the wire", "KiB", None),
    "idle_frames": ("Messages of an idle page in 5 s", "", 0),
}
# In the page: the time from the Enter key to the verdict's next text.
_WATCH = """selector => {
  const verdict = () => [...document.querySelectorAll(selector)].at(-1)?.innerText;
  window.__changed = null;
  document.addEventListener('keydown', event => {
    if (event.key !== 'Enter') return;
    const begun = performance.now(), before = verdict();
    window.__changed = null;
    const look = () => {
      const now = verdict();
      if (now && now !== before) window.__changed = performance.now() - begun;
      else requestAnimationFrame(look);
    };
    look();
  }, true);
}"""


def measured(inputs: int) -> dict[str, float]:
    """Start a server and a browser and take every figure of BUDGET."""
    from playwright.sync_api import sync_playwright

    found: dict[str, float] = {}
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with page_server() as server, sync_playwright() as driver:
        found["ready_s"] = server.ready_s
        browser = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        found["cold_verdict_s"] = Tab(browser, server.address).verdict_s
        tabs = [Tab(browser, server.address) for _ in range(3)]  # each a visitor with an empty cache
        found["verdict_s"] = statistics.median(tab.verdict_s for tab in tabs)
        found["first_paint_s"] = statistics.median(tab.first_paint_s() for tab in tabs)
        tab = tabs[-1]
        tab.settle()
        found["load_kib"] = tab.received_bytes / KIB
        seconds, sizes = tab.typed(inputs)
        found["input_p50_ms"] = percentile(seconds, 0.5)
        found["input_p95_ms"] = percentile(seconds, 0.95)
        found["input_kib"] = statistics.median(sizes) / KIB
        found["idle_frames"] = tab.idle_frames(5)
        again = Tab(browser, server.address, tab.context)
        again.settle()
        found["again_kib"] = again.received_bytes / KIB
        browser.close()
    return found | in_process()


class Tab:
    """A tab of a visitor of its own (or of a given one), opened at once; counts the bytes that arrive."""

    def __init__(self, browser: Any, address: str, context: Any = None) -> None:
        self.received_bytes = self.frames = 0
        self.context = context or browser.new_context(viewport={"width": 1366, "height": 768})
        self.page = self.context.new_page()
        network = self.context.new_cdp_session(self.page)
        network.send("Network.enable")
        network.on("Network.loadingFinished", self._loaded)
        network.on("Network.webSocketFrameReceived", self._received)
        begun = time.perf_counter()
        self.page.goto(address, wait_until="commit")
        self.page.wait_for_selector(VERDICT, timeout=60_000)
        self.verdict_s = time.perf_counter() - begun

    def first_paint_s(self) -> float:
        """The browser's own first contentful paint."""
        paints = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
        return float(self.page.evaluate(paints)) / 1000

    def settle(self) -> None:
        """Wait until everything is drawn and quiet."""
        self.page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
        self.page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=60_000)
        self.page.wait_for_timeout(800)

    def typed(self, inputs: int) -> tuple[list[float], list[float]]:
        """Type a new sequence length `inputs` times: milliseconds to another verdict, and bytes of each."""
        self.page.evaluate(_WATCH, VERDICT)
        box = self.page.locator(".st-key-seq_len input")
        milliseconds, sizes = [], []
        for number in range(inputs):
            before_bytes = self.received_bytes
            box.fill(str(SEQ_LENS[number % len(SEQ_LENS)]))
            box.press("Enter")
            self.page.wait_for_function("window.__changed !== null", timeout=30_000)
            milliseconds.append(float(self.page.evaluate("window.__changed")))
            self.settle()
            sizes.append(self.received_bytes - before_bytes)
        return milliseconds, sizes

    def idle_frames(self, seconds: float) -> int:
        """Messages from the server while nobody touches the page."""
        before = self.frames
        self.page.wait_for_timeout(1000 * seconds)
        return self.frames - before

    def _loaded(self, event: dict[str, Any]) -> None:
        self.received_bytes += int(event["encodedDataLength"])

    def _received(self, event: dict[str, Any]) -> None:
        response = event["response"]
        size = len(response["payloadData"])
        self.received_bytes += size * 3 // 4 if response["opcode"] == 2 else size  # binary comes as base64
        self.frames += 1


def in_process() -> dict[str, float]:
    """A rerun of the page's script without a browser, and one estimate."""
    from streamlit.testing.v1 import AppTest

    from planner.estimate import estimate
    from planner.spec import LoRA, Setup

    logging.getLogger("streamlit").setLevel(logging.CRITICAL)
    app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    reruns = []
    for number in range(15):
        app.number_input(key="seq_len").set_value(500 + number)
        reruns.append(_milliseconds(app.run))
    setup = Setup(model="meta-llama/Llama-3.1-8B", method=LoRA(), gpu="rtx-4090")
    estimates = [_milliseconds(lambda: estimate(setup)) for _ in range(101)]
    return {"rerun_ms": statistics.median(reruns), "estimate_ms": statistics.median(estimates)}


def _milliseconds(run: Any) -> float:
    begun = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begun)


def main() -> None:
    """Measure, and print each figure beside its budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20, help="inputs that are typed and timed")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--strict", action="store_true", help="end with 1 where a budget is exceeded")
    given = parser.parse_args()
    found = measured(given.inputs)
    if given.json:
        print(json.dumps({name: round(value, 3) for name, value in found.items()}))
    else:
        print(f"{'':42} {'seen':>10} {'budget':>10}")
        for name, (title, unit, budget) in BUDGET.items():
            most = "" if budget is None else f"{budget:g} {unit}"
            over = "  over" if budget is not None and found[name] > budget else ""
            print(f"{title:42} {_shown(found[name], unit):>10} {most:>10}{over}")
    over = [name for name, (_, _, most) in BUDGET.items() if most is not None and found[name] > most]
    raise SystemExit(1 if given.strict and over else 0)


def _shown(value: float, unit: str) -> str:
    digits = 2 if unit == "s" or value < 1 else 0
    return f"{value:.{digits if unit else 0}f} {unit}".strip()


if __name__ == "__main__":
    main()
