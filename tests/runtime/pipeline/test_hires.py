"""Two passes: the second is image to image of the first, in a stream, a queue and a service alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import with_fake_engines

from sdruntime.backends.base.engine import EngineOptions
from sdruntime.bundle.bundle import Bundle
from sdruntime.engines.building import BuildRequest, build_engines
from sdruntime.errors import EngineError, NotFinite, SettingError
from sdruntime.pipeline.images.resampling import resample
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.requests.unused import unused_lines
from sdruntime.pipeline.vae.resize import Kernel, resized
from sdruntime.sampling.noise.cpu import NoiseStream
from sdruntime.serving.batcher import Batcher, Progress

SETTINGS: dict[str, Any] = {"seed": 3, "steps": 4, "sampler": "euler_a", "size": (64, 64), "prompt_syntax": "a1111"}
HIRES: dict[str, Any] = {"hires": 2.0, "hires_strength": 0.5, "hires_steps": 6}
PROMPT = "a (cat:1.2) [dog|bird]"


def test_the_pixels_of_the_first_pass_start_the_second(small_bundle: Path) -> None:
    with Pipeline.open(small_bundle) as pipe:
        first = pipe(PROMPT, **SETTINGS).pixels[0]
        larger = resample(first, (128, 128), "lanczos")
        settings = SETTINGS | {"size": (128, 128), "steps": 6}
        expected = pipe(PROMPT, image=larger, strength=0.5, **settings).images[0]
        found = pipe(PROMPT, **SETTINGS, **HIRES, hires_resize="lanczos").images[0]
        np.testing.assert_array_equal(found.pixels, expected.pixels)
        assert found.size == (128, 128)
        assert found.pixels.std() >= 10
        assert pipe.image_size(found.request) == (128, 128)


@pytest.mark.parametrize("resize", ["latent", "latent-nearest"])
def test_the_latents_of_the_first_pass_start_the_second(small_bundle: Path, resize: Any) -> None:
    with Pipeline.open(small_bundle) as pipe:
        first = pipe.stream(PROMPT, **SETTINGS)
        for _ in first:
            pass
        kernel: Kernel = "bilinear" if resize == "latent" else "nearest"
        image = resized(first.jobs[0].run.x, (16, 16), kernel)
        stream = pipe.stream(PROMPT, **SETTINGS, **HIRES, hires_resize=resize)
        [job] = stream.jobs
        assert job.following is not None
        second = job.following.start(first.jobs[0].run.x)
        a, b = second.run.table.start
        noise = NoiseStream(SETTINGS["seed"]).normal((4, 16, 16))
        np.testing.assert_allclose(second.run.x, a * image + b * noise, rtol=1e-5, atol=1e-5)
        for _ in pipe.loop([second], pipe.steppers):
            pass
        seen = [(state.step, state.steps, job.step, job.run.x.shape[1]) for state in stream]
        assert seen == [(step, 7, step, 8 if step <= 4 else 16) for step in range(1, 8)]
        np.testing.assert_array_equal(job.run.x, second.run.x)
        assert stream.result.images[0].size == (128, 128)


def test_jobs_of_one_and_of_two_passes_share_a_batch_and_a_queue(small_bundle: Path) -> None:
    requests = [
        Request(prompt=PROMPT, **SETTINGS, **HIRES),
        Request(prompt="a cat", **SETTINGS | {"steps": 9, "sampler": "ddim"}),
        Request(prompt="a dog", **SETTINGS | {"seed": 5}, **HIRES | {"hires_resize": "lanczos", "hires_steps": None}),
        Request(prompt="a bird", **SETTINGS | {"size": (128, 128)}),
    ]
    reports: list[Progress] = []
    with Pipeline.open(small_bundle) as pipe:
        alone = [pipe(request).pixels[0] for request in requests]
        for ours, expected in zip(pipe(requests).pixels, alone, strict=True):
            np.testing.assert_array_equal(ours, expected)
        with Batcher(pipe) as batcher:
            futures = [batcher.submit(requests[0], progress=reports.append, preview=True)]
            futures += [batcher.submit(request) for request in requests[1:]]
            for future, expected in zip(futures, alone, strict=True):
                np.testing.assert_array_equal(future.result(120).pixels, expected)
    assert [(report.step, report.steps) for report in reports] == [(step, 7) for step in range(8)]
    sides = [report.latents.shape[1] for report in reports if report.latents is not None]
    assert sides == [8] * 5 + [16] * 3


def test_an_error_of_the_second_pass_ends_only_its_job(small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise NotFinite("planted")

    with Pipeline.open(small_bundle) as pipe, Batcher(pipe) as batcher:
        monkeypatch.setattr("sdruntime.pipeline.jobs.resize.resized", broken)
        futures = [batcher.submit(Request(prompt="a cat", **SETTINGS, **more)) for more in (HIRES, {"rescale": 0.5})]
        with pytest.raises(NotFinite, match="planted"):
            futures[0].result(60)
        assert futures[1].result(60).size == (64, 64)


def test_a_job_stopped_in_its_first_pass_has_its_size(small_bundle: Path) -> None:
    with Pipeline.open(small_bundle) as pipe:
        stream = pipe.stream(PROMPT, **SETTINGS, **HIRES)
        for state in stream:
            state.jobs[0].stopped = state.step == 2
        assert stream.result.images[0].size == (64, 64)


def test_an_upscale_beyond_the_engines_is_refused_before_the_first_pass(bundle: Bundle) -> None:
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake", size="64x64:256x256", without=("vae_encoder",))):
        pass
    for _ in build_engines(bundle.folder, BuildRequest(backend="fake", size="64x64:128x128", components=("vae_encoder",))):
        pass
    with Pipeline.open(bundle.folder, backend="fake", options=EngineOptions(tile="off")) as pipe:
        for settings, component, most, size in (
            ({"hires": 8}, "unet", 256, 512),
            ({"hires": 4, "hires_resize": "lanczos"}, "vae_encoder", 128, 256),
        ):
            built = f"built for 64x64 to {most}x{most}.*; requested is {size}x{size}\n"
            with pytest.raises(EngineError, match=f"(?s)hires: no fake engine of {component}.*: {built}"):
                pipe("a cat", steps=2, size=(64, 64), **settings)
        assert all(not engine.calls for engine in (pipe.engines.opened or {}).values())  # type: ignore[attr-defined]
        assert pipe("a cat", steps=2, size=(64, 64), hires=4).images[0].size == (256, 256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hires": 1.2, "size": (64, 64)}, "hires 1.2: 64x64 stays 64x64, as both sides are multiples of 64: use a larger scale"),
        ({"hires": 2, "hires_strength": 0.1, "steps": 4}, "hires: strength 0.1 of 4 steps leaves no steps to run"),
    ],
)
def test_a_second_pass_that_cannot_be_is_refused(settings: dict[str, Any], message: str, bundle: Bundle) -> None:
    with Pipeline.open(with_fake_engines(bundle), backend="fake") as pipe, pytest.raises(SettingError, match=message):
        pipe("a cat", **settings)


def test_a_scale_between_two_sizes_takes_the_smaller_and_says_so(small_bundle: Path) -> None:
    with Pipeline.open(small_bundle) as pipe:
        [job] = pipe.jobs([Request(prompt="a cat", steps=4, size=(64, 128), hires=1.7)])
        assert job.warnings == ("hires 1.7: the size is 96x208, the next valid one below 108x217",)
        [job] = pipe.jobs([Request(prompt="a cat", steps=4, size=(64, 128), hires=2)])
        assert job.warnings == ()


def test_a_mask_has_one_pass() -> None:
    image, mask = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    with pytest.raises(SettingError, match="hires 2 with a mask or an extension, which has one pass: omit one of them"):
        Request(prompt="x", image=image, mask=mask, hires=2)


def test_settings_without_effect_are_reported() -> None:
    request = Request(prompt="x", hires_steps=3, hires_resize="lanczos", hires_strength=0.5)
    assert unused_lines([request]) == [
        "hires_strength 0.5 has no effect without hires",
        "hires_steps 3 has no effect without hires",
        "hires_resize lanczos has no effect without hires",
    ]
    assert unused_lines([dataclasses.replace(request, hires=2)]) == []


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic", "nearest", "nearest-exact"])
@pytest.mark.parametrize("size", [(16, 24), (13, 7), (8, 11), (1, 1), (33, 90)])
def test_latents_are_resized_as_by_torch(kernel: Kernel, size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    latents = np.random.default_rng(0).standard_normal((4, 8, 11)).astype(np.float32)
    exact = torch.from_numpy(latents.astype(np.float64))[None]  # in float32, torch rounds places and weights: 3e-6
    expected = torch.nn.functional.interpolate(exact, size=size, mode=kernel)[0].numpy()
    np.testing.assert_allclose(resized(latents, size, kernel), expected, rtol=0, atol=1e-6)
