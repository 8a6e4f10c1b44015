"""Changed bytes on the wire: whatever a client sends, it gets an answer that the documentation has, or its connection is closed.

Short here; `SDRUNTIME_FUZZ=200000 pytest tests/runtime/serving/http/test_raw.py` is the long run.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the server is an extra")
pytest.importorskip("starlette", reason="the server is an extra")
from servers import Server

from sdruntime.pipeline.images.png import png_from_image

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("SDRUNTIME_FUZZ", "400"))
GROWTH = 64 << 10  # KiB of memory
ANSWERS = {200, 202, 400, 403, 404, 405, 409, 411, 413, 415, 422, 429, 431, 501, 503}


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    started = Server(bundle, "--max-steps", "4", "--max-pixels", "16384", "--max-body", "64K")
    yield started
    started.stop()


def request(method: str, path: str, body: bytes = b"", kind: str = "application/json", *lines: str) -> bytes:
    length = [] if any("chunked" in line for line in lines) or not body else [f"Content-Length: {len(body)}"]
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", *length, *lines, "Connection: close"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def seeds() -> list[bytes]:
    small = png_from_image(np.zeros((8, 8, 3), np.uint8))
    picture = base64.b64encode(small).decode()
    job = {"prompt": "a (cat:1.2)", "steps": 1, "width": 64, "height": 64, "seed": 1, "n": 2, "options": {"eta": 0.5}}
    bodies = [
        ("/v1/jobs", job),
        ("/v1/jobs", job | {"image": picture, "mask": picture, "width": None, "height": None, "strength": 0.5}),
        ("/v1/jobs", job | {"controls": [{"image": picture, "scale": 0.5}], "image_prompt": [picture], "guidance": [3, 1]}),
        ("/v1/images/generations", {"prompt": "x", "size": "64x64", "steps": 1, "n": 1, "output_format": "jpeg"}),
        ("/v1/images/generations", {"prompt": "x", "size": "64x64", "steps": 1, "stream": True, "partial_images": 2}),
        ("/sdapi/v1/txt2img", {"prompt": "x", "width": 64, "height": 64, "steps": 1, "sampler_name": "Euler a", "eta": 1.0}),
        ("/sdapi/v1/img2img", {"init_images": [picture], "mask": picture, "width": 64, "height": 64, "steps": 2}),
        ("/sdapi/v1/png-info", {"image": picture}),
        ("/sdapi/v1/extra-single-image", {"image": picture, "upscaling_resize": 2.0}),
        ("/sdapi/v1/options", {"sd_model_checkpoint": "tiny"}),
    ]
    form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b\r\n'
    form += b'Content-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n' + small
    form += b"\r\n--b--\r\n"
    chunks = json.dumps(job).encode()
    chunked = b"%x\r\n" % len(chunks) + chunks + b"\r\n0\r\n\r\n"
    paths = ("/v1/jobs", "/v1/models", "/metrics", "/readyz", "/openapi.json", "/v1/jobs/x/events", "/sdapi/v1/progress")
    return [
        *(request("GET", path) for path in paths),
        *(request("POST", path, json.dumps(body).encode()) for path, body in bodies),
        request("POST", "/v1/images/edits", form, "multipart/form-data; boundary=b"),
        request("POST", "/v1/images/variations", form, "multipart/form-data; boundary=b"),
        request("POST", "/v1/jobs", chunked, "application/json", "Transfer-Encoding: chunked"),
        request("DELETE", "/v1/jobs/x"),
    ]


PIECES = (
    b"\r\n",
    b"\0",
    b"{",
    b"[",
    b'"',
    b"-1",
    b"1e999",
    b"99999999999999999999",
    b"null",
    b"\xff",
    b"%00",
    b"../",
    b": ",
    b",",
)
LINES = (b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Host: x\r\n", b"X: \0\r\n")


def changed(rng: random.Random, data: bytes) -> bytes:
    """The request with some of its bytes changed; a length that stood in it is made right again in half of the cases."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, kind = rng.randrange(len(out)), rng.randrange(6)
        if kind == 0:
            out[place] = rng.randrange(256)
        elif kind == 1:
            del out[place : place + rng.choice((1, 3, 20))]
        elif kind == 2:
            out[place:place] = rng.choice(PIECES)
        elif kind == 3:
            out[place:place] = out[max(0, place - rng.choice((4, 30))) : place]
        elif kind == 4 and (numbers := list(re.finditer(rb"\d+", bytes(out)))):
            number = rng.choice(numbers)
            out[number.start() : number.end()] = rng.choice((b"0", b"-1", b"1.5", b"9" * 20, b"true", b'"x"'))
        else:
            line = out.find(b"\r\n") + 2
            out[line:line] = rng.choice(LINES)
        if not out:
            out += b"x"
    text = bytes(out)
    head, mark, body = text.partition(b"\r\n\r\n")
    if mark and rng.random() < 0.5:
        head = re.sub(rb"Content-Length: \d+", b"Content-Length: %d" % len(body), head, count=1)
    return head + mark + body


def memory(server: Server) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]


def test_any_bytes_get_a_documented_answer_or_none(server: Server) -> None:
    whole, outcomes = seeds(), Counter[int]()
    for data in whole:
        answer = server.raw(data)
        assert answer.startswith(b"HTTP/1.1 "), (data, answer)
        assert int(answer.split(b" ")[1]) in ANSWERS, (data, answer)
    before = memory(server)
    for seed in range(COUNT):
        rng = random.Random(seed)
        data = changed(rng, rng.choice(whole))
        answer = server.raw(data, close=True)
        answer = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        status = int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.1 ") else 0
        outcomes[status] += 1
        assert status in ANSWERS | {0}, (seed, data, answer)
        assert b"Traceback" not in answer, (seed, data, answer)
        assert b'"code": "internal"' not in answer, (seed, data, answer)
    assert server.get("/readyz").status == 200
    assert memory(server) - before < GROWTH
    assert not [record for record in server.log if record["event"] == "text" or record.get("level") == "error"]

    assert outcomes[400] > COUNT / 50
    assert sum(count for status, count in outcomes.items() if status in (200, 202)) > COUNT / 20
