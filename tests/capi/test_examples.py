"""The C++ examples, built with an installed library: their images, cancellation and exit."""

from __future__ import annotations

import errno
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cplusplus import EXAMPLES, ROOT, environment, run

from sdruntime.bundle.bundle import Bundle
from sdruntime.pipeline.images.imagefile import read_image

PROMPT = "the red cat and the sand"
LONG = 400  # steps: a job that does not end during a test
Service = Callable[..., "Running"]


@pytest.fixture(scope="module")
def built(capi_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    run("cmake", "-S", EXAMPLES, "-B", folder, f"-DCMAKE_PREFIX_PATH={capi_prefix}", CXXFLAGS="-Werror")
    run("cmake", "--build", folder, "--parallel")
    return folder


@pytest.fixture(scope="module")
def expected(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the PNG of the command line for seed 7 and 4 steps, of a prompt that is taken as it is, as the C library does."""
    path = tmp_path_factory.mktemp("expected") / "7.png"
    words = ("-m", "sdruntime", "generate", bundle, PROMPT, "--prompt-syntax", "plain", "--seed", "7", "--steps", "4", "-o", path)
    run(sys.executable, *words)
    assert read_image(path).std() >= 10
    return path.read_bytes()


# ---- generate


def test_generate_writes_the_command_lines_image(built: Path, bundle: Path, expected: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    assert run(built / "generate", bundle, PROMPT, path, "7", "4") == f"{path}\n"
    assert path.read_bytes() == expected


def test_generate_builds_with_pkg_config_too(capi_prefix: Path, bundle: Path, expected: bytes, tmp_path: Path) -> None:
    flags = run("pkg-config", "--cflags", "--libs", "sdruntime", PKG_CONFIG_PATH=str(capi_prefix / "lib" / "pkgconfig")).split()
    run("c++", "-std=c++17", EXAMPLES / "generate.cpp", *flags, "-o", tmp_path / "generate")
    path = tmp_path / "image.png"
    run(tmp_path / "generate", bundle, PROMPT, path, "7", "4", LD_LIBRARY_PATH=str(capi_prefix / "lib"))
    assert path.read_bytes() == expected


def test_generate_exits_with_the_command_lines_codes(built: Path, bundle: Path, tmp_path: Path) -> None:
    assert run(built / "generate", code=2).startswith("usage: generate BUNDLE PROMPT FILE.png")
    assert "not a bundle" in run(built / "generate", tmp_path, PROMPT, tmp_path / "image.png", code=5)
    assert "steps" in run(built / "generate", bundle, PROMPT, tmp_path / "image.png", "7", "0", code=2)
    assert "cannot write" in run(built / "generate", bundle, PROMPT, tmp_path / "none" / "image.png", "7", "1", code=1)
    assert list(tmp_path.iterdir()) == []


def test_generate_shows_a_bar_on_a_terminal_and_ctrl_c_cancels(built: Path, bundle: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = [built / "generate", bundle, PROMPT, tmp_path / "image.png", "7", str(LONG)]
    program = subprocess.Popen(words, stderr=theirs, env=environment())
    os.close(theirs)
    seen = b""
    while f"[{'.' * 40}] 2 of {LONG + 1}".encode() not in seen:  # PNDM, the checkpoint's sampler, calls the model once more
        seen += os.read(ours, 1024)
    program.send_signal(signal.SIGINT)
    assert program.wait(timeout=60) == 130
    while select.select([ours], [], [], 0)[0]:
        try:
            seen += os.read(ours, 1024)
        except OSError:  # a closed terminal
            break
    os.close(ours)
    assert b"generate: " in seen.split(b"\x1b[2K")[-1]
    assert b"cancel" in seen.split(b"\x1b[2K")[-1]
    assert list(tmp_path.iterdir()) == []


# ---- service


class Client:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self.file = self.socket.makefile("rb")

    def generate(self, seed: int, steps: int) -> None:
        self.socket.sendall(f"generate {seed} {steps} {PROMPT}\n".encode())

    def line(self) -> list[str]:
        """Return the words of the next line; an empty list at the end of the connection."""
        return self.file.readline().decode().split()

    def answer(self) -> tuple[list[str], bytes]:
        """Return the words of the first line that is not progress, and the PNG."""
        steps = [0]
        while (words := self.line())[:1] == ["progress"]:
            steps.append(int(words[1]))
            assert steps[-1] > steps[-2]
        return words, self.file.read(int(words[4])) if words[:1] == ["done"] else b""

    def unread(self) -> str:
        """Return the beginning of the received text that has not been read."""
        data = self.socket.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT) + self.file.peek()
        return data.decode(errors="replace")

    def leave(self) -> None:
        self.file.close()
        self.socket.close()


class Running:
    def __init__(self, program: Path, *words: object) -> None:
        command = [str(program), *map(str, words)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:"), self.process.wait(timeout=60)
        self.port = int(line.rpartition(":")[2])
        self.clients: list[Client] = []

    def client(self) -> Client:
        self.clients.append(Client(self.port))
        return self.clients[-1]

    def refuses(self) -> bool:
        with socket.socket() as other:
            return other.connect_ex(("127.0.0.1", self.port)) == errno.ECONNREFUSED

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=60)

    def worker(self) -> int:
        """Return the id of the worker process."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        [child] = {int(child) for task in tasks for child in (task / "children").read_text().split()}
        return child


@pytest.fixture
def service(built: Path, bundle: Path) -> Iterator[Service]:
    """Return a function that starts the service on a free port. The services are killed at the end of the test."""
    started: list[Running] = []

    def start(*words: object) -> Running:
        started.append(Running(built / "service", bundle, 0, *words))
        return started[-1]

    yield start
    for running in started:
        for client in running.clients:
            client.leave()
        running.process.kill()
        running.process.wait()
        running.process.stdout.close()  # type: ignore[union-attr]


def pixels(png: bytes, folder: Path) -> np.ndarray:
    (folder / "image.png").write_bytes(png)
    return read_image(folder / "image.png").astype(int)


def test_a_single_client_receives_the_command_lines_image_and_errors(service: Service, expected: bytes) -> None:
    running = service()
    client = running.client()
    for wrong in ("", "generate", "generate 7 x a cat", "generate 7 4", "paint 7 4 a cat"):
        client.socket.sendall(wrong.encode() + b"\n")
        assert client.line()[:2] == ["error", "2"]
    client.generate(7, 0)
    assert client.answer()[0][:2] == ["error", "2"]
    client.generate(7, 4)
    client.generate(7, 4)  # the next line may be sent before the answer
    for _ in range(2):
        words, png = client.answer()
        assert words == ["done", "64", "64", "7", str(len(expected))]
        assert png == expected
    client.socket.sendall(b"generate 7 4 " + b"long " * 8000)
    assert client.line()[:1] == ["bye"]
    assert running.terminate() == 0


def test_a_client_that_disconnects_during_a_write_raises_no_sigpipe(service: Service, expected: bytes) -> None:
    running = service()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        other.connect(("127.0.0.1", running.port))
        other.sendall(b"x\n" * 8000)  # more answers than all buffers can hold
        other.shutdown(socket.SHUT_WR)
        assert other.recv(5) == b"error"
    client = running.client()
    client.generate(7, 4)
    assert client.answer()[1] == expected
    assert running.terminate() == 0


def test_several_clients_at_once(service: Service, expected: bytes, tmp_path: Path) -> None:
    clients = [(running := service()).client()] + [running.client() for _ in range(5)]
    for seed, client in enumerate(clients, start=5):
        client.generate(seed, 4)
    images = {}
    for client in clients:
        words, png = client.answer()
        images[int(words[3])] = pixels(png, tmp_path)
    assert sorted(images) == [5, 6, 7, 8, 9, 10]
    # in a larger batch the engine's arithmetic differs slightly
    assert np.abs(images[7] - pixels(expected, tmp_path)).mean() < 1
    assert np.abs(images[7] - images[8]).mean() > 5


def test_disconnecting_a_full_queue_and_draining(service: Service, bundle: Path) -> None:
    """Jobs that run together advance together. A job that ends before them did not wait for them."""
    profiles = [engine.profiles for engine in Bundle.open(bundle).manifest.engines if engine.component == "unet"]
    room = max(profile["batch"][2] for ranges in profiles for profile in ranges) // 2  # images in one call, with guidance
    running = service(room + 2, 1)
    generating = [running.client() for _ in range(room)]
    for client in generating:
        client.generate(1, LONG)
        assert client.line()[0] == "progress"
    two = {client.socket: client for client in (running.client(), running.client())}
    for client in two.values():
        client.generate(7, 4)
    [busy] = select.select(list(two), [], [], 60)[0]  # the other one waits in the queue
    assert two[busy].line()[0] == "busy"
    [waiting] = [client for connection, client in two.items() if connection is not busy]

    generating.pop(0).leave()
    assert waiting.answer()[0][0] == "done"
    assert not any("done" in client.unread() for client in generating)

    running.process.terminate()
    while not running.refuses():
        pass
    assert not any("done" in client.unread() for client in generating)
    for client in generating:
        assert client.answer()[0][0] == "done"
    for client in (*generating, *two.values()):
        assert client.line()[0] == "bye"
        assert client.line() == []
    assert running.process.wait(timeout=60) == 0


def test_a_killed_worker_fails_only_its_own_jobs(service: Service, expected: bytes) -> None:
    running = service()
    clients = [running.client(), running.client()]
    for client in clients:
        client.generate(1, LONG)
        assert client.line()[0] == "progress"
    os.kill(running.worker(), signal.SIGKILL)
    for client in clients:
        words, _ = client.answer()
        assert words[:2] == ["error", "1"]
        assert "killed" in " ".join(words)
    clients[1].generate(7, 4)
    assert clients[1].answer()[1] == expected


def test_a_hung_worker_is_replaced(service: Service, expected: bytes) -> None:
    running = service(4, 16, 3)
    clients = [running.client(), running.client()]
    for client in clients:
        client.generate(1, LONG)
        assert client.line()[0] == "progress"
    hung = running.worker()
    os.kill(hung, signal.SIGSTOP)
    for client in clients:
        words, _ = client.answer()
        assert words[:2] == ["error", "1"]
        assert "did not respond for 3 s" in " ".join(words)
    clients[1].generate(7, 4)
    assert clients[1].answer()[1] == expected
    os.kill(hung, signal.SIGCONT)  # otherwise the library kills it after one minute
    assert running.terminate() == 0
    assert not Path(f"/proc/{hung}").exists()


def test_an_idle_client_is_disconnected(service: Service, expected: bytes) -> None:
    running = service(1, 16, 3)
    idle, other = running.client(), running.client()
    idle.socket.sendall(b"generate 7")  # an incomplete line
    other.generate(7, 4)
    assert other.answer()[1] == expected
    assert idle.line()[0] == "bye"
    assert running.terminate() == 0


def test_draining_has_a_timeout(service: Service) -> None:
    running = service(2, 16, 3)
    client = running.client()
    client.generate(1, LONG)
    assert client.line()[0] == "progress"
    hung = running.worker()
    os.kill(hung, signal.SIGSTOP)
    running.process.terminate()
    words, _ = client.answer()
    assert words[0] == "error"
    os.kill(hung, signal.SIGCONT)
    assert running.process.wait(timeout=60) == 0
    assert not Path(f"/proc/{hung}").exists()


# ---- documentation


def test_programs_in_the_documentation_compile_and_excerpts_match_the_examples(capi_prefix: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    sources = {line.strip() for path in EXAMPLES.glob("*.cpp") for line in path.read_text(encoding="utf-8").splitlines()}
    blocks = re.findall(r"^```(c|cpp)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    programs = [(kind, block) for kind, block in blocks if block.startswith("#include")]
    assert len(programs) == 2
    for kind, block in programs:
        path = tmp_path / f"program.{kind}"
        path.write_text(block)
        compiler = ("cc", "-std=c99") if kind == "c" else ("c++", "-std=c++17")
        run(*compiler, "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", f"-I{capi_prefix / 'include'}", path)
    excerpts = [line.strip() for _, block in blocks if not block.startswith("#include") for line in block.splitlines()]
    assert len(excerpts) > 8
    assert [line for line in excerpts if line not in sources] == []
