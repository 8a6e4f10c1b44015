"""The sampler's loop on the device: the NumPy loop's pictures, no wait of the host between steps, and nothing left behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from trt.conftest import psnr, with_engines
from trt.machine import Machine

from sdruntime.backends.base.engine import EngineOptions
from sdruntime.errors import NotFinite
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.sampling.job import Job
from sdruntime.sampling.samplers import SAMPLERS

PROMPT = "a cat in the red and"


@pytest.fixture(scope="module")
def bundles() -> dict[str, Path]:
    return {}


@pytest.fixture
def folder(here: Machine, sd1_bundle: Path, bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SD1 with engines for 1 to 8 rows, made once."""
    if "sd1" not in bundles:
        place = tmp_path_factory.mktemp("loop") / "bundle"
        bundles["sd1"] = with_engines(sd1_bundle, place, here, batch="1:1:4", guidance="any")
    return bundles["sd1"]


@pytest.fixture
def pipe(folder: Path, here: Machine) -> Iterator[Pipeline]:
    with Pipeline.open(folder, backend=here.backend) as opened:
        yield opened


def ends_of(jobs: Iterable[Job]) -> list[np.ndarray]:
    """Return each job's latents, and the last estimate of the finished ones."""
    return [np.stack([job.run.x, job.run.clean]) for job in jobs]


def latents(pipe: Pipeline, *requests: Request, on_device: bool) -> list[np.ndarray]:
    stream = pipe.stream(list(requests), on_device=on_device)
    for _ in stream:
        pass
    stream.close()
    return ends_of(stream.jobs)


def assert_near(ours: list[np.ndarray], reference: list[np.ndarray]) -> None:
    for one, other in zip(ours, reference, strict=True):
        assert np.isfinite(one).all()
        assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max()


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith(("flow_", "edm_"))])
def test_every_sampler_ends_where_the_numpy_loop_ends(pipe: Pipeline, here: Machine, sampler: str) -> None:
    request = Request(prompt=PROMPT, seed=7, steps=6, sampler=sampler)
    reference = latents(pipe, request, on_device=False)
    assert here.gpus.counts["launches"] == 0
    assert_near(latents(pipe, request, on_device=True), reference)
    assert here.gpus.counts["launches"] > 0


def test_jobs_of_different_steps_samplers_and_guidance_go_together(pipe: Pipeline) -> None:
    requests = [
        Request(prompt=PROMPT, seed=1, steps=3, sampler="euler_a"),
        Request(prompt="a cat", seed=2, steps=7, sampler="dpmpp_2m", guidance=1.0),
        Request(prompt="red", negative="the", seed=3, steps=5, sampler="unipc", guidance=4.0),
        Request(prompt="red", seed=4, steps=5, sampler="euler", options={"s_churn": 2.0}, guidance_interval=(0.3, 0.9)),
        Request(prompt="the", seed=5, steps=3, sampler="ddim", guidance=[7.0, 1.0, 3.0]),
    ]
    assert_near(latents(pipe, *requests, on_device=True), latents(pipe, *requests, on_device=False))


def test_what_is_not_finite_on_the_device_is_told_at_the_end_of_the_loop(pipe: Pipeline, here: Machine) -> None:
    stream = pipe.stream(Request(prompt=PROMPT, seed=1, steps=4, sampler="euler"), on_device=True)
    job = stream.jobs[0]
    hidden = job.rows[-1]["encoder_hidden_states"].copy()
    hidden[0, 0] = np.nan
    job.rows = (job.rows[0], {**job.rows[-1], "encoder_hidden_states": hidden})
    states = iter(stream)
    assert [next(states).step for _ in range(4)] == [1, 2, 3, 4]
    with pytest.raises(NotFinite, match=r"unet, after step 4 of 4, sampler euler: the latents are no longer finite"):
        next(states)
    assert here.gpus.counts["launches"] > 0


def test_the_host_waits_for_no_step(pipe: Pipeline, here: Machine) -> None:
    """One wait at the end of the loop, whatever its length; from the third step on a step is one launch of a graph."""
    pipe(PROMPT, steps=3, seed=1)
    counted = []
    for steps in (10, 30):
        stream = pipe.stream(PROMPT, steps=steps, seed=1, on_device=True)
        before = Counter(here.gpus.counts)
        for _ in stream:
            pass
        counted.append(here.gpus.counts - before)
    assert [count["cuStreamSynchronize"] for count in counted] == [1, 1]
    assert [count["cuEventSynchronize"] for count in counted] == [0, 0]
    assert [count["launches"] for count in counted] == [11, 31]  # pndm's; the graph of the first picture is kept
    assert [count["cuStreamBeginCapture_v2"] for count in counted] == [0, 0]
    assert [count["cuMemAlloc_v2"] for count in counted] == [1, 1]  # room for a longer program
    assert [count["pageable copies"] for count in counted] == [0, 0]


