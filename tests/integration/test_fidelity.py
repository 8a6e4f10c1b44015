"""The bundle's image is diffusers' image: same checkpoint, same seed, every sampler that diffusers has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.reference import Reference, assert_same_picture, ours

from sdruntime.errors import SettingError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.tasks.tables import Tables

CHECKPOINTS = ("shapes", "sd1", "sd2_v", "sdxl")
# three of diffusers' classes clip the latents to [-1, 1] unless the file says otherwise; here only a file can turn that on
NO_CLIP = {"clip_sample": False}
# sampler -> diffusers class, what is changed in its config, our options
SAMPLERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", NO_CLIP, {}),
    "ddim with noise": ("DDIMScheduler", NO_CLIP, {"eta": 1.0}),
    "ddpm": ("DDPMScheduler", NO_CLIP, {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, {"skip_prk_steps": True}),
    "pndm with its Runge-Kutta start": ("PNDMScheduler", {"skip_prk_steps": False}, {"skip_prk_steps": False}),
    "lms": ("LMSDiscreteScheduler", {}, {}),
    "euler": ("EulerDiscreteScheduler", {}, {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, {}),
    "heun": ("HeunDiscreteScheduler", {}, {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}, {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}, {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, {}),
    "dpmpp_2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {}, {}),
    "dpmpp_3s": ("DPMSolverSinglestepScheduler", {"solver_order": 3}, {}),
    "unipc": ("UniPCMultistepScheduler", {}, {}),
    "deis": ("DEISMultistepScheduler", {}, {}),
    "lcm": ("LCMScheduler", {}, {}),
    "tcd": ("TCDScheduler", NO_CLIP, {"eta": 0.3}),
    "sa_solver": ("SASolverScheduler", {}, {}),
}
FROM_IMAGE = ("ddim", "pndm", "euler_a", "heun", "dpmpp_2m", "unipc")  # the others in `make test-full`
# diffusers starts these two from an image with a past that they have not seen: tests/runtime/sampling/test_golden.py says more
UNLIKE = ("lms", "pndm with its Runge-Kutta start")
PROMPT, NEGATIVE = "a small red circle on the left on a blue background", "green"


@pytest.fixture(scope="module", params=CHECKPOINTS)
def both(request: pytest.FixtureRequest, ready: Callable[[Path], Path]) -> Iterator[tuple[Reference, Pipeline]]:
    if request.param == "shapes":
        pytest.importorskip("transformers", minversion="5", reason="the example has names that transformers 4 misreads")
    checkpoint: Path = request.getfixturevalue(f"{request.param}_checkpoint")
    bundle: Path = request.getfixturevalue(f"{request.param}_bundle")
    with Pipeline.open(ready(bundle)) as pipe:
        yield Reference(checkpoint), pipe


@pytest.mark.parametrize("name", SAMPLERS)
def test_text_to_image(both: tuple[Reference, Pipeline], name: str) -> None:
    reference, pipe = both
    scheduler, changes, options = SAMPLERS[name]
    sampler, _, schedule = name.split(" with")[0].partition(" ")
    theirs, theirs_float = reference.draw(
        PROMPT,
        scheduler=scheduler,
        changes=changes,
        seed=7,
        negative_prompt=NEGATIVE,
        num_inference_steps=20,
        guidance_scale=7.5,
        eta=options.get("eta", 0.0),  # the pipeline's argument goes before the scheduler's default
    )
    picture, decoded = ours(
        pipe,
        PROMPT,
        sampler=sampler,
        schedule=schedule or None,
        options=options,
        seed=7,
        negative=NEGATIVE,
        steps=20,
        guidance=7.5,
    )
    assert_same_picture(picture, theirs, decoded, theirs_float)


@pytest.mark.parametrize("strength", [0.35, 0.8])
@pytest.mark.parametrize(
    "name",
    [name if name in FROM_IMAGE else pytest.param(name, marks=pytest.mark.full) for name in SAMPLERS if name not in UNLIKE],
)
def test_image_to_image(both: tuple[Reference, Pipeline], name: str, strength: float) -> None:
    reference, pipe = both
    scheduler, changes, options = SAMPLERS[name]
    sampler, _, schedule = name.split(" with")[0].partition(" ")
    height, width = pipe.model.default_size
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    image = (128 + 90 * np.sin(ramp / 9) + np.random.default_rng(1).integers(-30, 30, ramp.shape)).astype(np.uint8)
    theirs, theirs_float = reference.draw(
        PROMPT,
        scheduler=scheduler,
        changes=changes,
        seed=3,
        image=image,
        strength=strength,
        num_inference_steps=20,
        guidance_scale=7.5,
        eta=options.get("eta", 0.0),
    )
    picture, decoded = ours(
        pipe,
        PROMPT,
        sampler=sampler,
        schedule=schedule or None,
        options=options,
        seed=3,
        image=image,
        strength=strength,
        steps=20,
        guidance=7.5,
    )
    assert_same_picture(picture, theirs, decoded, theirs_float)


@pytest.mark.parametrize("strength", [None, 0.6])
def test_own_sigmas(both: tuple[Reference, Pipeline], strength: float | None) -> None:
    reference, pipe = both
    height, width = pipe.model.default_size
    noise = np.random.default_rng(2).integers(0, 256, (height, width, 3), np.uint8)
    start = {} if strength is None else {"image": noise, "strength": strength}
    common = {"seed": 9, "sigmas": [14.6146, 8.0, 4.5, 2.25, 1.1, 0.5, 0.15, 0.0], **start}
    theirs, theirs_float = reference.draw(PROMPT, scheduler="EulerDiscreteScheduler", guidance_scale=5.0, **common)
    picture, decoded = ours(pipe, PROMPT, sampler="euler", guidance=5.0, **common)
    assert_same_picture(picture, theirs, decoded, theirs_float)


@pytest.mark.parametrize("strength", [None, pytest.param(0.6, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("scheduler", "changes"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {"sigma_max": 120.0, "sigma_data": 1.0, "sigma_schedule": "exponential"}),
        ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_edm_models(
    both: tuple[Reference, Pipeline],
    scheduler: str,
    changes: dict[str, Any],
    strength: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model in EDM's preconditioning differs from the others in its scheduler's file alone."""
    reference, pipe = both
    prediction = pipe.model.prediction_type
    written = {"_class_name": scheduler, "prediction_type": prediction, **changes}
    monkeypatch.setattr(pipe._factory, "schedule", written)
    monkeypatch.setattr(pipe._factory, "_tables", Tables(written))
    height, width = pipe.model.default_size
    noise = np.random.default_rng(2).integers(0, 256, (height, width, 3), np.uint8)
    start = {} if strength is None else {"image": noise, "strength": strength}
    theirs, theirs_float = reference.draw(
        PROMPT, scheduler=scheduler, changes=changes, guidance_scale=3.0, num_inference_steps=10, seed=4, **start
    )
    picture, decoded = ours(pipe, PROMPT, guidance=3.0, steps=10, seed=4, **start)
    assert_same_picture(picture, theirs, decoded, theirs_float)


