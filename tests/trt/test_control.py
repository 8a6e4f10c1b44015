"""A ControlNet and the UNet in one captured step of the GPU loop: the NumPy loop's latents, in mixed batches too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from trt.conftest import DRAWN, with_engines
from trt.machine import Machine
from trt.small import UNION, small_bundle

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import EngineOptions
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.request import Request
from sdruntime.verification.inputs import patches

NETS = ("controlnet_canny", "controlnet_pose", UNION)
STEPS = 6


@pytest.fixture
def folder(here: Machine, tmp_path: Path) -> Path:
    small_bundle(tmp_path / "bare", controlnets=NETS)
    components = (*DRAWN, *NETS)
    place = with_engines(
        tmp_path / "bare", tmp_path / "bundle", here, components=components, size="64x64", batch="1:1:4", guidance="any"
    )
    for _ in build_engines(place, BuildRequest(backend="onnxruntime", components=(*DRAWN[:3], *NETS))):
        pass
    return place


@pytest.fixture
def pipe(folder: Path, here: Machine) -> Iterator[Pipeline]:
    with Pipeline.open(folder, backend=here.backend) as opened:
        yield opened


def control(net: str, **settings: float) -> Control:
    return Control(image=patches((64, 64), len(net)), net=net, **settings)  # type: ignore[arg-type]


def request_for(seed: int, *controls: Control, **settings: object) -> Request:
    basic: dict[str, object] = {"prompt": f"cat {seed}", "seed": seed, "steps": STEPS, "sampler": "ddim", "size": (64, 64)}
    return Request(**(basic | {"guidance": 4.0, "control": controls} | settings))  # type: ignore[arg-type]


ALL = request_for(1, control("canny"))
PART = request_for(2, control("canny", scale=0.6, start=0.2, end=0.6))
GUESS = request_for(3, control("canny", scale=0.7, end=0.5), guess_mode=True, guidance=3.0)
UNGUIDED = request_for(4, control("canny", start=0.5), guidance=1.0)
POSE = request_for(5, control("pose", scale=1.5))
PLAIN = request_for(6)
TYPES = [request_for(8 + kind, control("union", type=kind)) for kind in (0, 1)]


def latents(pipe: Pipeline, *requests: Request, on_device: bool) -> list[Array]:
    jobs = pipe.jobs(list(requests))
    for _ in pipe.loop(jobs, pipe.device_steppers if on_device else pipe.steppers):
        pass
    return [job.run.x.copy() for job in jobs]


def assert_near(ours: list[Array], reference: list[Array]) -> None:
    for one, other in zip(ours, reference, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_loop_on_the_device_is_that_on_the_host(folder: Path, pipe: Pipeline, here: Machine) -> None:
    with Pipeline.open(folder, backend="onnxruntime") as other:
        [reference] = latents(other, PART, on_device=False)
        [bare] = latents(other, request_for(2), on_device=False)
    assert np.abs(reference - bare).max() > 0.1
    assert_near(latents(pipe, PART, on_device=False), [reference])
    for requests in (
        [PART],
        [ALL],
        [GUESS],
        [UNGUIDED],
        [ALL, PART, GUESS, UNGUIDED],
        [PLAIN, PART],
        [PLAIN],
        [POSE, PLAIN, ALL],
        [*TYPES, PLAIN],
    ):
        expected = [latents(pipe, request, on_device=False)[0] for request in requests]
        launches = here.gpus.counts["launches"]
        assert_near(latents(pipe, *requests, on_device=True), expected)
        assert here.gpus.counts["launches"] - launches >= STEPS - 2, requests


def test_a_step_with_a_controlnet_is_one_launch_and_the_host_waits_once(pipe: Pipeline, here: Machine) -> None:
    for _ in range(2):
        latents(pipe, PART, on_device=True)  # creates the graphs
    before = Counter(here.gpus.counts)
    latents(pipe, PART, on_device=True)
    counted = here.gpus.counts - before
    assert counted["launches"] == STEPS
    assert counted["cuStreamSynchronize"] == 1
    assert counted["cuStreamBeginCapture_v2"] == counted["pageable copies"] == 0


def test_the_whole_loop_is_one_graph(folder: Path, here: Machine) -> None:
    with Pipeline.open(folder, backend=here.backend, options=EngineOptions(whole_loop=True)) as pipe:
        for _ in range(2):
            first = pipe(PART).pixels[0]
        launches = here.gpus.counts["launches"]
        again = [pipe(PART).pixels[0] for _ in range(2)]
        assert here.gpus.counts["launches"] - launches == 2
    assert all(np.abs(each.astype(int) - first).max() <= 1 for each in again)


def test_several_controlnets_of_a_request_run_on_the_host(pipe: Pipeline, here: Machine) -> None:
    both = request_for(7, control("canny", scale=0.5), control("pose", end=0.5))
    with pytest.warns(UserWarning, match="control: each step returns to the host, which adds up several ControlNets"):
        pipe.stream(both).close()
    [reference] = latents(pipe, both, on_device=False)
    launches = here.gpus.counts["launches"]
    assert_near(latents(pipe, both, on_device=True), [reference])
    assert here.gpus.counts["launches"] == launches


def test_zeros_are_copied_to_the_device_once(pipe: Pipeline, here: Machine) -> None:
    """Of requests without control, on the host and on the device."""
    pipe.jobs([PLAIN])  # encodes its texts
    for on_device in (False, True):
        copies = []
        for _ in range(3):
            before = here.gpus.counts["cuMemcpyHtoDAsync_v2"]
            latents(pipe, PLAIN, on_device=on_device)
            copies.append(here.gpus.counts["cuMemcpyHtoDAsync_v2"] - before)
        assert copies[0] - copies[1] == 2  # one for each residual
        assert copies[1] == copies[2]
