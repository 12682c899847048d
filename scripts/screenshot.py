"""Make the README's picture of the Plan page, docs/plan.png: `python scripts/screenshot.py`.

Starts the page on a free port and photographs it with the machine's own Chromium; needs playwright. The plot
of the recorded runs: `--link accuracy --only .js-plotly-plot --out docs/accuracy.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def main() -> None:
    """Photograph the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plan.png")
    parser.add_argument("--link", default="", help="what follows the address, such as ?method=full")
    parser.add_argument("--size", default="1366x768", help="width x height of the window in CSS pixels")
    parser.add_argument("--scale", type=float, default=1.5, help="pixels of the picture for each CSS pixel")
    parser.add_argument("--only", default="", help="CSS selector of the one element to photograph")
    parser.add_argument("--mode", choices=("light", "dark"), default="light")
    given = parser.parse_args()
    width, height = (int(number) for number in given.size.split("x"))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with page_server() as address:
        photograph(
            f"{address}/{given.link}", given.out, (width, height), given.scale, given.mode, given.only
        )
    print(given.out)


@contextlib.contextmanager
def page_server() -> Iterator[str]:
    """The page on a free port of the loopback interface, ended afterwards."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless", "true"]
    words += ["--server.address", "127.0.0.1", "--server.port", str(port)]
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(150):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/_stcore/health", timeout=5):
                break
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)


def photograph(
    address: str, out: Path, size: tuple[int, int], scale: float, mode: str, only: str = ""
) -> None:
    """Wait until the first figure stands, then write the picture, of the first element `only` if given."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, device_scale_factor=scale, color_scheme=mode
        )
        page = context.new_page()
        page.goto(address)
        page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
        page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=60_000)
        page.wait_for_timeout(1500)
        (page.locator(only).first if only else page).screenshot(path=out)
        browser.close()


if __name__ == "__main__":
    main()
