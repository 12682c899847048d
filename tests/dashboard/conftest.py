"""The page without a browser (AppTest), and in a real one over a real server."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.browsing import settle

ROOT = Path(__file__).resolve().parents[2]
OpenApp = Callable[..., Any]
OpenPage = Callable[..., Any]
# Streamlit's own, before it knows where its server is: a page opened below the root asks there first.
PROBES = re.compile(r"/_stcore/(health|host-config)$")


@pytest.fixture
def open_app() -> OpenApp:
    """`open_app(seq_len="64")`: the Plan page of that link after its first run."""
    from streamlit.testing.v1 import AppTest

    def opened(**link: str) -> Any:
        app = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
        app.query_params.update(link)
        return app.run()

    return opened


@dataclass(frozen=True)
class Server:
    """A real server: its address and its process."""

    address: str
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def running_server(**environment: str) -> Iterator[Server]:
    """A server on a free port, ended with the block."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless", "true",
         "--server.address", "127.0.0.1", "--server.port", str(port)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(address, process)
        yield Server(address, process)
    finally:
        process.terminate()
        process.wait(timeout=20)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a real server, one for the whole module."""
    with running_server() as started:
        yield started.address


@pytest.fixture
def start_server() -> Iterator[Callable[..., Server]]:
    """`start_server(NAME="value")`: a server of the test's own with this environment."""
    with contextlib.ExitStack() as stack:
        yield lambda **environment: stack.enter_context(running_server(**environment))


@pytest.fixture
def open_page(browser: Any, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    """`open_page("?seq_len=64")` opens a page of the module's server, or of the server at `at`, and waits
    until it stands; errors fail the test at its end.
    """
    contexts, failures = [], []

    def opened(
        link: str = "", *, size: tuple[int, int] = (1366, 768), mode: str = "light", at: str | None = None
    ) -> Any:
        context = browser.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=mode, accept_downloads=True
        )
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.on("pageerror", lambda error: failures.append(f"page error: {error}"))
        page.on("console", lambda line: failures.append(line.text) if line.type == "error" else None)
        page.on("response", lambda r: failures.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.goto(f"{at or request.getfixturevalue('server')}/{link}")
        page.wait_for_selector("h1", timeout=60_000)
        settle(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    probed = any(PROBES.search(line) for line in failures)
    assert [f for f in failures if not PROBES.search(f) and not (probed and "status of 404" in f)] == []


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """Headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(
            executable_path=chromium,
            args=[
                "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                "--disable-component-update", "--disable-sync",
            ],
        )  # fmt: skip
        yield started
        started.close()


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "streamlit ended at once"
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{address}/_stcore/health", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise AssertionError("the server was not healthy within a minute")
