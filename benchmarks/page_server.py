"""The page on a free port of the loopback interface, for the benchmarks: start, memory, end."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
_KIB = 1024


@dataclass(frozen=True, kw_only=True)
class PageServer:
    """A running server: where it is, its process, and the seconds until it was healthy."""

    address: str
    process: subprocess.Popen[bytes]
    ready_s: float

    def resident_bytes(self) -> int:
        """Resident memory of the server's process (Linux: VmRSS). Excludes its child processes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * _KIB


@contextlib.contextmanager
def page_server(log: Path | None = None) -> Iterator[PageServer]:
    """A server that is ready, ended afterwards. `log` takes what it prints."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless", "true"]
    words += ["--server.address", "127.0.0.1", "--server.port", str(port)]
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        output = subprocess.DEVNULL if log is None else stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_healthy(address, process)
            yield PageServer(address=address, process=process, ready_s=time.perf_counter() - started)
        finally:
            process.terminate()
            process.wait(timeout=20)


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, the nearest one."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def _wait_until_healthy(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            raise SystemExit("the server ended at once; try: streamlit run app.py")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/_stcore/health", timeout=5):
            return
        time.sleep(0.05)
    raise SystemExit("the server was not healthy within a minute")
