from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import make_bundle, with_fake_engines
from descriptors import open_files, open_links
from hosts import WAIT, Host, Worker

from sdruntime.engines.pool import Engines
from sdruntime.pipeline.images.png import image_from_png
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.serving.service import Service, main

LONG = {"steps": 999, "width": 2048, "height": 2048}  # seconds, also with engines that return at once
ENDS = ("ready", "refused", "done", "failed", "closed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_fake_engines(make_bundle(tmp_path_factory.mktemp("service") / "bundle")).folder


@pytest.fixture
def inside() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    host = Worker()
    yield host
    host.leave()


@pytest.fixture(params=["inside", "worker"])
def host(request: pytest.FixtureRequest) -> Host:
    """Both transports: what follows holds for each."""
    made: Host = request.getfixturevalue(request.param)
    return made


def test_ready_describes_what_was_opened(host: Host, folder: Path) -> None:
    described = host.open(folder, queue=5)["describe"]
    assert described["model"]["name"] == "by-hand"
    assert described["sizes"]["default"] == [512, 512]
    assert described["sizes"]["engines"][0]["width"] == [64, 2048]
    assert described["components"]["unet"]["backend"] == "fake"
    assert described["components"]["vae_encoder"] is None
    assert {"dpmpp_2m", "euler_a"} <= set(described["samplers"])
    assert described["sampler"] == "ddim"
    assert {"sdruntime", "python", "numpy", "fake"} <= described["versions"].keys()
    assert (described["queue"], described["running"]) == (5, 8)


def test_a_job_with_own_sigmas(host: Host, folder: Path) -> None:
    host.open(folder)
    host.submit(1, request={"steps": 4, "sampler": "euler", "sigmas": [9, 2, 1, 0.5, 0]})
    host.wait("done", "failed", job=1)
    assert host.of(1) == ["started", *["progress"] * 4, "done"]


def test_a_job_s_events_in_order_and_its_picture(host: Host, folder: Path) -> None:
    host.open(folder)
    request = {"seed": 2**64 - 1, "sampler": "euler_a", "negative": "dog", "guidance": 3}
    host.submit(7, request=request, preview=True, png=True)
    done = host.wait("done", "failed", job=7)
    assert host.of(7) == ["started", "progress", "progress", "progress", "done"]
    started, *steps, _ = (each for each in host.events if each.get("job") == 7)
    assert started["steps"] == 3
    assert [(each["step"], each["steps"], each["preview"]) for each in steps] == [(k, 3, [4, 8, 8]) for k in (1, 2, 3)]
    latents = [np.frombuffer(each["blob"], np.float32).reshape(4, 8, 8) for each in steps]
    assert np.isfinite(latents).all()
    assert latents[0].std() > 0
    assert not np.array_equal(latents[0], latents[1])
    with Pipeline.open(folder, backend="fake") as pipe:
        picture = pipe("a cat", steps=3, size=(64, 64), **request).images[0]
    assert (done["width"], done["height"], done["seed"], done["sampler"]) == (64, 64, 2**64 - 1, "euler_a")
    assert (done["rgb"], done["rgb"] + done["png"]) == (64 * 64 * 3, len(done["blob"]))
    assert done["blob"][: done["rgb"]] == picture.pixels.tobytes()
    png = done["blob"][done["rgb"] :]
    np.testing.assert_array_equal(image_from_png(png), picture.pixels)
    assert b"Seed: 18446744073709551615" in png
    assert done["timings"].keys() == {"queued", "encode", "denoise", "decode", "total"}
    assert done["timings"]["total"] > 0
    assert "one colour all over" in done["warnings"][0]


def test_a_large_picture_from_a_large_picture(host: Host, folder: Path) -> None:
    """Blobs that travel as shared memory, both ways."""
    image = np.random.default_rng(0).integers(0, 256, (256, 192, 3), dtype=np.uint8)
    host.open(folder)
    host.submit(1, image.tobytes(), image=[192, 256], request={"width": None, "height": None, "strength": 0.7})
    done = host.wait("done", "failed", job=1)
    with Pipeline.open(folder, backend="fake") as pipe:
        picture = pipe("a cat", steps=3, seed=1, image=image, strength=0.7).images[0]
    assert (done["width"], done["height"], done["png"]) == (192, 256, 0)
    assert done["blob"] == picture.pixels.tobytes()
    assert host.of(1) == ["started", "progress", "progress", "done"]


def test_a_second_bundle_refines(inside: Host, folder: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    inside.open(folder, refiner=str(twin))
    inside.submit(1, request={"sampler": "dpmpp_2m", "steps": 6, "refiner_at": 0.5})
    done = inside.wait("done", "failed", job=1)
    assert inside.of(1) == ["started", *["progress"] * 6, "done"]
    with Pipeline.open(folder, backend="fake", refiner=twin) as pipe:
        picture = pipe("a cat", steps=6, seed=1, size=(64, 64), sampler="dpmpp_2m", refiner_at=0.5).images[0]
    assert done["blob"][: done["rgb"]] == picture.pixels.tobytes()


def test_a_mask_comes_behind_the_rows_of_its_image(host: Host, folder: Path) -> None:
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (192, 256, 3), dtype=np.uint8)
    mask = random.integers(0, 256, (192, 256), dtype=np.uint8)
    settings: dict[str, Any] = {"mask_blur": 2, "overlay": True, "extend": [0, 64, 0, 0]}
    host.open(folder)
    request = {"width": None, "height": None, "strength": 0.7} | settings
    host.submit(1, image.tobytes() + mask.tobytes(), image=[256, 192], mask=True, request=request)
    host.submit(2, request={"hires": 2, "hires_steps": 4})
    found = [host.wait("done", "failed", job=job) for job in (1, 2)]
    with Pipeline.open(folder, backend="fake") as pipe:
        pictures = [
            pipe("a cat", steps=3, seed=1, image=image, mask=mask, strength=0.7, **settings).images[0],
            pipe("a cat", steps=3, seed=1, size=(64, 64), hires=2, hires_steps=4).images[0],
        ]
    for done, picture in zip(found, pictures, strict=True):
        assert (done["width"], done["height"]) == picture.size
        assert done["blob"][: done["rgb"]] == picture.pixels.tobytes()
    assert [picture.size for picture in pictures] == [(256, 256), (128, 128)]


def test_without_a_seed_a_random_one_is_told(host: Host, folder: Path) -> None:
    host.open(folder)
    for job in (1, 2):
        host.submit(job, request={"seed": None})
    assert host.wait("done", job=1)["seed"] != host.wait("done", job=2)["seed"]


def test_cancelling(host: Host, folder: Path) -> None:
    host.open(folder, running=1)
    for job in (1, 2, 3):
        host.submit(job, request=LONG if job < 3 else None)
    host.wait("progress", job=1)
    for job in (2, 1, 1, 77):  # waiting, running, twice, unknown
        host.say("cancel", job=job)
    for job in (1, 2):
        failed = host.wait("failed", "done", job=job)
        assert (failed["event"], failed["code"], failed["message"]) == ("failed", 130, "cancelled")
    assert host.wait("done", "failed", job=3)["event"] == "done"
    host.say("cancel", job=3)
    assert host.of(2) == ["failed"]
    assert host.of(3).count("done") == 1


def test_a_full_queue(host: Host, folder: Path) -> None:
    host.open(folder, running=1, queue=2)
    for job in range(4):
        host.submit(job, request=LONG)
    failed = host.wait("failed", job=3)
    assert (failed["code"], failed["reason"]) == (1, "queue_full")
    assert "the queue holds 2 besides the 1 that run" in failed["message"]
    host.close()
    ends = [host.wait("failed", job=job) for job in range(3)]
    assert [(each["code"], each["reason"]) for each in ends] == [(130, "closed")] * 3
    assert host.events[-1]["event"] == "closed"
    host.submit(9)
    failed = host.wait("failed", job=9)
    assert (failed["message"], failed["reason"]) == ("the service is closed", "closed")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"request": {"sead": 1}}, "request.sead: unknown key; did you mean seed?"),
        ({"request": {"sampler": "eular"}}, "unknown sampler 'eular'"),
        ({"request": {"seed": 2**64}}, "request.seed: expected a whole number of 64 bits, got 18446744073709551616"),
        ({"request": {"seed": -1}}, "seed -1 is outside"),
        ({"request": {"seed": 1.0}}, "request.seed: expected a whole number, got 1.0"),
        ({"request": {"steps": True}}, "request.steps: expected a whole number, got true"),
        ({"request": {"sigmas": [2, "1"]}}, "request.sigmas"),
        ({"request": {"sigmas": [1, 2.0]}}, "sigmas[1] 2.0: expected less than the level before it"),
        ({"request": {"prompt": None}}, "request.prompt: expected text, got null"),
        ({"request": {"guidance": "7"}}, 'request.guidance: expected a number or a list, got "7"'),
        ({"request": {"width": None}}, "width None and height 64: give both or neither"),
        ({"request": {"width": 60}}, "size 60x64: both sides must be multiples of 64"),
        ({"request": {"options": {"etha": 1}}}, "eta"),
        ({"request": {"strength": 2}}, "strength 2.0 is outside 0 (excluded) to 1"),
        ({"image": [64, 64]}, "image 64x64: expected 12,288 bytes of RGB8 rows in the blob, got 0"),
        ({"image": [0, -1]}, "image 0x-1: expected its width and height in pixels"),
        ({"image": [64]}, "image: expected 2 items, got 1"),
        ({"mask": True}, "mask: it marks a part of an image: send the image too"),
        ({"image": [64, 64], "mask": True}, "image 64x64: expected 16,384 bytes of RGB8 rows and a mask of 8 bits in the blob"),
        ({"depth": [4, 4]}, "depth: it is that of an image: send the image too"),
        ({"image": [64, 64], "depth": [4, 0]}, "depth 4x0: expected its width and height in pixels"),
        (
            {"image": [64, 64], "mask": True, "depth": [4, 5]},
            "image 64x64: expected 16,404 bytes of RGB8 rows and a mask of 8 bits and a depth map of 4x5 in the blob, got 0",
        ),
        ({"previw": True}, "previw: unknown key; did you mean preview?"),
        ({"device_buffer": 4096, "device_buffer_size": 1 << 20}, "device_buffer of job 1"),
    ],
)
def test_a_wrong_job_is_refused_alone(inside: Host, folder: Path, fields: dict[str, Any], text: str) -> None:
    inside.open(folder)
    inside.submit(1, **fields)
    failed = inside.wait("failed", "done", job=1)
    assert (failed["event"], failed["code"]) == ("failed", 2)
    assert text in failed["message"]
    inside.submit(2)
    assert inside.wait("failed", "done", job=2)["event"] == "done"


