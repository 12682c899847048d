"""A visitor without a browser: one session over streamlit's own web socket.

It sends what the page's script in a browser sends (`BackMsg`), and reads what the browser would draw
(`ForwardMsg`), so that many sessions fit on a small machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import websockets
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

VERDICTS = ("Fits", "Tight", "Does not fit", "Not known", "Whether")
_LARGEST_MESSAGE_BYTES = 1 << 26


@dataclass
class Run:
    """One run of the page's script as the visitor sees it."""

    verdict_s: float | None = None  # until the verdict was there
    finished_s: float = 0.0
    received_bytes: int = 0
    verdict: str = ""
    errors: list[str] = field(default_factory=list)


class Visitor:
    """`async with Visitor(address) as visitor: await visitor.run(seq_len=640)`."""

    def __init__(self, address: str) -> None:
        self.address = address.replace("http", "ws", 1) + "/_stcore/stream"
        self.widgets: dict[str, str] = {}  # key of an input -> its id in the page
        self.values: dict[str, int | bool] = {}
        self._stack = contextlib.AsyncExitStack()
        self._socket: Any = None

    async def __aenter__(self) -> Visitor:
        """Open the session."""
        connecting = websockets.connect(
            self.address, subprotocols=["streamlit"], max_size=_LARGEST_MESSAGE_BYTES, proxy=None
        )
        self._socket = await self._stack.enter_async_context(connecting)
        return self

    async def __aexit__(self, *_reason: object) -> None:
        """Close it, as a closed tab does."""
        await self._stack.aclose()

    async def run(self, query: str = "", timeout_s: float = 60, **values: int | bool) -> Run:
        """Set inputs by their keys and wait until the script has finished."""
        self.values |= values
        message = BackMsg()
        message.rerun_script.query_string = query
        for key, value in self.values.items():
            state = message.rerun_script.widget_states.widgets.add(id=self.widgets[key])
            if isinstance(value, bool):
                state.bool_value = value
            else:
                state.int_value = value
        begun, seen = time.perf_counter(), Run()
        await self._socket.send(message.SerializeToString())
        async with asyncio.timeout(timeout_s):
            while not seen.finished_s:
                data = await self._socket.recv()
                seen.received_bytes += len(data)
                self._take(ForwardMsg.FromString(data), seen, time.perf_counter() - begun)
        return seen

    def _take(self, message: ForwardMsg, seen: Run, elapsed_s: float) -> None:
        kind = message.WhichOneof("type")
        if kind == "script_finished":
            if message.script_finished == ForwardMsg.FINISHED_SUCCESSFULLY:
                seen.finished_s = elapsed_s
            elif message.script_finished == ForwardMsg.FINISHED_WITH_COMPILE_ERROR:
                seen.errors.append("the script does not compile")
                seen.finished_s = elapsed_s
        elif kind == "delta" and message.delta.WhichOneof("type") == "new_element":
            self._take_element(message.delta.new_element, seen, elapsed_s)

    def _take_element(self, element: Any, seen: Run, elapsed_s: float) -> None:
        kind = element.WhichOneof("type")
        inner = getattr(element, kind)
        if kind == "exception":
            seen.errors.append(f"{inner.type}: {inner.message}"[:300])
        elif kind == "alert" and inner.body.replace("*", "").startswith(VERDICTS):
            seen.verdict, seen.verdict_s = inner.body.replace("*", ""), elapsed_s
        elif kind in ("number_input", "checkbox"):
            self.widgets[inner.id.rpartition("-")[2]] = inner.id
