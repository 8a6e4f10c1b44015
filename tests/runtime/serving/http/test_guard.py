"""What every request passes: who may ask, how much, how fast; and what is written of it."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server is an extra")
pytest.importorskip("starlette", reason="the server is an extra")
from servers import WAIT, Server

from sdruntime.serving.http import protocol

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    started = Server(bundle, "--max-body", "100K")
    yield started
    started.stop()


def test_only_names_of_this_machine_are_answered(server: Server) -> None:
    for host in ("localhost", f"localhost:{server.port}", f"127.0.0.1:{server.port}", "[::1]:7860", "LOCALHOST"):
        assert server.get("/v1/models", Host=host).status == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""):
        assert (server.get("/v1/models", Host=host).status, server.get("/readyz", Host=host).status) == (403, 403)


def test_only_pages_of_this_server_may_use_it(server: Server) -> None:
    host = f"127.0.0.1:{server.port}"
    assert server.get("/v1/models", Origin=f"http://{host}").status == 200
    for origin in ("http://evil.example", "null", f"http://{host}.evil.example", "http://127.0.0.1:1"):
        assert server.get("/v1/models", Origin=origin).code == "origin"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
def test_another_content_type_is_refused(server: Server, kind: str) -> None:
    answer = server.ask("POST", "/v1/jobs", b'{"prompt": "x"}', {"Content-Type": kind})
    assert (answer.status, answer.code) == (415, "content_type")


def test_a_body_over_the_limit_is_refused(server: Server) -> None:
    assert server.ask("POST", "/v1/jobs", b"x" * 102_401).status == 413
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunks = b"".join(b"4000\r\n" + b"x" * 0x4000 + b"\r\n" for _ in range(8))
    answer = server.raw(head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert server.raw(head + b"Content-Length: 99999999999999999999\r\n\r\n").startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", b"400"),
        (b"Content-Length: 2\r\nContent-Length: 3\r\n", b"400"),
        (b"Content-Length: -1\r\n", b"400"),
        (b"Content-Length: 2\r\nAuthorization: a\r\nAuthorization: b\r\n", b"400"),
        (b"Content-Length: 2\r\nOrigin: http://localhost\r\nOrigin: http://x\r\n", b"400"),
        (b"Content-Length: 2\r\nX: " + b"y" * 20_000 + b"\r\n", b"431"),
        (b"Content-Length: 2\r\n" + b"".join(b"X%d: y\r\n" % k for k in range(3000)), b"431"),
    ],
    ids=["both lengths", "two lengths", "negative", "two tokens", "two origins", "long", "many"],
)
def test_an_ambiguous_or_large_head_is_refused(server: Server, lines: bytes, status: bytes) -> None:
    head = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    answer = server.raw(head + lines + b"\r\n{}")
    assert answer.split(b" ")[1] in (status, b"400"), answer
    assert b"Traceback" not in answer


def test_every_answer_has_the_number_of_its_request(server: Server) -> None:
    assert server.get("/v1/models", X_Request_ID="abc-1.2_3").headers["x-request-id"] == "abc-1.2_3"
    for strange in ("a b", "x" * 65, "é".encode().decode("latin-1")):
        assert re.fullmatch("[0-9a-f]{16}", server.get("/v1/models", X_Request_ID=strange).headers["x-request-id"])


def test_the_log_has_requests_and_no_prompts(server: Server) -> None:
    server.over(server.submit(prompt="a secret prompt"))
    server.post("/v1/jobs", {"prompt": "a secret prompt", "steps": 0})
    server.get("/v1/jobs", X_Request_ID="the-last")
    while (record := server.event("request"))["request_id"] != "the-last":
        pass
    assert (record["method"], record["path"], record["status"], record["client"]) == ("GET", "/v1/jobs", 200, "127.0.0.1")
    assert not [record for record in server.log if "secret" in str(record)]


def test_metrics_count_what_happened(server: Server) -> None:
    def value(line: str) -> float:
        text = server.get("/metrics").body.decode()
        return sum(float(number) for number in re.findall(rf"^{re.escape(line)} (\S+)$", text, re.M))

    line = 'sdruntime_http_requests_total{route="/v1/jobs",method="POST",status="202"}'
    before, done = value(line), value('sdruntime_images_total{outcome="done"}')
    server.over(server.submit(steps=3))
    assert value(line) == before + 1
    assert value('sdruntime_images_total{outcome="done"}') == done + 1
    assert value('sdruntime_http_requests_total{route="other",method="GET",status="404"}') >= 0
    text = server.get("/metrics").body.decode()
    names = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    assert all(
        line.startswith("#")
        or re.sub(r"_(bucket|sum|count)$", "", re.split(r"[{ ]", line)[0]) in names
        or re.split(r"[{ ]", line)[0] in names
        for line in text.splitlines()
    )


@pytest.fixture(scope="module")
def quick(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose deadlines are short."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(
        "from sdruntime.serving.http import protocol\nprotocol.Deadlines.head, protocol.Deadlines.body = 0.6, 0.9\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        import os

        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        started = Server(bundle, "--max-steps", "900")
    yield started
    started.stop()


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET / HT",
        b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a body"],
)
def test_a_client_that_stops_sending_is_cut_off(quick: Server, begun: bytes) -> None:
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", quick.port), WAIT) as end:
        end.sendall(begun)
        with contextlib.suppress(ConnectionResetError):
            assert end.recv(100) == b""
    assert time.monotonic() - started > 0.3
    assert protocol.HEAD > 5


def test_a_client_that_sends_a_byte_at_a_time_is_cut_off(quick: Server) -> None:
    sent = 0
    with socket.create_connection(("127.0.0.1", quick.port), WAIT) as end, contextlib.suppress(ConnectionError):
        for byte in b"GET /healthz HTTP/1.1\r\nX: " + b"y" * 10_000:
            end.sendall(bytes([byte]))
            sent += 1
            time.sleep(0.02)
    assert 10 < sent < 1000


def test_an_answer_that_takes_long_is_not_cut_off(quick: Server) -> None:
    job = quick.submit(steps=900)
    names = [name for name, _ in quick.events(f"/v1/jobs/{job['id']}/events")]
    assert names[-1] == "job"
    assert quick.job(job)["state"] == "done"
