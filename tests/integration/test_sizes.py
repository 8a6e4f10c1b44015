"""Images whose latents do not halve evenly: the UNet crops after an upsampling, as diffusers' does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from integration.reference import Reference, assert_same_picture, ours
from once import once

from sdruntime.errors import SettingError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.verification.inputs import patches

HEIGHT, WIDTH = 72, 104  # 9x13 latent cells, which become 5x7, then 3x4
SAMPLERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}
COMMON: dict[str, Any] = {"seed": 4}
PROMPT = "a cat in the red"
# levels as in the real models, with the VAE's factor of 8
DEEP: dict[str, tuple[tiny.Kind, dict[str, Any]]] = {
    "sd1-deep": (
        "sd1",
        {
            "block_out_channels": (16, 16, 32, 32),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        },
    ),
    "sdxl-deep": (
        "sdxl",
        {
            "block_out_channels": (16, 16, 32),
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            "transformer_layers_per_block": (1, 1, 2),
        },
    ),
}


def deep_checkpoint(folder: Path, name: str) -> Path:
    import torch
    from diffusers import UNet2DConditionModel

    kind, changes = DEEP[name]
    tiny.write_checkpoint(folder, kind)
    torch.manual_seed(6)
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    for part, module in (("unet", UNet2DConditionModel.from_config(config | changes)), ("vae", tiny._vae(4, 0.18215))):
        tiny._liven(module)
        module.eval().save_pretrained(folder / part)
    return folder


@pytest.fixture(scope="module", params=["sd1", *(pytest.param(name, marks=pytest.mark.full) for name in DEEP)])
def both(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    exported_once: Callable[..., Path],
    ready: Callable[[Path], Path],
) -> Iterator[tuple[Reference, Pipeline]]:
    if request.param in DEEP:
        write = lambda folder: deep_checkpoint(folder, request.param)  # noqa: E731
        checkpoint = once(tmp_path_factory, f"checkpoints/{request.param}", write)
        bundle = exported_once(checkpoint)
    else:
        checkpoint, bundle = (request.getfixturevalue(f"{request.param}_{what}") for what in ("checkpoint", "bundle"))
    with Pipeline.open(ready(bundle)) as pipe:
        yield Reference(checkpoint), pipe


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_to_image(both: tuple[Reference, Pipeline], sampler: str) -> None:
    reference, pipe = both
    assert HEIGHT % pipe.model.size_multiple
    assert WIDTH % pipe.model.size_multiple
    named, changes = SAMPLERS[sampler]
    size = {"height": HEIGHT, "width": WIDTH}
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 5.0, "negative_prompt": "", **size, **COMMON}
    theirs, theirs_float = reference.draw(PROMPT, scheduler=named, changes=changes, **settings)
    picture, decoded = ours(pipe, PROMPT, sampler=sampler, steps=6, guidance=5.0, negative="", size=(WIDTH, HEIGHT), **COMMON)
    assert_same_picture(picture, theirs, decoded, theirs_float)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_to_image(both: tuple[Reference, Pipeline], sampler: str) -> None:
    reference, pipe = both
    named, changes = SAMPLERS[sampler]
    start: dict[str, Any] = {"image": patches((WIDTH, HEIGHT), 3), "strength": 0.6, **COMMON}
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 5.0, "negative_prompt": "", **start}
    theirs, theirs_float = reference.draw(PROMPT, scheduler=named, changes=changes, **settings)
    picture, decoded = ours(pipe, PROMPT, sampler=sampler, steps=6, guidance=5.0, negative="", **start)
    assert_same_picture(picture, theirs, decoded, theirs_float)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting(both: tuple[Reference, Pipeline], sampler: str) -> None:
    import diffusers
    import torch
    from PIL import Image

    reference, pipe = both
    named, changes = SAMPLERS[sampler]
    image = patches((WIDTH, HEIGHT), 3)
    mask = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    kind = "StableDiffusionXLInpaintPipeline" if reference.xl else "StableDiffusionInpaintPipeline"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        inpaint = getattr(diffusers, kind)(**reference.pipe.components)
        inpaint.set_progress_bar_config(disable=True)
        inpaint.scheduler = getattr(diffusers, named).from_config(inpaint.scheduler.config, **changes)
        latents = inpaint(
            PROMPT,
            negative_prompt="",
            image=Image.fromarray(image),
            mask_image=Image.fromarray(mask),
            height=HEIGHT,
            width=WIDTH,
            strength=0.7,
            num_inference_steps=6,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(COMMON["seed"]),
            output_type="latent",
        ).images
        theirs_float = inpaint.vae.decode(latents / inpaint.vae.config.scaling_factor, return_dict=False)[0]
    theirs = (inpaint.image_processor.postprocess(theirs_float, output_type="np")[0] * 255).round().astype(np.uint8)
    given: dict[str, Any] = {"image": image, "mask": mask, "strength": 0.7, **COMMON}
    picture, decoded = ours(pipe, PROMPT, sampler=sampler, steps=6, guidance=5.0, negative="", **given)
    assert_same_picture(picture, theirs, decoded, theirs_float[0].numpy())


def test_a_part_of_a_latent_cell_is_no_size(both: tuple[Reference, Pipeline]) -> None:
    _, pipe = both
    with pytest.raises(SettingError, match=r"size 100x76: both sides must be multiples of 8, such as 96x80$"):
        pipe(PROMPT, size=(100, 76))