def test_sizes_that_sdxl_is_told(both: tuple[Reference, Pipeline]) -> None:
    reference, pipe = both
    told: dict[str, Any] = {"original_size": (1000, 700), "crop": (30, 20), "target_size": (512, 640)}
    if not reference.xl:
        for name, value in told.items():
            with pytest.raises(SettingError, match=f"{name}: only models of SDXL's kind take it"):
                pipe(PROMPT, **{name: value})
        return
    sizes = {"original_size": (700, 1000), "crops_coords_top_left": (20, 30), "target_size": (640, 512)}
    common: dict[str, Any] = {"seed": 2}
    theirs, theirs_float = reference.draw(PROMPT, scheduler="EulerDiscreteScheduler", num_inference_steps=6, **sizes, **common)
    plain, _ = ours(pipe, PROMPT, sampler="euler", steps=6, guidance=5.0, **common)
    picture, decoded = ours(pipe, PROMPT, sampler="euler", steps=6, guidance=5.0, **common, **told)
    assert_same_picture(picture, theirs, decoded, theirs_float)
    assert not np.array_equal(plain, picture)


def test_without_a_negative_prompt_and_without_guidance(both: tuple[Reference, Pipeline]) -> None:
    reference, pipe = both
    for guidance in (7.5, 1.0):
        theirs, theirs_float = reference.draw(
            PROMPT, scheduler="DDIMScheduler", changes=NO_CLIP, seed=5, num_inference_steps=8, guidance_scale=guidance
        )
        picture, decoded = ours(pipe, PROMPT, sampler="ddim", seed=5, steps=8, guidance=guidance)
        assert_same_picture(picture, theirs, decoded, theirs_float)


def test_another_size(both: tuple[Reference, Pipeline]) -> None:
    reference, pipe = both
    unit = math.lcm(pipe.model.size_multiple, 8)  # diffusers wants eights, whatever the VAE's factor
    height, width = 3 * unit, 2 * unit
    theirs, theirs_float = reference.draw(
        PROMPT,
        scheduler="DDIMScheduler",
        changes=NO_CLIP,
        seed=5,
        num_inference_steps=4,
        guidance_scale=7.5,
        height=height,
        width=width,
    )
    picture, decoded = ours(pipe, PROMPT, sampler="ddim", seed=5, steps=4, size=(width, height))
    assert picture.shape == (height, width, 3)
    assert_same_picture(picture, theirs, decoded, theirs_float)
