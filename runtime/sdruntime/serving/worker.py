"""A service in a process of its own, as seen by its host: a driver that crashes or hangs costs the worker, not the host."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from sdruntime.serving.channel import BadFrame, Channel
from sdruntime.system.process import module_command

Event = dict[str, Any]
_PATIENCE = 5.0  # seconds for a process to end after its socket has closed


class Worker:
    """A process of `sdruntime.serving.service`, which it sends messages to.

    `heard(event, blob)` is called with each of its events, and `ended(reason)` once, when its process is over; both on a thread
    of the worker's own. `reason` says how it ended, such as "ended by signal 9". Raises OSError if no process can be started.
    """

    def __init__(self, heard: Callable[[Event, memoryview | None], object], ended: Callable[[str], object]) -> None:
        self._heard, self._ended = heard, ended
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = module_command("sdruntime.serving.service", str(theirs.fileno()))
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
                )
            except OSError:
                self._socket.close()
                raise
        self._channel = Channel(self._socket)
        threading.Thread(target=self._listen, name="sdruntime-worker", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, op: str, blob: bytes | None = None, **fields: Any) -> None:
        """Send a message (`service`). Waits while the process does not read. Does nothing once the process is over."""
        with contextlib.suppress(OSError):  # `ended` says so
            self._channel.send(json.dumps({"op": op, **fields}).encode(), blob)

    def kill(self) -> None:
        """End the process at once. `ended` is called."""
        self._process.kill()

    def leave(self) -> None:
        """Close the connection, at which the process ends after its step. `ended` is called."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _listen(self) -> None:
        fault = ""
        try:
            while received := self._channel.receive():
                self._heard(json.loads(received.message), received.blob)
        except (BadFrame, OSError, ValueError) as error:
            fault = f": {error}"
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._channel.close()
        self._ended((f"ended by signal {-code}" if code < 0 else f"ended with code {code}") + fault)
