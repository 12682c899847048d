"""A local stand-in for the Hugging Face Hub: real HTTP, the headers and error codes that the hub sends.

`with hub_server() as hub:` serves `hub.endpoint`; the repository's name decides how it answers, and
`hub.requests` records every request. Error codes as in huggingface_hub/utils/_http.py (hf_raise_for_status).
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}
REFUSALS = {  # repository -> status, X-Error-Code
    "org/gated": (401, "GatedRepo"),
    "org/gated-403": (403, "GatedRepo"),
    "org/missing": (401, "RepoNotFound"),
    "org/missing-404": (404, "RepoNotFound"),
    "org/no-config": (404, "EntryNotFound"),
    "org/no-main": (404, "RevisionNotFound"),
    "org/forbidden": (403, ""),
    "org/plain-404": (404, ""),
    "org/broken": (503, ""),
}
BODIES = {
    "org/garbage": b"{'not': json}",
    "org/html": b"<!doctype html><title>captive portal</title>",
    "org/nan": b'{"model_type": "llama", "hidden_size": NaN}',
    "org/list": b"[1, 2]",
    "org/binary": b"\xff\xfe\x00\x01",
    "org/deep": b'{"a":' + b"[" * 500_000,
}


@dataclass
class Hub:
    """A running server: where it is, whom it redirects to, what it was asked."""

    endpoint: str = ""
    other_host: str = "http://other.invalid"
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    flood_bytes: int = 0  # what org/flood could send before the client hung up

    @property
    def paths(self) -> list[str]:
        """The paths that were asked for, in order."""
        return [path for _, path, _ in self.requests]


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1 until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(("GET", self.path, dict(self.headers)))
            repository, _, rest = self.path.strip("/").partition("/resolve/")
            if rest not in ("main/config.json", "renamed/config.json"):
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            elif repository in REFUSALS:
                status, code = REFUSALS[repository]
                self._answer(status, b"{}", {"X-Error-Code": code} if code else {})
            elif repository in BODIES:
                self._answer(200, BODIES[repository], {})
            else:
                self._special(repository)

        def _special(self, repository: str) -> None:
            if repository == "org/slow":
                time.sleep(3)
            if repository == "org/huge":
                self._answer(200, b" " * (3 << 20), {})
            elif repository == "org/endless":
                self._stream(200, b" ", 0.05)
            elif repository == "org/flood":
                self._stream(256, b" " * (1 << 20), 0)
            elif repository == "org/old-name":
                self._answer(307, b"", {"Location": "/org/llama/resolve/main/config.json"})
            elif repository == "org/loop":
                self._answer(307, b"", {"Location": self.path})
            elif repository == "org/elsewhere":
                self._answer(302, b"", {"Location": f"{hub.other_host}/org/llama/resolve/main/config.json"})
            elif repository == "org/secret" and self.headers.get("Authorization") != "Bearer hf_right":
                self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            else:
                self._answer(200, json.dumps(LLAMA).encode(), {})

        def _stream(self, times: int, chunk: bytes, pause_seconds: float) -> None:
            """A body of unknown length, until the client hangs up."""
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(times):
                    self.wfile.write(chunk)
                    hub.flood_bytes += len(chunk)
                    time.sleep(pause_seconds)

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            sent = {"ETag": '"etag"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}
            for name, value in sent.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Quiet: a client that hangs up is what some of the tests are about."""

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
