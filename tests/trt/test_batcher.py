"""The queue and the service where the loop stays on the device: the caller's stream alone, and nothing left behind."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hosts import WAIT, Host
from trt.conftest import psnr
from trt.machine import Machine
from trt.surface import Surface

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import EngineOptions
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.memory import memory_plan
from sdruntime.errors import NotFinite
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.serving.batcher import Batcher, ImageFuture, Progress
from sdruntime.system.cuda import Cuda, devices

WIDE = {"seed": 3, "width": 128, "height": 64}
PROMPT = "a cat"


def request_for(seed: int, *, steps: int = 5, sampler: str = "dpmpp_2m", **settings: Any) -> Request:
    return Request(prompt=f"{PROMPT} {seed}", seed=seed, steps=steps, sampler=sampler, **({"size": (64, 64)} | settings))


def crowd() -> list[Request]:
    return [
        request_for(1, steps=6),
        request_for(2, steps=3, sampler="euler_a", guidance=1.0),
        request_for(3, steps=7, sampler="unipc", negative="red"),
        request_for(4, steps=4, size=(128, 64)),
        request_for(5, steps=5, rescale=0.7),  # NumPy's
    ]


@pytest.fixture
def pipe(small_folder: Path, here: Machine) -> Iterator[Pipeline]:
    with Pipeline.open(small_folder) as opened:
        yield opened


def test_jobs_join_and_leave_a_loop_on_the_device(pipe: Pipeline, here: Machine) -> None:
    alone = [pipe(request).pixels[0] for request in crowd()]
    before = here.gpus.counts["launches"]
    late: list[ImageFuture] = []

    def join(at: Progress) -> None:
        if at.step in (1, 2, 3, 4):
            late.append(batcher.submit(crowd()[at.step]))

    with Batcher(pipe) as batcher:
        assert batcher.running == 4
        pictures = [batcher.submit(crowd()[0], progress=join).result(WAIT)]
        pictures += [each.result(WAIT) for each in late]
    assert here.gpus.counts["launches"] > before
    for ours, reference in zip(pictures, alone, strict=True):
        assert reference.std() >= 1
        assert psnr(ours.pixels, reference) >= 50


def test_a_lone_job_draws_the_pipeline_s_picture_to_the_byte(pipe: Pipeline, here: Machine) -> None:
    with Batcher(pipe) as batcher:
        drawn = [batcher.submit(request).result(WAIT).pixels for request in crowd()]
    for ours, request in zip(drawn, crowd(), strict=True):
        np.testing.assert_array_equal(ours, pipe(request).pixels[0])


def test_a_step_that_is_told_is_done_on_the_device(pipe: Pipeline, here: Machine) -> None:
    """So that who arrives, or is cancelled, waits for one step and not for what was queued ahead; yet no stream is waited for."""
    queued: list[int] = []
    waits: list[int] = []

    def look(at: Progress) -> None:
        queued.append(len(here.gpus.queued()))
        waits.append(here.gpus.counts["cuStreamSynchronize"])

    with Batcher(pipe) as batcher:
        batcher.submit(request_for(1, steps=9), progress=look).result(WAIT)
    assert queued == [0] * 10
    assert waits[1:] == [waits[1]] * 9


def test_numbers_that_are_not_finite_end_their_job_alone(pipe: Pipeline) -> None:
    alone = pipe(request_for(1)).pixels[0]
    bad: list[ImageFuture] = []

    def join(at: Progress) -> None:
        if at.step == 1:
            bad.append(batcher.submit(request_for(2)))

    hidden = pipe.jobs([request_for(2)])[0].rows[-1]["encoder_hidden_states"]  # which is kept, and used again
    hidden.flags.writeable = True
    hidden[0, 0] = np.nan
    with Batcher(pipe) as batcher:
        picture = batcher.submit(request_for(1), progress=join).result(WAIT)
        with pytest.raises(NotFinite, match=r"unet, after step 5 of 5, sampler dpmpp_2m: the latents are no longer finite"):
            bad[0].result(WAIT)
    assert psnr(picture.pixels, alone) >= 50


def test_jobs_in_low_memory(small_folder: Path, here: Machine, pipe: Pipeline) -> None:
    """Components go and come between the steps, but the UNet stays while jobs are on their way."""
    alone = [pipe(request_for(k)).pixels[0] for k in (1, 2)]
    pipe.close()
    late: list[ImageFuture] = []
    with Pipeline.open(small_folder, options=EngineOptions(low_memory=True)) as low, Batcher(low) as batcher:

        def join(at: Progress) -> None:
            if at.step == 2:
                late.append(batcher.submit(request_for(2)))

        first = batcher.submit(request_for(1), progress=join).result(WAIT).pixels
        second = late[0].result(WAIT).pixels
    assert psnr(first, alone[0]) >= 50
    assert psnr(second, alone[1]) >= 50


def test_five_hundred_jobs_take_what_fifty_take(pipe: Pipeline, here: Machine) -> None:
    marks = {}
    for requests in ([request_for(k + 1, size=size) for k in range(jobs)] for size in ((64, 64), (128, 64)) for jobs in (1, 2)):
        for _ in pipe.stream(requests, on_device=True):  # whichever jobs meet below, a frame of their shape is kept since now
            pass
    with Batcher(pipe) as batcher:
        for number in range(1, 501):
            drawings = [batcher.submit(request_for(number + k, steps=1 + k, size=(64 + 64 * (number % 2), 64))) for k in range(2)]
            drawings[number % 2].cancel()
            assert all(each.wait(WAIT) for each in drawings)
            if number in (50, 500):
                marks[number] = sum(each.size for each in here.gpus.memory.live()), len(here.gpus.handles)
    assert marks[500][0] <= 1.02 * marks[50][0]
    assert marks[500][1] <= marks[50][1] + 2  # frames of one more shape at most


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    if not any(each["event"] == "closed" for each in made.events):
        made.close()


def test_the_caller_s_stream_and_device_buffer(here: Machine, small_folder: Path, host: Host) -> None:
    """The strict fake offers no function that stalls a device, and refuses a race between two streams."""
    with contextlib.ExitStack() as stack:
        caller = stack.enter_context(Cuda.open())
        stream = stack.enter_context(caller.stream())
        size = 3 * 128 * 64
        buffer = caller.allocate(size, "the caller's picture")
        stack.callback(buffer.close)
        stack.callback(host.close)
        made = here.gpus.counts["cuStreamCreate"]
        assert host.open(small_folder, backend="auto", stream=stream.handle)["event"] == "ready"
        pictures: list[Array] = []
        for number in (1, 2):
            host.submit(number, request=WIDE, device_buffer=buffer.pointer, device_buffer_size=size)
            done = host.wait("done", "failed", job=number)
            assert done["event"] == "done"
            found = here.gpus.memory.at(buffer.pointer)
            assert found is not None
            assert found.data[:size].tobytes() == done["blob"]
            pictures.append(np.frombuffer(done["blob"], np.uint8))
            found.data[:] = 0
        assert pictures[0].std() >= 1
        np.testing.assert_array_equal(*pictures)
        host.submit(3, request=WIDE, device_buffer=buffer.pointer, device_buffer_size=size - 1)
        failed = host.wait("failed", job=3)
        assert failed["code"] == 2
        assert re.search(r"24,575 bytes at 0x\w+, but the image has 24,576", failed["message"])
        assert here.gpus.counts["cuStreamCreate"] == made  # none but the caller's
        assert here.gpus.counts["launches"] > 0


def test_device_buffers_on_a_stream_of_the_runtime_s(here: Machine, small_folder: Path, host: Host) -> None:
    with Cuda.open() as caller, contextlib.closing(caller.allocate(3 * 128 * 64, "the caller's picture")) as buffer:
        assert host.open(small_folder, backend="auto")["event"] == "ready"
        host.submit(1, request=WIDE, device_buffer=buffer.pointer, device_buffer_size=1 << 20)
        done = host.wait("done", job=1)
        found = here.gpus.memory.at(buffer.pointer)
        assert found is not None
        assert found.data[: done["rgb"]].tobytes() == done["blob"]
        host.close()


def test_a_cap_below_the_need_is_refused_with_both_numbers(here: Machine, small_folder: Path, host: Host) -> None:
    manifest = Bundle.open(small_folder).manifest
    need = memory_plan(manifest, [each for each in manifest.engines if each.component not in ("vae_encoder", "step")]).total
    for cap in (need - 1, 1000):
        refused = host.open(small_folder, backend="auto", memory=cap)
        assert refused["code"] == 3
        assert f"the engines need {need:,} bytes and the budget is {cap:,}" in refused["message"]
    assert here.gpus.counts["cuMemAlloc_v2"] == 0
    assert host.open(small_folder, backend="auto", memory=need)["event"] == "ready"


def test_a_device_is_told_by_its_number_or_its_uuid(
    machine: Callable[..., Machine], surfaces: dict[str, Surface], small_folder: Path
) -> None:
    here = machine(surfaces["tensorrt 11.4.0.106"], devices=2)
    second = devices()[1].uuid
    full = f"GPU-{second[:8]}-{second[8:12]}-{second[12:16]}-{second[16:20]}-{second[20:]}"
    for device in (1, "1", "cuda:1", full, full.lower(), full[:-6]):
        host = Host()
        assert host.open(small_folder, backend="auto", device=device)["event"] == "ready"
        assert {each.device for each in here.gpus.memory.live()} - {None} == {1}
        host.close()
    for device, code in ((2, 3), ("cuda:7", 3), ("GPU-ffffffff", 3), ("GPU-", 2), ("second", 2)):
        host = Host()
        assert host.open(small_folder, backend="auto", device=device)["code"] == code
        host.close()