def test_the_whole_loop_can_be_one_graph(folder: Path, here: Machine) -> None:
    with Pipeline.open(folder, backend=here.backend, options=EngineOptions(whole_loop=True)) as pipe:
        warm = pipe(PROMPT, steps=6, seed=1, sampler="dpmpp_2m").pixels[0]
        launches, captures = here.gpus.counts["launches"], here.gpus.counts["cuStreamBeginCapture_v2"]
        pictures = [pipe(PROMPT, steps=6, seed=seed, sampler="dpmpp_2m").pixels[0] for seed in (1, 2, 1)]
        assert here.gpus.counts["launches"] - launches == 3  # one a picture
        assert here.gpus.counts["cuStreamBeginCapture_v2"] - captures == 1
        reference = latents(pipe, Request(prompt=PROMPT, seed=1, steps=6, sampler="dpmpp_2m"), on_device=False)
        assert_near(latents(pipe, Request(prompt=PROMPT, seed=1, steps=6, sampler="dpmpp_2m"), on_device=True), reference)
    assert psnr(pictures[0], warm) >= 60
    assert psnr(pictures[2], warm) >= 60
    assert psnr(pictures[1], warm) < 40


EDITED = Request(prompt="a [cat:red:3]", negative="[x|the]", prompt_syntax="a1111", seed=4, steps=6, sampler="dpmpp_2m")


def test_rows_that_change_are_written_again_on_the_device(pipe: Pipeline, here: Machine) -> None:
    plain = Request(prompt=PROMPT, seed=1, steps=4, sampler="euler_a")
    reference = latents(pipe, EDITED, plain, on_device=False)
    assert here.gpus.counts["launches"] == 0
    assert_near(latents(pipe, EDITED, plain, on_device=True), reference)
    assert_near(latents(pipe, EDITED, on_device=True), reference[:1])
    assert here.gpus.counts["launches"] > 0
    unedited = Request(prompt="a cat", negative="x", seed=4, steps=6, sampler="dpmpp_2m")
    assert np.abs(latents(pipe, unedited, on_device=True)[0] - reference[0]).max() > 5e-3 * np.abs(reference[0]).max()


def test_long_prompts_go_through_the_device(here: Machine, sd1_bundle: Path, tmp_path: Path) -> None:
    """Jobs of one chunk and of two share no call; the device's buffers of a text that changes are of both its chunks."""
    folder = with_engines(sd1_bundle, tmp_path / "bundle", here, chunks="1:3")
    long = Request(prompt="a [cat:(red:1.3):2] BREAK the", prompt_syntax="a1111", seed=1, steps=4, sampler="euler")
    with Pipeline.open(folder, backend=here.backend) as pipe:
        requests = [long, EDITED]
        reference = [latents(pipe, request, on_device=False)[0] for request in requests]
        assert here.gpus.counts["launches"] == 0
        assert_near(latents(pipe, *requests, on_device=True), reference)
        assert here.gpus.counts["launches"] > 0


def test_a_loop_whose_rows_change_is_not_one_graph(folder: Path, here: Machine) -> None:
    with Pipeline.open(folder, backend=here.backend, options=EngineOptions(whole_loop=True)) as pipe:
        pipe(EDITED)
        launches = here.gpus.counts["launches"]
        image = pipe(EDITED).pixels[0]
        assert here.gpus.counts["launches"] - launches == 6
        stream = pipe.stream(EDITED)
        for _ in stream:
            pass
        assert psnr(stream.result.pixels[0], image) >= 60


def test_a_whole_loop_waits_until_all_jobs_end_together(small_folder: Path, here: Machine) -> None:
    """A job that ends sooner lets the others be grouped anew, in the middle of their steps."""
    requests = [
        Request(prompt=PROMPT, seed=1, steps=3, size=(64, 64), sampler="dpmpp_2m"),
        Request(prompt="a cat", seed=2, steps=5, size=(128, 64), sampler="euler_a"),
    ]
    pictures = []
    for whole in (False, True):
        with Pipeline.open(small_folder, options=EngineOptions(whole_loop=whole)) as pipe:
            pictures.append([pipe(requests).pixels for _ in range(2)][-1])
    for ours, reference in zip(*pictures, strict=True):
        assert (ours == reference).all()


def test_a_second_pass_runs_on_the_device_too(sd1_bundle: Path, here: Machine, tmp_path: Path) -> None:
    """Its first pass ends while another job goes on; both groups are made anew."""
    requests = [
        Request(prompt=PROMPT, seed=1, steps=3, sampler="euler_a", size=(64, 64), hires=2, hires_steps=6),
        Request(prompt=PROMPT, seed=2, steps=9, sampler="dpmpp_2m", size=(64, 64)),
        Request(prompt=PROMPT, seed=3, steps=5, sampler="ddim", size=(128, 128)),
    ]
    folder = with_engines(sd1_bundle, tmp_path / "bundle", here, batch="1:1:4", guidance="any", size="64x64:64x64:128x128")
    with Pipeline.open(folder, backend=here.backend) as pipe:
        reference = latents(pipe, *requests, on_device=False)
        assert here.gpus.counts["launches"] == 0
        assert_near(latents(pipe, *requests, on_device=True), reference)
    assert here.gpus.counts["launches"] > 0
    assert [end.shape[-1] for end in reference] == [16, 8, 16]


