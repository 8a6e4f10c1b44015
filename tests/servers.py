"""A server of `sdruntime serve` in a process of its own, with what tests need of a client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdruntime.system.process import module_command

WAIT = 60.0  # seconds after which a test is given up


class Answer:
    """An HTTP answer: its status, headers in lower case, body."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


class Server:
    """Started when made, and awaited until it listens; with `ready`, until a model is open."""

    def __init__(self, *arguments: str | Path, ready: bool = True) -> None:
        words = ["serve", *map(str, arguments), "--backend", "fake", "--log", "json"]
        words += ["--session", "seconds=0.005"]  # so that 900 steps take longer than a test needs
        if not {"--unix-socket", "--port"} & set(words):
            words += ["--port", "0"]
        self.process = subprocess.Popen(
            module_command("sdruntime", *words), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.log: list[dict[str, Any]] = []
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = self.event("start")["address"]
        if ready:
            deadline = time.monotonic() + WAIT
            while self.get("/readyz").status != 200:
                assert time.monotonic() < deadline, self.log
                time.sleep(0.05)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                record = json.loads(line)
            except ValueError:
                record = {"event": "text", "text": line}
            self.log.append(record)
            self.lines.put(record)
        self.lines.put(None)

    def event(self, name: str) -> dict[str, Any]:
        """The next record of this event."""
        while (record := self.lines.get(timeout=WAIT)) is not None:
            if record["event"] == name:
                return record
        raise AssertionError(self.log)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def url(self) -> str:
        return str(self.address)

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = WAIT
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = json.dumps(body).encode() if body is not None and not isinstance(body, bytes) else body
            kind = {"Content-Type": "application/json"} if data is not None else {}
            connection.request(method, path, data, kind | (headers or {}))
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def raw(self, data: bytes, timeout: float = WAIT, *, close: bool = False) -> bytes:
        """Send bytes, and return all that comes until the server closes the connection, also with bytes of ours unread.

        `close`: say that no more bytes come.
        """
        received = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as end, contextlib.suppress(ConnectionError):
            end.sendall(data)
            if close:
                end.shutdown(socket.SHUT_WR)
            while part := end.recv(1 << 16):
                received += part
        return received

    def submit(self, **fields: Any) -> dict[str, Any]:
        answer = self.post("/v1/jobs", {"prompt": "a cat", "width": 64, "height": 64, "steps": 2, "seed": 7, **fields})
        assert answer.status == 202, answer.body
        [job] = answer.json["jobs"]
        return dict(job)

    def job(self, job: dict[str, Any]) -> dict[str, Any]:
        return dict(self.get(f"/v1/jobs/{job['id']}").json)

    def over(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job once it is over."""
        deadline = time.monotonic() + WAIT
        while (now := self.job(job))["state"] in ("waiting", "running"):
            assert time.monotonic() < deadline, now
            time.sleep(0.02)
        return now

    def running(self, job: dict[str, Any], step: int = 1) -> None:
        """Wait until a job has done so many steps."""
        deadline = time.monotonic() + WAIT
        while (now := self.job(job))["step"] < step:
            assert time.monotonic() < deadline, now
            time.sleep(0.01)

    def events(self, path: str) -> Iterator[tuple[str, Any]]:
        """The events of a stream, until it ends; a comment has the name "comment"."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            assert response.status == 200
            name, data = "", ""
            for line in response:
                text = line.decode().rstrip("\n")
                if text.startswith(":"):
                    yield "comment", text[1:].strip()
                elif text.startswith("event: "):
                    name = text.removeprefix("event: ")
                elif text.startswith("data: "):
                    data = text.removeprefix("data: ")
                elif name:
                    yield name, json.loads(data)
                    name = ""
        finally:
            connection.close()

    def workers(self) -> list[int]:
        """The processes that generate."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = {int(number) for number in children.read_text().split()}
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            found |= {int(number) for number in task.read_text().split()}
        return sorted(found)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        code = self.process.wait(WAIT)
        self._reader.join(WAIT)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code

    def stop(self) -> int:
        if self.process.poll() is None:
            self.signal()
            self.signal()
        try:
            return self.wait()
        finally:
            self.process.kill()