def test_a_device_buffer_is_refused_where_the_engines_or_the_process_cannot_reach_it(
    inside: Host, worker: Worker, folder: Path
) -> None:
    for host, text in ((inside, "the engines run on the CPU"), (worker, "a separate process cannot use")):
        host.open(folder)
        host.submit(1, device_buffer=4096, device_buffer_size=1 << 20)
        assert text in host.wait("failed", job=1)["message"]


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"backend": "tensorrt-x"}, 2, "did you mean tensorrt"),
        ({"thread": 2}, 2, "options.thread: unknown key; did you mean threads, stream?"),
        ({"tile": 100}, 2, "tile 100: the side must be a multiple of 8 pixels, and at least 64"),
        ({"threads": -1}, 2, "threads -1"),
        ({"queue": 0}, 2, "queue 0: at least 1 image"),
        ({"memory": 0}, 2, "memory 0: at least 1 byte"),
        ({"device": "gpu"}, 2, "device 'gpu': expected a number, cuda:NUMBER, or a UUID"),
        ({"device": 3}, 3, "no NVIDIA driver"),
        ({"device": "cuda:0"}, 3, "no NVIDIA driver"),
        ({"device": "GPU-12345678-9abc-def0-1234-56789abcdef0"}, 3, "0 GPUs have a UUID that begins with it; available: none"),
        ({"stream": 4096}, 2, "stream: engines of fake cannot use the caller's CUDA stream"),
    ],
)
def test_what_cannot_be_opened_is_refused(
    inside: Host, folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], code: int, text: str
) -> None:
    from sdruntime.system import cuda

    monkeypatch.setattr(cuda, "load_driver", lambda: None)
    monkeypatch.setattr(cuda, "devices", lambda: ())
    refused = inside.open(folder, **options)
    assert (refused["event"], refused["code"]) == ("refused", code)
    assert text in refused["message"]
    assert inside.open(folder)["event"] == "ready"  # the service is as it was


