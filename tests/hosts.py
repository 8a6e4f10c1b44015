"""The other side of the service: a host in this process, and one whose service is a worker process."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdruntime.serving.channel import Channel
from sdruntime.serving.service import Service
from sdruntime.system.process import module_command

WAIT = 60  # seconds after which a test is given up
Event = dict[str, Any]


class Host:
    """Keeps the events that it receives, each blob beside its event, and lets a test wait for what comes."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._told = threading.Condition()
        self.send: Callable[[bytes, bytes | None], object] = Service(self.emit).handle

    def emit(self, message: bytes, blob: Any) -> None:
        assert isinstance(message, bytes)
        with self._told:
            self.events.append(json.loads(message) | {"blob": None if blob is None else bytes(blob)})
            self._told.notify_all()

    def say(self, op: str, blob: bytes | None = None, **fields: Any) -> None:
        self.send(json.dumps({"op": op, **fields}).encode(), blob)

    def submit(self, job: int, blob: bytes | None = None, *, request: Any = None, **fields: Any) -> None:
        asked = {"prompt": "a cat", "steps": 3, "width": 64, "height": 64, "seed": job}
        self.say("submit", blob, job=job, request=asked | (request or {}), **fields)

    def wait(self, *names: str, job: int | None = None, count: int = 1) -> Event:
        """The event of one of these names, of this job where it is given; the last of `count` of them."""

        def found() -> list[Event]:
            return [each for each in self.events if each["event"] in names and (job is None or each.get("job") == job)]

        with self._told:
            assert self._told.wait_for(lambda: len(found()) >= count, WAIT), self.events
            return found()[count - 1]

    def of(self, job: int) -> list[str]:
        return [each["event"] for each in self.events if each.get("job") == job]

    def open(self, bundle: Path, **options: Any) -> Event:
        before = sum(each["event"] in ("ready", "refused") for each in self.events)
        self.say("open", bundle=str(bundle), options={"backend": "fake"} | options)
        return self.wait("ready", "refused", count=before + 1)

    def close(self) -> None:
        """Once; a second time there is no answer."""
        self.say("close")
        self.wait("closed")


class Worker(Host):
    """A host whose service is a process of its own."""

    def __init__(self) -> None:
        super().__init__()
        ours, theirs = socket.socketpair()
        command = module_command("sdruntime.serving.service", str(theirs.fileno()))
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.socket, self.channel, self.ended = ours, Channel(ours), threading.Event()
        self.send = self.channel.send
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while received := self.channel.receive():
                self.emit(received.message, received.blob)
        except ConnectionResetError:
            pass
        self.ended.set()

    def leave(self) -> int:
        with contextlib.suppress(OSError):  # the worker may be gone
            self.socket.shutdown(socket.SHUT_RDWR)
        code = self.process.wait(WAIT)
        self._reader.join(WAIT)
        self.channel.close()
        return code
