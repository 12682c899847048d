"""Many sessions at once against a real server: `python -m benchmarks.dashboard_soak`.

Every visitor changes an input every few seconds. Fails where a session saw an error or no verdict, and where
the server's memory grew from the second to the last third of the time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.page_server import ARGUMENTS, PageServer, page_server, percentile
from benchmarks.visitor import Run, Visitor

MIB = 1 << 20
SEQ_LENS = (64, 128, 192, 256, 320, 512, 640, 768, 1024)
# The server may keep what it has computed (grids, models), and Python keeps freed memory: not more than this.
MOST_GROWTH_BYTES = 48 * MIB


@dataclass
class Soak:
    """What the visitors saw, and the server's memory over time."""

    runs: list[Run] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, bytes
    browser_inputs: int = 0


async def visit(address: str, soak: Soak, until: float, think_s: float, seed: int) -> None:
    """One visitor: a link of its own, then an input every `think_s` seconds on average."""
    chance = random.Random(seed)
    await asyncio.sleep(chance.random() * think_s)
    try:
        async with Visitor(address) as visitor:
            first = await visitor.run(f"seq_len={chance.choice(SEQ_LENS)}")
            soak.runs.append(first)
            while time.perf_counter() < until:
                await asyncio.sleep(think_s * (0.5 + chance.random()))
                changed: dict[str, int | bool] = {"seq_len": chance.choice(SEQ_LENS)}
                if chance.random() < 0.4:
                    changed["micro_batch_size"] = chance.randint(1, 16)
                if chance.random() < 0.2:
                    changed["activation_checkpointing"] = chance.random() < 0.5
                soak.runs.append(await visitor.run(**changed))
    except Exception as error:  # whatever ends a visit is a finding
        soak.errors.append(f"session {seed}: {type(error).__name__}: {error}")


def browse(address: str, soak: Soak, until: float, think_s: float, tabs: int) -> None:
    """Real tabs of Chromium that take turns; console errors and exceptions on the page are findings."""
    import shutil

    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        pages = []
        for _ in range(tabs):
            page = browser.new_context().new_page()
            page.on("pageerror", lambda error: soak.errors.append(f"page error: {error}"))
            page.on(
                "console",
                lambda line: soak.errors.append(f"console: {line.text}") if line.type == "error" else None,
            )
            page.goto(address)
            page.wait_for_selector("h1", timeout=60_000)
            pages.append(page)
        while time.perf_counter() < until:
            for page in pages:
                box = page.locator(".st-key-seq_len input")
                box.fill(str(random.choice(SEQ_LENS)))
                box.press("Enter")
                page.wait_for_timeout(1000 * think_s / tabs)
                soak.browser_inputs += 1
                if page.locator("[data-testid=stException]").count():
                    soak.errors.append("an exception on the page")
        browser.close()


async def watch(server: PageServer, soak: Soak, begun: float, until: float) -> None:
    """The server's memory every second."""
    while time.perf_counter() < until:
        soak.memory.append((time.perf_counter() - begun, server.resident_bytes()))
        await asyncio.sleep(1)


async def soaked(server: PageServer, given: argparse.Namespace) -> Soak:
    """Let all visitors loose for the given time."""
    soak = Soak()
    begun = time.perf_counter()
    until = begun + given.seconds
    tabs = threading.Thread(target=browse, args=(server.address, soak, until, given.think, given.browsers))
    if given.browsers:
        tabs.start()
    visits = [
        visit(server.address, soak, until, given.think, n) for n in range(given.sessions - given.browsers)
    ]
    await asyncio.gather(watch(server, soak, begun, until), *visits)
    if given.browsers:
        await asyncio.to_thread(tabs.join)
    return soak


def growth_bytes(soak: Soak) -> int:
    """Largest memory in the last third less the largest in the second: a server that keeps growing shows."""
    last = soak.memory[-1][0]
    thirds: list[list[int]] = [[], [], []]
    for at, size in soak.memory:
        thirds[min(2, int(3 * at / last))].append(size)
    return max(thirds[2]) - max(thirds[1])


def figures(soak: Soak, server: PageServer, given: argparse.Namespace) -> dict[str, Any]:
    """The result as JSON values."""
    verdicts = [1000 * run.verdict_s for run in soak.runs if run.verdict_s is not None]
    errors = soak.errors + [line for run in soak.runs for line in run.errors]
    errors += ["a run without a verdict" for run in soak.runs if run.verdict_s is None]
    if server.process.poll() is not None:
        errors.append(f"the server ended with {server.process.returncode}")
    grown = growth_bytes(soak)
    if grown > MOST_GROWTH_BYTES:
        errors.append(f"the server grew by {grown / MIB:.0f} MiB between the second and the last third")
    return {
        "sessions": given.sessions,
        "browsers": given.browsers,
        "seconds": given.seconds,
        "script_runs": len(soak.runs),
        "browser_inputs": soak.browser_inputs,
        "verdict_p50_ms": round(percentile(verdicts, 0.5)) if verdicts else None,
        "verdict_p95_ms": round(percentile(verdicts, 0.95)) if verdicts else None,
        "run_p95_ms": round(1000 * percentile([run.finished_s for run in soak.runs], 0.95))
        if soak.runs
        else None,
        "memory_start_mib": round(soak.memory[0][1] / MIB),
        "memory_peak_mib": round(max(size for _, size in soak.memory) / MIB),
        "memory_end_mib": round(soak.memory[-1][1] / MIB),
        "memory_growth_mib": round(grown / MIB, 1),
        "errors": errors,
    }


def main() -> None:
    """Soak the page and print what was seen; ends with 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=20, help="sessions at once")
    parser.add_argument("--browsers", type=int, default=2, help="how many of them are real tabs of Chromium")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--think", type=float, default=4, help="mean seconds between two inputs of a session")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with page_server(log) as server:
            soak = asyncio.run(soaked(server, given))
            found = figures(soak, server, given)
        lines = log.read_text(errors="replace").splitlines()
        found["errors"] += [line for line in lines if "Traceback" in line or "Error" in line][:10]
    if given.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:20} {value}")
    raise SystemExit(1 if found["errors"] else 0)


if __name__ == "__main__":
    main()
