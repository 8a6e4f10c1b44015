"""`sdruntime serve`: its arguments, several models, signals, and workers that die under it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from bundles import make_bundle, with_fake_engines

pytest.importorskip("uvicorn", reason="the server is an extra")
pytest.importorskip("starlette", reason="the server is an extra")
from servers import WAIT, Server

from sdruntime.__main__ import main
from sdruntime.serving.http.server import listening

pytestmark = pytest.mark.slow
LONG = 900
MOST = ("--max-steps", str(LONG))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_and_waiting_images_finish(bundle: Path, number: signal.Signals) -> None:
    server = Server(bundle, "--running", "1", *MOST)
    jobs = [server.submit(steps=LONG), server.submit(steps=2)]
    streams = [server.events(f"/v1/jobs/{job['id']}/events") for job in jobs]
    assert [next(stream)[0] for stream in streams] == ["job", "job"]
    server.running(jobs[0])
    server.signal(number)
    while server.get("/readyz").status == 200:
        pass
    refused = server.post("/v1/jobs", {"prompt": "x"})
    assert (refused.status, "retry-after" in refused.headers) == (503, True)
    assert [list(stream)[-1][1]["state"] for stream in streams] == ["done", "done"]
    assert server.wait() == 0
    assert server.log[-1]["event"] == "end"
    assert not [record for record in server.log if record["event"] == "worker"]


def test_a_second_signal_ends_at_once(bundle: Path) -> None:
    server = Server(bundle, *MOST)
    server.running(server.submit(steps=LONG))
    workers = server.workers()
    assert workers
    server.signal()
    server.signal()
    assert server.wait() == 0
    deadline = time.monotonic() + WAIT
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_draining_has_a_limit(bundle: Path) -> None:
    server = Server(bundle, "--drain", "0.2", *MOST)
    server.running(server.submit(steps=LONG))
    server.signal()
    assert server.wait() == 0


def test_a_worker_that_dies_is_told_and_replaced(bundle: Path) -> None:
    server = Server(bundle, *MOST)
    try:
        job = server.submit(steps=LONG)
        server.running(job)
        [worker] = server.workers()
        os.kill(worker, signal.SIGKILL)
        lost = server.over(job)
        assert (lost["state"], lost["error"]["code"]) == ("failed", "worker_lost")
        answer = server.get(f"/v1/jobs/{job['id']}/image")
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert server.get("/readyz").status == 503
        assert server.get("/healthz").status == 200
        assert server.over(server.submit())["state"] == "done"
        assert server.get("/readyz").status == 200
        assert 'sdruntime_worker_restarts_total{reason="crash"} 1' in server.get("/metrics").body.decode()
    finally:
        server.stop()


def test_several_models(bundle: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        with_fake_engines(
            make_bundle(tmp_path / "models" / name if (tmp_path / "models").mkdir(exist_ok=True) is None else bundle)
        )
    server = Server(bundle, "--models", tmp_path / "models")
    try:
        assert [model["id"] for model in server.get("/v1/models").json["data"]] == ["tiny", "one", "two"]
        jobs = [server.submit(model=name) for name in ("one", "two", "tiny", "one")]
        assert [server.over(job)["state"] for job in jobs] == ["done"] * 4
        assert [server.over(job)["model"] for job in jobs] == ["one", "two", "tiny", "one"]
        stages = server.get("/readyz").json["models"]
        assert sorted(model["stage"] for model in stages.values()) == ["closed", "closed", "ready"]
    finally:
        server.stop()


def test_a_unix_socket(bundle: Path, tmp_path: Path) -> None:
    place = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place))  # what a server that was killed leaves
    server = Server(bundle, "--unix-socket", place, ready=False)
    try:
        assert server.address == f"unix:{place}"
        with socket.socket(socket.AF_UNIX) as end:
            end.connect(str(place))
            end.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"".join(iter(lambda: end.recv(4096), b"")).endswith(b"ok")
        assert main(["serve", str(bundle), "--backend", "fake", "--unix-socket", str(place)]) == 2
    finally:
        server.stop()
    assert not place.exists()


def test_systemd_is_told(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(place))
        end.settimeout(WAIT)
        monkeypatch.setenv("NOTIFY_SOCKET", str(place))
        server = Server(bundle, ready=False)
        try:
            assert end.recv(100) == b"READY=1"
            server.signal()
            assert end.recv(100) == b"STOPPING=1"
            assert server.wait() == 0
        finally:
            server.stop()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "no bundle: name a BUNDLE, or a folder of them with --models"),
        (["{empty}"], "no bundle: manifest.json is missing"),
        (["--models", "{empty}"], "no bundle in "),
        (["--models", "{empty}/none"], "no such folder"),
        (["{bundle}", "--host", "0.0.0.0"], "other machines can connect there: add --token FILE"),
        (["{bundle}", "--host", "192.0.2.1"], "other machines can connect there"),
        (["{bundle}", "--token", "{empty}/none"], "cannot be read"),
        (["{bundle}", "--token", "{short}"], "expected one line of at least 16 ASCII letters"),
        (["{bundle}", "--queue", "0"], "--queue 0: at least 1"),
        (["{bundle}", "--max-steps", "0"], "--max-steps 0: at least 1"),
        (["{bundle}", "--port", "99999"], "cannot listen there"),
        (["{bundle}", "{copy}"], "has the same name, which is that of the model"),
    ],
)
def test_wrong_arguments_are_refused(
    bundle: Path, tmp_path: Path, words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("empty", "short")}
    places |= {"bundle": bundle, "copy": tmp_path / "other" / bundle.name}
    places["empty"].mkdir()
    places["short"].write_text("short")
    places["copy"].mkdir(parents=True)
    (places["copy"] / "manifest.json").write_text("{}")
    assert main(["serve", *(word.format(**places) for word in words)]) == 2
    assert text in capsys.readouterr().err


def test_a_small_answer_is_sent_at_once() -> None:
    """asyncio turns Nagle's algorithm off only for sockets whose protocol is named; else each answer waits 40 ms for an ACK."""

    accepted: list[Any] = []

    class Accepting(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.append(transport)

    async def no_delay() -> int:
        with listening("127.0.0.1", 0) as end:
            server = await asyncio.get_running_loop().create_server(Accepting, sock=end)
            async with server:
                _, writer = await asyncio.open_connection(*end.getsockname())
                while not accepted:
                    await asyncio.sleep(0)
                value = accepted[0].get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                accepted[0].abort()
                writer.close()
        return int(value)

    assert asyncio.run(no_delay()) == 1
