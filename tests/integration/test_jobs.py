"""Jobs that run together draw what they draw alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from integration.reference import Array, psnr

from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request

SIZE = (64, 64)


def decoded(pipe: Pipeline, asked: list[Request]) -> list[Array]:
    stream = pipe.stream(asked)
    for _ in stream:
        pass
    return pipe.decode([job.run.x for job in stream.jobs])


def test_eight_different_jobs_in_shared_calls(shapes_bundle: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    asked = [
        Request(prompt="a small red circle on the left on a blue background", seed=1, steps=20, sampler="dpmpp_2m", size=SIZE),
        Request(prompt="a large green square in the centre on a white background", seed=2, steps=7, sampler="euler_a", size=SIZE),
        Request(prompt="a large yellow triangle at the top on a black background", seed=3, steps=13, sampler="unipc", size=SIZE),
        Request(prompt="a circle", negative="red", seed=4, steps=5, sampler="heun", guidance=3.0, size=SIZE),
        Request(prompt="a square", seed=5, steps=9, sampler="lcm", guidance=1.0, size=SIZE),
        Request(prompt="", seed=6, steps=11, sampler="pndm", size=SIZE, rescale=0.7),
        Request(prompt="a small blue circle", seed=7, steps=10, sampler="ddim", image=image, strength=0.5, options={"eta": 1.0}),
        Request(prompt="a large red triangle", seed=8, steps=3, sampler="dpmpp_2m", schedule="karras", size=(128, 64)),
    ]
    with Pipeline.open(shapes_bundle) as pipe:
        together = decoded(pipe, asked)
        alone = [decoded(pipe, [each])[0] for each in asked]
    for ours, theirs in zip(together, alone, strict=True):
        assert theirs.std() > 10 / 127.5
        assert psnr(ours, theirs) >= 100


def test_picture_k_of_seed_s_is_picture_0_of_seed_s_plus_k(shapes_bundle: Path) -> None:
    with Pipeline.open(shapes_bundle) as pipe:
        settings = {"steps": 4, "sampler": "euler_a"}
        many = pipe("a circle", seed=10, count=5, **settings)
        again = pipe("a circle", seed=12, **settings)
    assert many.seeds == [10, 11, 12, 13, 14]
    np.testing.assert_array_equal(many.pixels[2], again.pixels[0])
    assert len({image.tobytes() for image in many.pixels}) == 5


def test_a_stream_can_be_watched_edited_and_stopped(shapes_bundle: Path) -> None:
    with Pipeline.open(shapes_bundle) as pipe:
        whole = pipe.stream("a circle", seed=1, steps=6, sampler="ddim")
        assert [(state.step, state.steps) for state in whole] == [(k, 6) for k in range(1, 7)]

        edited = pipe.stream("a circle", seed=1, steps=6, sampler="ddim")
        for state in edited:
            if state.step == 3:
                state.jobs[0].run.x[:] = 0
        assert psnr(edited.result.pixels[0], whole.result.pixels[0]) < 40

        left = pipe.stream("a circle", seed=1, steps=6, sampler="ddim")
        for state in left:
            if state.step == 2:
                break
        assert left.jobs[0].run.step == 2
        assert left.result.pixels[0].shape == whole.result.pixels[0].shape

        two = pipe.stream(["a circle", "a square"], seed=1, steps=6, sampler="ddim")
        for state in two:
            if state.step == 3:
                state.jobs[1].stopped = True
        assert [job.run.step for job in two.jobs] == [6, 3]
        np.testing.assert_array_equal(two.jobs[0].run.x, whole.jobs[0].run.x)