def test_a_bundle_that_is_none_and_a_second_one(host: Host, folder: Path, tmp_path: Path) -> None:
    refused = host.open(tmp_path)
    assert (refused["event"], refused["code"]) == ("refused", 5)
    assert "not a bundle" in refused["message"]
    host.submit(1)
    assert "no bundle is open" in host.wait("failed", job=1)["message"]
    assert host.open(folder)["event"] == "ready"
    assert "has already opened a bundle" in host.open(folder)["message"]


def test_a_caller_s_stream_is_out_of_a_worker_s_reach(worker: Worker, folder: Path) -> None:
    assert "cannot use the caller's CUDA stream" in worker.open(folder, stream=4096)["message"]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"", "not JSON in UTF-8"),
        (b"\xff{}", "not JSON in UTF-8"),
        (b"[]", "an object with an"),
        (b'{"op": 3}', "an object with an"),
        (b'{"op": "sumbit"}', "did you mean submit?"),
        (b'{"op": "cancel"}', "cancel: job: missing"),
        (b'{"op": "cancel", "job": "1"}', 'cancel: job: expected a whole number, got "1"'),
        (b'{"op": "submit", "job": true, "request": {"prompt": ""}}', "submit: job: expected a whole number, got true"),
    ],
)
def test_a_message_of_no_job_is_told_in_the_log(host: Host, message: bytes, text: str) -> None:
    host.send(message, None)
    told = host.wait("log")
    assert told["level"] == "error"
    assert text in told["message"]


