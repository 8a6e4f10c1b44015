"""A ControlNet-Union gives diffusers' image for each type of control image."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from integration.reference import Array, assert_same_picture, decoded_by, ours

from sdruntime.errors import SettingError
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.control import Control
from sdruntime.pipeline.requests.request import Request
from sdruntime.verification.inputs import patches

pytestmark = pytest.mark.full
PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "a red circle", "green", 5, 4, 4.0
SCALE, START, END = 0.8, 0.0, 0.6


def theirs(checkpoint: Path, net: Path, kind: int, size: tuple[int, int]) -> tuple[Array, Array]:
    """(uint8 [H, W, 3], float32 [3, H, W]) of diffusers."""
    import diffusers
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = diffusers.ControlNetUnionModel.from_pretrained(net, low_cpu_mem_usage=False)
        pipeline = diffusers.StableDiffusionXLControlNetUnionPipeline.from_pretrained(
            str(checkpoint), controlnet=model, torch_dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        latents = pipeline(
            PROMPT,
            negative_prompt=NEGATIVE,
            control_image=[Image.fromarray(patches(size, 3))],
            control_mode=[kind],
            width=size[0],
            height=size[1],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            controlnet_conditioning_scale=SCALE,
            control_guidance_start=START,
            control_guidance_end=END,
            generator=torch.Generator().manual_seed(SEED),
            output_type="latent",
        ).images
        return decoded_by(pipeline, latents)


def test_the_image_is_diffusers(
    sdxl_checkpoint: Path, tmp_path: Path, export: Callable[..., Path], ready: Callable[[Path], Path]
) -> None:
    net = tiny.write_controlnet_union(tmp_path / "union", sdxl_checkpoint)
    bundle = export(sdxl_checkpoint, controlnets={"controlnet": str(net)})
    images = []
    with Pipeline.open(ready(bundle)) as pipe:
        size = pipe.model.default_size[::-1]
        for kind in (0, 3):  # not in guess mode, with which diffusers' pipeline fails
            control = Control(image=patches(size, 3), type=kind, scale=SCALE, start=START, end=END)
            basic = {"negative": NEGATIVE, "seed": SEED, "steps": STEPS, "guidance": GUIDANCE, "sampler": "ddim"}
            picture, decoded = ours(pipe, Request(prompt=PROMPT, control=control, **basic))  # type: ignore[arg-type]
            expected, expected_decoded = theirs(sdxl_checkpoint, net, kind, size)
            assert_same_picture(picture, expected, decoded, expected_decoded)
            images.append(picture.astype(int))
        assert np.abs(images[0] - images[1]).max() > 10
        with pytest.raises(SettingError, match=r"control: controlnet needs the type of the image: give it as type, 0 to 5"):
            pipe(PROMPT, control=Control(image=patches(size, 3)))
        with pytest.raises(SettingError, match="control: controlnet has no type 6"):
            pipe(PROMPT, control=Control(image=patches(size, 3), type=6))
