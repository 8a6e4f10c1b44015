"""A second pipeline goes on where the first one stops."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import SCHEDULER

from sdruntime import Batcher, Bundle, BundleError, Pipeline, Request, SettingError
from sdruntime.__main__ import main
from sdruntime.pipeline.images.imagefile import read_image
from sdruntime.pipeline.tasks.passes import check_refiner, passes_of, refined
from sdruntime.sampling.compile import compile_table

SETTINGS: dict[str, Any] = {"seed": 3, "steps": 8, "size": (64, 64), "prompt_syntax": "a1111"}
PROMPT = "a (cat:1.2) [dog:bird:0.75]"


@pytest.fixture(scope="module")
def twin(small_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in another folder."""
    return Path(shutil.copytree(small_bundle, tmp_path_factory.mktemp("twin") / "bundle"))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "lcm"])
def test_a_model_that_refines_itself_changes_nothing(small_bundle: Path, twin: Path, sampler: str) -> None:
    """With samplers that remember no step before: timesteps, noise and prompt editing go on."""
    with Pipeline.open(small_bundle, refiner=twin) as pipe:
        settings = {**SETTINGS, "sampler": sampler, "guidance_interval": (0.25, 0.75)}
        plain, other = (pipe(PROMPT, **settings, refiner_at=at).images[0] for at in (1, 0.5))
        np.testing.assert_array_equal(other.pixels, plain.pixels)
        assert plain.pixels.std() >= 10
        told = other.text()["parameters"]
        assert f"Refiner: {pipe.model.name}, Refiner switch at: 0.5" in told
        assert "Refiner" not in plain.text()["parameters"]


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a"])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_a_mask_holds_for_the_refiner_too(small_bundle: Path, twin: Path, sampler: str, strength: float) -> None:
    """A model that refines itself repaints as without a refiner, also around an image and with a part at full resolution."""
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:48] = 255
    common: dict[str, Any] = {**SETTINGS, "sampler": sampler, "image": image, "strength": strength}
    rest: list[dict[str, Any]] = [
        {"mask": mask, "mask_blur": 2, "overlay": True},
        {"mask": mask, "mask_padding": 4, "mask_fill": "noise" if strength < 1 else "original"},
        {"extend": (64, 0, 0, 0), "size": None},
    ]
    with Pipeline.open(small_bundle, refiner=twin) as pipe:
        for more in rest:
            plain, other = (pipe(PROMPT, **{**common, **more}, refiner_at=at).pixels[0] for at in (1, 0.5))
            np.testing.assert_array_equal(other, plain)
        stream = pipe.stream(PROMPT, **common, mask=mask, refiner_at=0.5)
        for _ in stream:
            pass
        [job] = stream.jobs
        assert job.kept is not None
        outside = np.broadcast_to(job.kept.mask == 0, job.run.x.shape)
        np.testing.assert_array_equal(job.run.x[outside], job.kept.image[outside])


@pytest.mark.parametrize("resize", ["latent", "lanczos"])
def test_the_refiner_finishes_the_second_of_two_passes(small_bundle: Path, twin: Path, resize: Any) -> None:
    """The first pass is the model's own; prompt editing counts on over all.

    The refiner encodes fewer texts in one call than the model, which ONNX Runtime 1.23 rounds in another way: one level.
    """
    settings = {**SETTINGS, "sampler": "euler_a", "hires": 2.0, "hires_strength": 0.75, "hires_resize": resize}
    with Pipeline.open(small_bundle, refiner=twin) as pipe:
        assert pipe.refiner is not None
        plain = pipe(PROMPT, **settings, refiner_at=1).images[0]
        stream = pipe.stream(PROMPT, **settings, refiner_at=0.6)
        at = {}
        for state in stream:
            at[state.step] = (stream.jobs[0].bundle, stream.jobs[0].run.x.shape[1])
        [finished] = stream.result.images
        np.testing.assert_allclose(finished.pixels, plain.pixels, rtol=0, atol=1)
        early = pipe("a (cat:1.2) bird", **settings, refiner_at=1).pixels[0]
        assert np.mean(finished.pixels != plain.pixels) <= 0.01
        assert np.mean(early != plain.pixels) >= 0.1
        ours, theirs = pipe.bundle.folder, pipe.refiner.bundle.folder
        assert (at[1], at[9], at[14]) == ((ours, 8), (ours, 16), (theirs, 16))
        told = finished.text()["parameters"]
        assert "Refiner switch at: 0.6, Hires upscale: 2, " in told


def test_a_model_that_takes_the_mask_cannot_hand_it_over() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    request = Request(prompt="a cat", image=image, mask=image[..., 0])
    with pytest.raises(SettingError, match="a mask with a refiner: this model takes the mask as an input"):
        refined(passes_of(request, "inpainting", (64, 64), 8), "inpainting", (64, 64))


def test_each_model_has_its_own_schedule(small_bundle: Path, twin: Path) -> None:
    with Pipeline.open(small_bundle, refiner=twin) as pipe:
        assert pipe.refiner is not None
        factories = pipe._factory, pipe.refiner._factory
        factories[1].schedule |= {"timestep_spacing": "trailing"}
        common: dict[str, Any] = {"steps": 7, "sampler": "euler"}
        parts = [
            compile_table(factory.schedule, **common, part=part).t.tolist()
            for factory, part in zip(factories, ((0, 0.6), (0.6, 1)), strict=True)
        ]
        [job] = pipe.jobs([Request(prompt="a cat", **common, size=(64, 64), refiner_at=0.6)])
        assert job.run.table.t.tolist() == parts[0]
        assert job.steps == sum(map(len, parts))
        for _ in pipe.loop([job], pipe.steppers):
            pass
        assert job.run.table.t.tolist() == parts[1]