def test_half_precision_gives_the_same_picture(here: Machine, sd1_fp16_bundle: Path, tmp_path: Path) -> None:
    folder = with_engines(sd1_fp16_bundle, tmp_path / "bundle", here)
    with Pipeline.open(folder, backend=here.backend) as pipe:
        ours = pipe(PROMPT, steps=20, seed=3).pixels[0]
        assert here.gpus.counts["launches"] > 0
        stream = pipe.stream(PROMPT, steps=20, seed=3)
        for _ in stream:
            pass
        reference = stream.result.pixels[0]
    assert reference.std() >= 10
    assert psnr(ours, reference) >= 50


def test_a_stop_takes_effect_within_a_step(pipe: Pipeline, here: Machine) -> None:
    stream = pipe.stream(PROMPT, steps=50, seed=1, on_device=True)
    before = here.gpus.counts["executions"] + here.gpus.counts["launches"]
    for state in stream:
        if state.step == 5:
            break
    image = stream.result.pixels[0]
    assert image.shape == (64, 64, 3)
    assert stream.jobs[0].run.step == 5
    assert here.gpus.counts["executions"] + here.gpus.counts["launches"] - before < 10


def test_latents_may_be_looked_at_on_the_way(pipe: Pipeline) -> None:
    seen = {}
    for on_device in (True, False):
        for state in pipe.stream(PROMPT, steps=6, seed=1, on_device=on_device):
            if state.step in (2, 4):
                seen[on_device, state.step] = state.jobs[0].run.x.copy()
    for step in (2, 4):
        assert_near([seen[True, step]], [seen[False, step]])


def test_a_loop_that_was_begun_on_the_device_goes_on_in_numpy(pipe: Pipeline) -> None:
    """The windows of a multistep sampler, and the noise that was drawn ahead, come back with it."""
    from sdruntime.pipeline.denoise import denoise

    for sampler in ("dpmpp_3m_sde", "pndm", "euler_a"):
        stream = pipe.stream(PROMPT, steps=8, seed=1, sampler=sampler, on_device=True)
        for state in stream:
            if state.step == 4:
                break
        stream.close()
        for _ in denoise(stream.jobs, pipe.steppers):
            pass
        reference = latents(pipe, Request(prompt=PROMPT, seed=1, steps=8, sampler=sampler), on_device=False)
        assert_near(ends_of(stream.jobs), reference)


def test_jobs_join_and_leave_between_steps(pipe: Pipeline) -> None:
    from sdruntime.pipeline.denoise import denoise

    requests = [Request(prompt=PROMPT, seed=seed, steps=steps, sampler="dpmpp_2m") for seed, steps in ((1, 6), (2, 3), (3, 5))]
    alone = latents(pipe, *requests, on_device=False)
    first, second, late = pipe.stream(requests).jobs
    crowd = [first, second]
    for step, _ in enumerate(denoise(crowd, pipe.device_steppers), start=1):
        if step == 2:
            crowd.append(late)
    assert_near(ends_of((first, second, late)), alone)


def test_a_rescaled_guidance_is_left_to_numpy(pipe: Pipeline, here: Machine) -> None:
    before = here.gpus.counts["launches"]
    pipe(PROMPT, steps=4, seed=1, rescale=0.7)
    assert here.gpus.counts["launches"] == before


def test_more_jobs_than_a_profile_has_room_for_go_in_parts(pipe: Pipeline) -> None:
    requests = [Request(prompt=PROMPT, seed=seed, steps=4, sampler="dpmpp_2m") for seed in range(7)]
    assert_near(latents(pipe, *requests, on_device=True), latents(pipe, *requests, on_device=False))


def test_leaving_a_pipeline_in_the_middle_of_a_loop_leaves_nothing(folder: Path, here: Machine) -> None:
    with Pipeline.open(folder, backend=here.backend) as pipe:
        stream = pipe.stream(PROMPT, steps=9, seed=1, on_device=True)
        next(iter(stream))
    assert here.gpus.leaks() == []
    assert stream.jobs[0].run.x.shape == (4, 8, 8)


def test_two_loops_at_a_time_keep_out_of_each_other_s_way(pipe: Pipeline, here: Machine) -> None:
    """Streams of one shape, and more of other shapes than frames are kept; a loop's frame stays until it ends."""
    requests = [Request(prompt=PROMPT, seed=seed, steps=5, sampler="dpmpp_2m", size=(64, 64)) for seed in range(3)]
    many = [Request(prompt=PROMPT, seed=seed, steps=5, size=(64, 64)) for seed in range(4)]
    alone = [latents(pipe, request, on_device=True)[0] for request in requests]
    streams = [pipe.stream(request, on_device=True) for request in requests]
    for states in zip(*streams, strict=True):
        if states[0].step in (2, 3):
            for count in (1, 2, 3, 4):
                latents(pipe, *many[:count], on_device=True)
    assert_near(ends_of(stream.jobs[0] for stream in streams), alone)
