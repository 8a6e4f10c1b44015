"""A server in a process of its own, and a client that keeps its connection open."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.system.process import module_command

GENERATIONS = "/v1/images/generations"
PROMPT = "a large green square on the right on a white background"
WAIT = 120.0  # seconds for any answer


class Answer:
    """An HTTP answer: its status, its body and how many seconds it took."""

    def __init__(self, status: int, body: bytes, seconds: float) -> None:
        self.status, self.body, self.seconds = status, body, seconds

    @property
    def document(self) -> Any:
        return json.loads(self.body)


class Client:
    """A connection that is kept open."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        begun = time.perf_counter()
        data = None if body is None else json.dumps(body).encode()
        self.connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        response = self.connection.getresponse()
        content = response.read()
        return Answer(response.status, content, time.perf_counter() - begun)

    def close(self) -> None:
        self.connection.close()


class Server:
    """`sdruntime serve` on a free port, ready when it is constructed."""

    def __init__(self, bundle: Path, *arguments: str) -> None:
        words = ["serve", str(bundle), "--port", "0", "--log", "json", "--max-jobs", "100000", "--max-steps", "900", *arguments]
        self.process = subprocess.Popen(
            module_command("sdruntime", *words), stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        assert self.process.stderr is not None
        found = re.search(r":(\d+)\"", self.process.stderr.readline())
        assert found is not None
        self.port = int(found[1])
        self.log: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()  # else the server would wait for a reader of its log
        self.wait_ready()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(line for line in self.process.stderr if '"request"' not in line)

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        client = Client(self.port)
        try:
            return client.ask(method, path, body)
        finally:
            client.close()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + WAIT
        while self.ask("GET", "/readyz").status != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def metrics(self) -> dict[str, float]:
        """The numbers of /metrics by name and labels."""
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def workers(self) -> list[int]:
        """The processes that generate images."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted({int(number) for task in tasks for number in task.read_text().split()})

    def memory(self) -> int:
        """Resident bytes of the server and its workers."""
        total = 0
        for pid in (self.process.pid, *self.workers()):
            status = Path(f"/proc/{pid}/status").read_text()
            total += int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024
        return total

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT)


@contextlib.contextmanager
def serving(bundle: Path, *arguments: str) -> Iterator[Server]:
    server = Server(bundle, *arguments)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@contextlib.contextmanager
def with_fake_engines(bundle: Path) -> Iterator[Path]:
    """Yield a copy of a bundle with engines that return at once."""
    with tempfile.TemporaryDirectory(prefix="sdruntime-serving-") as folder:
        copy = Path(shutil.copytree(bundle, Path(folder, bundle.name)))
        for _ in build_engines(copy, BuildRequest(backend="fake", size="64x64:1024x1024")):
            pass
        yield copy


def fake(seconds: float, running: int = 8) -> Sequence[str]:
    """The arguments of a server whose UNet call takes so long."""
    return "--backend", "fake", "--session", f"seconds={seconds}", "--running", str(running)


def generation(seed: int, steps: int, size: str = "64x64") -> dict[str, Any]:
    return {"prompt": PROMPT, "size": size, "steps": steps, "seed": seed}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The median, the 99th percentile, the extremes and the number of values."""
    ordered = sorted(values)
    shares = {"min": 0.0, "p50": 0.5, "p99": 0.99, "max": 1.0}
    places = {name: min(len(ordered) - 1, int(share * len(ordered))) for name, share in shares.items()}
    return {"n": len(ordered), **{name: round(ordered[place], 2) for name, place in places.items()}}
