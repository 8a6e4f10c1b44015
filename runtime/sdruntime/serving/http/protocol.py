"""uvicorn's HTTP protocol with deadlines: a client that sends slowly, or nothing, does not keep its connection."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD = 15.0  # seconds for the headers of a request, from the connection or from its first byte
BODY = 120.0  # seconds for a body
IDLE = 30  # seconds without a request, on a connection that had one


class Deadlines(H11Protocol):
    """A connection, closed when its request takes longer to arrive than HEAD and BODY allow."""

    head, body = HEAD, BODY

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._deadline: asyncio.TimerHandle | None = None
        self._awaited = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await("head", self.head)

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE:
            self._await("head", self.head)
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._await("body", self.body)
        elif state is not h11.IDLE:
            self._await("", 0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await("", 0)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._await("", 0)  # uvicorn closes connections that are idle for `timeout_keep_alive`
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no HTTP, and let a request that they interrupt end: its answer has no reader."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _await(self, what: str, seconds: float) -> None:
        """Set the deadline for a part of a request, unless it is set; "" for none."""
        if what == self._awaited:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._awaited = what
        self._deadline = self.loop.call_later(seconds, self._late) if what else None

    def _late(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.abort()
