"""Inpainting and editing give diffusers' images, with UNets made for them and with plain ones."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from integration.reference import Array, assert_same_picture
from once import once

from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.request import Request
from sdruntime.verification.inputs import patches

ROWS = (  # UNet's task, kind of checkpoint, diffusers' pipeline
    ("inpainting", "sd1", "StableDiffusionInpaintPipeline"),
    ("inpainting", "sdxl", "StableDiffusionXLInpaintPipeline"),
    ("", "sd1", "StableDiffusionInpaintPipeline"),
    ("", "sd2_v", "StableDiffusionInpaintPipeline"),
    ("", "sdxl", "StableDiffusionXLInpaintPipeline"),
    ("instruct_pix2pix", "sd1", "StableDiffusionInstructPix2PixPipeline"),
)
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "a red circle", "green", 5, 6, 4.0


@pytest.fixture(scope="module", params=ROWS, ids=lambda row: f"{row[0] or 'plain'}-{row[1]}")
def both(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    exported_once: Callable[..., Path],
    ready: Callable[[Path], Path],
) -> Iterator[tuple[Any, Pipeline]]:
    import diffusers
    import torch

    task, kind, named = request.param
    torch.set_num_threads(1)
    if task:
        write = lambda folder: tiny.write_task_checkpoint(folder, kind, task)  # noqa: E731
        checkpoint = once(tmp_path_factory, f"checkpoints/tiny-{task}-{kind}", write)
        # with reference images: the build compares with diffusers too, at full strength
        bundle = exported_once(checkpoint, verify=True)
    else:
        checkpoint = request.getfixturevalue(f"{kind}_checkpoint")
        bundle = request.getfixturevalue(f"{kind}_bundle")
    with warnings.catch_warnings(), Pipeline.open(ready(bundle)) as pipe:
        warnings.simplefilter("ignore")
        reference = getattr(diffusers, named).from_pretrained(str(checkpoint), torch_dtype=torch.float32)
        reference.set_progress_bar_config(disable=True)
        yield reference, pipe


def inputs(pipe: Pipeline) -> tuple[Array, Array]:
    """An image and a soft mask at the model's size."""
    height, width = pipe.model.default_size
    image = patches((width, height), 3)
    rows, columns = np.mgrid[:height, :width]
    mask = np.clip(255 * (columns + 0.5 * rows) / width, 0, 255).astype(np.uint8)
    return image, mask


def theirs(reference: Any, pipe: Pipeline, sampler: str, **settings: Any) -> tuple[Array, Array]:
    """(uint8 [H, W, 3], float32 [3, H, W]) of diffusers."""
    import diffusers
    import torch
    from PIL import Image

    image, mask = inputs(pipe)
    named, changes = SAMPLERS[sampler]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.scheduler = getattr(diffusers, named).from_config(reference.scheduler.config, **changes)
    arguments: dict[str, Any] = {"image": Image.fromarray(image), "mask_image": Image.fromarray(mask)}
    arguments |= {"height": image.shape[0], "width": image.shape[1], "strength": 1.0}
    known = inspect.signature(reference.__call__).parameters
    arguments = {name: value for name, value in (arguments | settings).items() if name in known}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        latents = reference(
            PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
            **arguments,
        ).images
        decoded = reference.vae.decode(latents / reference.vae.config.scaling_factor, return_dict=False)[0]
    picture = reference.image_processor.postprocess(decoded, output_type="np")[0]
    return (picture * 255).round().astype(np.uint8), decoded[0].numpy()


def ours(pipe: Pipeline, sampler: str, **settings: Any) -> tuple[Array, Array]:
    request = ours_request(pipe, sampler, **settings)
    stream = pipe.stream(request)
    for _ in stream:
        pass
    return stream.result.images[0].pixels, pipe.decode([job.run.x for job in stream.jobs])[0]


def ours_request(pipe: Pipeline, sampler: str, **settings: Any) -> Request:
    image, mask = inputs(pipe)
    given: dict[str, Any] = {"image": image} if pipe.task == "instruct_pix2pix" else {"image": image, "mask": mask}
    return Request(prompt=PROMPT, negative=NEGATIVE, seed=SEED, steps=STEPS, sampler=sampler, **given, **settings)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_images_are_those_of_diffusers(both: tuple[Any, Pipeline], sampler: str, strength: float) -> None:
    reference, pipe = both
    if pipe.task == "instruct_pix2pix" and strength < 1:
        pytest.skip("starts from noise, whatever the strength")
    picture, decoded = theirs(reference, pipe, sampler, strength=strength, guidance_scale=GUIDANCE)
    assert_same_picture(*_pairs(ours(pipe, sampler, strength=strength, guidance=GUIDANCE), (picture, decoded)))


def _pairs(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
    return a[0], b[0], a[1], b[1]