def test_a_number_that_is_taken_does_not_end_the_job_that_has_it(host: Host, folder: Path) -> None:
    host.open(folder)
    host.submit(1, request={"steps": 300, "width": 1024, "height": 1024})
    host.submit(1)
    assert "job 1 is already running" in host.wait("log")["message"]
    assert host.wait("done", "failed", job=1)["event"] == "done"
    host.submit(1)  # free again
    assert host.wait("done", "failed", job=1, count=2)["event"] == "done"


def test_what_nobody_expected_is_told_with_its_traceback(inside: Host, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside.open(folder)
    monkeypatch.setattr(Pipeline, "images", lambda *_: [][1])
    inside.submit(1)
    failed = inside.wait("failed", job=1)
    assert (failed["code"], failed["message"]) == (1, "IndexError: list index out of range")
    told = inside.wait("log")
    assert told["message"].startswith("Traceback")
    assert "batcher.py" in told["message"]


def test_warnings_of_the_opening_are_logged(inside: Host, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engines, "_check_memory", lambda self: warnings.warn("this will be slow", RuntimeWarning, stacklevel=1))
    assert inside.open(folder)["event"] == "ready"
    assert inside.wait("log")["level"] == "warning"
    assert inside.wait("log")["message"] == "this will be slow"


def test_the_worker_ends_when_the_socket_does(worker: Worker, folder: Path) -> None:
    worker.open(folder)
    worker.submit(1, request={"steps": 999})
    worker.wait("progress", job=1)
    assert worker.leave() == 0


def test_the_worker_leaves_ctrl_c_to_its_host(worker: Worker, folder: Path) -> None:
    worker.open(folder)
    worker.submit(1, request={"steps": 300})
    worker.wait("progress", job=1)
    worker.process.send_signal(signal.SIGINT)
    assert worker.wait("done", "failed", job=1)["event"] == "done"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_the_end_of_the_socket(worker: Worker, folder: Path, how: signal.Signals) -> None:
    worker.open(folder)
    for job in range(8):
        worker.submit(job, request={"steps": 999})
    worker.wait("progress", job=7)
    worker.process.send_signal(how)
    assert worker.ended.wait(WAIT)
    assert worker.process.wait(WAIT) == -how
    assert all("done" not in worker.of(job) for job in range(8))


def test_many_threads_with_random_cancels_lose_nothing(host: Host, folder: Path) -> None:
    """Each job gets one end, whatever comes between; descriptors and threads are as before."""
    host.open(folder, queue=6, running=4)

    def client(first: int) -> None:
        chance = random.Random(first)
        for job in range(first, first + 25):
            steps, size = chance.choice([1, 5, 40]), chance.choice([64, 128, 60])
            host.submit(job, request={"steps": steps, "width": size}, png=chance.random() < 0.3)
            if chance.random() < 0.4:
                host.say("cancel", job=job)
            if chance.random() < 0.5:
                host.wait("done", "failed", job=job)

    def round_of(first: int) -> None:
        clients = [threading.Thread(target=client, args=(first + 25 * k,)) for k in range(8)]
        for each in clients:
            each.start()
        for each in clients:
            each.join(WAIT)
        for job in range(first, first + 200):
            host.wait("done", "failed", job=job)

    round_of(0)
    before = _open_files(host), threading.active_count()
    round_of(200)
    assert (_open_files(host), threading.active_count()) == before
    ends = [[name for name in host.of(job) if name in ENDS] for job in range(400)]
    assert [len(each) for each in ends] == [1] * 400
    codes = {each["code"] for each in host.events if each["event"] == "failed"}
    assert codes == {1, 2, 130}
    assert sum(each == ["done"] for each in ends) > 40


def test_nothing_of_the_bundle_is_open_when_a_host_is_told_that_it_is_closed(inside: Host, folder: Path) -> None:
    """Nor is it left to the garbage collector, which a host that counts its files does not wait for."""
    held: list[bool] = []
    emit = inside.emit

    def counting(message: bytes, blob: Any) -> None:
        if json.loads(message)["event"] in ("done", "closed"):
            held.append(bool(open_links(folder)))
        emit(message, blob)

    inside.send = Service(counting).handle
    gc.collect()
    gc.disable()
    try:
        inside.open(folder)
        inside.submit(1)
        inside.wait("done", job=1)
        inside.close()
    finally:
        gc.enable()
    assert held == [True, False]


def _open_files(host: Host) -> list[int]:
    """Of this process, and of the worker."""
    processes = [os.getpid(), *([host.process.pid] if isinstance(host, Worker) else [])]
    return [open_files(process) for process in processes]


@pytest.mark.parametrize("arguments", [[], ["x"], ["987654"], ["1", "2"]])
def test_a_worker_without_a_socket_says_what_it_expects(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert f"expected the number of an open socket's descriptor, got {' '.join(arguments) or 'nothing'}" in told
