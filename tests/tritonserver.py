"""A real Triton server for tests: the program in the wheel nvidia-pytriton, started directly, in an environment of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from environments import INSTALL, run
from once import alone
from places import ROOT

PINS = ("nvidia-pytriton==0.7.0",)  # Triton 2.51, 55 MB; without its own requirements, which only pytriton itself uses
# the server's Python backend needs NumPy 1; the clients, and what our runtime needs
OTHERS = ("numpy==1.26.4", "tritonclient[grpc,http]==2.51.0", "setuptools<81")
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
WAIT = 120.0


@dataclass(frozen=True, slots=True)
class Place:
    """The environment: its Python, and the folder of the server."""

    python: Path
    server: Path


@functools.cache
def place() -> Place:
    """The environment, made once and kept. Skips the test where the wheel cannot be had or this Python cannot be embedded."""
    folder = ROOT / ".venv-tritonserver"
    python = folder / "bin" / "python"
    with alone(ROOT / ".cache" / "locks" / folder.name):
        if not (folder / ".ready").exists():
            run(sys.executable, "-m", "venv", "--clear", folder)
            wheel = subprocess.run([python, *INSTALL, "--no-deps", *PINS], capture_output=True, text=True, check=False)
            if wheel.returncode != 0:
                pytest.skip(f"no wheel of nvidia-pytriton here: {wheel.stderr.strip().splitlines()[-1]}")
            run(python, *INSTALL, *OTHERS)
            packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
            (packages / "sdruntime.pth").write_text(f"{ROOT / 'runtime'}\n")  # the backend's process ignores PYTHONPATH
            (folder / ".ready").write_text(str(packages / "pytriton" / "tritonserver"))
    server = Path((folder / ".ready").read_text())
    stub = server / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    if not stub.exists():
        pytest.skip(f"the server has no Python backend for Python {VERSION}")
    missing = [line for line in run("ldd", stub).splitlines() if "not found" in line]
    if missing:
        pytest.skip(f"the server's Python backend cannot start here: {'; '.join(missing)}")
    shutil.copy(stub, server / "backends" / "python")
    return Place(python, server)


class Server:
    """A server of a model repository; `ready` waits until its models are loaded."""

    def __init__(self, repository: Path, log: Path, *arguments: str) -> None:
        where = place()
        self.http, self.grpc, self.metrics = _ports(3)
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [
                    where.server / "bin" / "tritonserver",
                    f"--model-repository={repository}",
                    f"--backend-directory={where.server / 'backends'}",
                    *(f"--{name}-port={port}" for name, port in zip(("http", "grpc", "metrics"), self.ports, strict=True)),
                    *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc", "metrics")),
                    "--disable-auto-complete-config",
                    "--allow-gpu-metrics=false",
                    "--exit-on-error=true",
                    "--exit-timeout-secs=20",
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PATH": f"{where.python.parent}{os.pathsep}{os.environ['PATH']}"},
            )

    @property
    def ports(self) -> tuple[int, int, int]:
        return self.http, self.grpc, self.metrics

    def get(self, path: str, port: int | None = None) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port or self.http}{path}", timeout=WAIT) as answer:
            return str(answer.read().decode())

    def ready(self) -> None:
        deadline = time.monotonic() + WAIT
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            with contextlib.suppress(OSError, urllib.error.HTTPError):
                self.get("/v2/health/ready")
                return
            time.sleep(0.1)

    def number(self, metric: str) -> float:
        """The value of a metric line, named with its labels."""
        lines = self.get("/metrics", self.metrics).splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(metric))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(WAIT)
        finally:
            self.process.kill()


@contextlib.contextmanager
def serving(repository: Path, log: Path) -> Iterator[Server]:
    server = Server(repository, log)
    try:
        server.ready()
        yield server
    finally:
        server.stop()


def _ports(count: int) -> list[int]:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(socket.socket()) for _ in range(count)]
        for end in ends:
            end.bind(("127.0.0.1", 0))
        return [end.getsockname()[1] for end in ends]