def test_streams_and_queues_run_both_pipelines(small_bundle: Path, twin: Path) -> None:
    requests = [
        Request(prompt=PROMPT, **SETTINGS, sampler="dpmpp_2m", refiner_at=0.5),
        Request(prompt=PROMPT, **SETTINGS, sampler="dpmpp_2m", refiner_at=1),
        Request(prompt="a dog", **SETTINGS | {"seed": 4}, sampler="heun"),
    ]
    with Pipeline.open(small_bundle, refiner=twin) as pipe:
        assert pipe.refiner is not None
        stream = pipe.stream(requests[0])
        count = stream.jobs[0].run.steps
        assert 0 < count < 8
        bundles = [stream.jobs[0].bundle for state in stream if state.steps == 8]
        assert bundles == [pipe.bundle.folder] * count + [pipe.refiner.bundle.folder] * (8 - count)
        alone = [pipe(request).pixels[0] for request in requests]
        assert not np.array_equal(alone[0], alone[1]), "a sampler of two steps begins anew"
        for together, expected in zip(pipe(requests).pixels, alone, strict=True):
            np.testing.assert_array_equal(together, expected)
        with Batcher(pipe) as batcher:
            futures = [batcher.submit(request) for request in requests]
            for future, expected in zip(futures, alone, strict=True):
                np.testing.assert_array_equal(future.result(120).pixels, expected)
    assert pipe.refiner.engines.closed


def test_what_a_refiner_cannot_go_on_with_is_refused(small_bundle: Path, twin: Path) -> None:
    with Pipeline.open(small_bundle, refiner=twin) as pipe:
        for settings, message in (
            ({"hires": 2, "hires_strength": 0.1, "steps": 20}, "refiner_at 0.8: this part of the timesteps has no step"),
            ({"refiner_at": 0.01}, "refiner_at 0.01: this part of the timesteps has no step: use more steps, or a larger part"),
            ({"refiner_at": 0.999}, r"refiner_at 0.999: this part of the timesteps has no step"),
        ):
            with pytest.raises(SettingError, match=message):
                pipe("a cat", **{"steps": 4, **settings})
    with (
        Pipeline.open(small_bundle) as pipe,
        pytest.warns(UserWarning, match=r"^refiner_at 0.5 has no effect without a refiner$"),
    ):
        pipe("a cat", steps=1, size=(64, 64), refiner_at=0.5)
    with pytest.raises(BundleError, match="missing: No such file"):
        Pipeline.open(small_bundle, refiner=Path("missing"))


def test_other_latents_are_refused(small_bundle: Path) -> None:
    model = Bundle.open(small_bundle).manifest.model
    message = "its latents have 16 channels of 8x8 pixels, those of .* 4 channels of 8x8 pixels: use a refiner of the same family"
    with pytest.raises(SettingError, match=message):
        check_refiner(model, dataclasses.replace(model, latent_channels=16, preview=None))


@pytest.mark.parametrize("steps", [6, 8, 13])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpm2", "dpmpp_sde", "plms", "dpmpp_2m"])
def test_the_parts_of_a_table_are_those_of_diffusers(sampler: str, share: float, steps: int) -> None:
    """The timesteps as StableDiffusionXLPipeline and its img2img pipeline cut those of their scheduler."""
    whole = compile_table(SCHEDULER, steps=steps, sampler=sampler)
    cut = round(1000 - share * 1000)
    before = [t for t in whole.t.tolist() if t >= cut]
    count = sum(t < cut for t in whole.t.tolist())
    if sampler in ("heun", "dpm2", "dpmpp_sde") and count % 2 == 0:
        count += 1
    base = compile_table(SCHEDULER, steps=steps, sampler=sampler, part=(0, share))
    refiner = compile_table(SCHEDULER, steps=steps, sampler=sampler, part=(share, 1))
    assert base.t.tolist() == before
    np.testing.assert_allclose(refiner.t, whole.t[len(whole.t) - count :])


def test_the_command_line_takes_a_refiner(
    small_bundle: Path, twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(small_bundle), PROMPT, "--steps", "8", "--size", "64x64", "--seed", "3", "--no-measure"]
    refining = ["--sampler", "dpmpp_2m", "--refiner-at", "0.5", "--json"]
    assert main([*command, *refining, "--refiner", str(twin), "-o", str(tmp_path / "one.png")]) == 0
    with Pipeline.open(small_bundle, refiner=twin) as pipe:
        expected = pipe(PROMPT, **SETTINGS, sampler="dpmpp_2m", refiner_at=0.5).pixels[0]
    np.testing.assert_array_equal(read_image(tmp_path / "one.png"), expected)
    capsys.readouterr()
    assert main([*command, *refining, "-o", str(tmp_path / "two.png")]) == 2
    assert "--refiner-at 0.5 has no effect without --refiner" in capsys.readouterr().out
    assert not (tmp_path / "two.png").exists()
