"""The model in a real Triton server, asked by NVIDIA's own client over gRPC and by plain HTTP."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tritonserver
from bundles import make_bundle, with_fake_engines
from places import ROOT

from sdruntime import Pipeline, Request
from sdruntime.__main__ import main
from sdruntime.pipeline.images.png import png_from_image

pytestmark = [
    pytest.mark.full,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the wheel has a server for Linux"),
]
CLIENT = ROOT / "tests" / "triton_client.py"
SETTINGS = {"PROMPT": "a (red:1.2) fox", "SEED": 7, "STEPS": 3, "SIZE": [64, 64]}


@pytest.fixture(scope="module")
def bundle_of_fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_fake_engines(make_bundle(tmp_path_factory.mktemp("bundles") / "fox")).folder


@pytest.fixture(scope="module")
def server(bundle_of_fakes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tritonserver.Server]:
    """Fake engines, each of whose calls takes 5 ms, and eight requests at a time."""
    tritonserver.place()
    folder = tmp_path_factory.mktemp("triton")
    words = ["--backend", "fake", "--session", "seconds=0.005", "--running", "8", "--queue", "4"]
    assert main(["triton", str(bundle_of_fakes), "-o", str(folder / "models"), *words]) == 0
    with tritonserver.serving(folder / "models", folder / "log") as started:
        yield started


@pytest.fixture(scope="module")
def png(bundle_of_fakes: Path) -> bytes:
    """The image of SETTINGS, as Python and `sdruntime generate` write it."""
    request = Request(prompt=SETTINGS["PROMPT"], seed=7, steps=3, size=(64, 64), prompt_syntax="a1111")
    with Pipeline.open(bundle_of_fakes, backend="fake") as pipe:
        [image] = pipe(request).images
        return png_from_image(image.pixels, image.text())


def asked(server: tritonserver.Server, *requests: dict[str, Any], **task: Any) -> list[Any]:
    """The responses of one gRPC stream with these requests, each [number of its request, STEP, image or error]."""
    python = tritonserver.place().python
    text = json.dumps({"model": "fox", "requests": requests, **task})
    done = subprocess.run(
        [python, CLIENT, str(server.grpc)], input=text, capture_output=True, text=True, timeout=tritonserver.WAIT, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["events"])


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + tritonserver.WAIT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def events(server: tritonserver.Server, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The responses of /generate_stream, each a server-sent event."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.http}/v2/models/fox/generate_stream",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=tritonserver.WAIT) as answer:
        for line in answer:
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))


def test_http_streams_progress_and_python_s_image(server: tritonserver.Server, png: bytes) -> None:
    *steps, last = events(server, SETTINGS)
    assert [event["STEP"] for event in steps] == [[0, 3], [1, 3], [2, 3], [3, 3]]
    assert base64.b64decode(last["PNG"]) == png
    assert json.loads(last["INFO"])["seed"] == 7
    with pytest.raises(urllib.error.HTTPError) as refused:
        list(events(server, {**SETTINGS, "STEPS": 0}))
    assert refused.value.code == 400
    assert "steps 0 is outside 1 to 1,000" in refused.value.read().decode()


def test_grpc_streams_progress_and_python_s_image(server: tritonserver.Server, png: bytes) -> None:
    *steps, [_, last] = asked(server, {**SETTINGS, "OUTPUT": "png"})
    assert steps == [[0, [k, 3]] for k in range(4)]
    assert base64.b64decode(last["image"]) == png
    [[_, raw]] = asked(server, {**SETTINGS, "OUTPUT": "raw", "PROGRESS": "off"})
    assert len(base64.b64decode(raw["image"])) == 64 * 64 * 3


def test_eight_requests_in_flight_advance_together(server: tritonserver.Server) -> None:
    """In one UNet call for each step: `test_triton_server.py` counts the calls."""
    steps = 100
    received = asked(server, *({**SETTINGS, "SEED": seed, "STEPS": steps} for seed in range(8)))
    images = {number for number, what in received if isinstance(what, dict)}
    assert images == set(range(8))
    first_end = next(k for k, (_, what) in enumerate(received) if isinstance(what, dict))
    least = dict.fromkeys(range(8), 0)
    for number, what in received[:first_end]:
        least[number] = what[0]
    assert min(least.values()) > steps / 2


def test_a_cancelled_stream_cancels_running_and_waiting_requests(server: tritonserver.Server) -> None:
    before = server.number('sdruntime_images_total{instance="fox_0_0",model="fox",outcome="cancelled"}')
    requests = [{**SETTINGS, "STEPS": 900} for _ in range(12)]
    received = asked(server, *requests, after=30)
    assert [what for _, what in received if not isinstance(what, list)] == []
    eventually(lambda: server.number('sdruntime_images_running{instance="fox_0_0"') == 0)
    eventually(lambda: server.number('sdruntime_images_waiting{instance="fox_0_0"') == 0)
    assert server.number('sdruntime_images_total{instance="fox_0_0",model="fox",outcome="cancelled"}') == before + 12


def test_an_http_client_that_leaves_cancels_its_request(server: tritonserver.Server) -> None:
    counter = 'sdruntime_images_total{instance="fox_0_0",model="fox",outcome="cancelled"}'
    before = server.number(counter)
    stream = events(server, {**SETTINGS, "STEPS": 900})
    assert next(stream)["STEP"] == [0, 900]
    stream.close()
    eventually(lambda: server.number(counter) == before + 1)


def test_a_full_queue_refuses_at_once(server: tritonserver.Server) -> None:
    received = asked(server, *({**SETTINGS, "STEPS": 100} for _ in range(13)))
    errors = [what["error"] for _, what in received if isinstance(what, dict) and "error" in what]
    assert len(errors) == 1
    assert "the queue holds 4 besides the 8 that run" in errors[0]
    assert len([what for _, what in received if isinstance(what, dict) and "image" in what]) == 12


def test_a_bundle_that_cannot_be_opened_is_the_error_of_the_model(bundle_of_fakes: Path, tmp_path: Path) -> None:
    assert main(["triton", str(bundle_of_fakes), "-o", str(tmp_path / "models"), "--backend", "fake"]) == 0
    config = tmp_path / "models" / "fox" / "config.pbtxt"
    config.write_text(config.read_text().replace(str(bundle_of_fakes), "/nowhere"))
    server = tritonserver.Server(tmp_path / "models", tmp_path / "log")
    assert server.process.wait(tritonserver.WAIT) != 0
    assert "/nowhere" in (tmp_path / "log").read_text()
