"""An upscaling model, as stabilityai/stable-diffusion-x4-upscaler, gives diffusers' images; see also test_tasks.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integration.reference import assert_same_picture, ours
from integration.test_tasks import SAMPLERS, task_checkpoint

from sdruntime.__main__ import main
from sdruntime.errors import SettingError
from sdruntime.pipeline.images.imagefile import read_image
from sdruntime.pipeline.images.png import write_png
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request
from sdruntime.verification.inputs import patches

MORE = (("euler_a", 1.0, 0), ("heun", 9.0, 350), ("dpmpp_2m", 4.0, 100))
SIZE = (12, 20)  # (width, height) of the image to enlarge


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory, exported_once: Callable[..., Path], ready: Callable[[Path], Path]
) -> Iterator[tuple[Any, Pipeline]]:
    import diffusers
    import torch

    torch.set_num_threads(1)
    checkpoint = task_checkpoint(tmp_path_factory, "sd2_v", "upscaling")
    with warnings.catch_warnings(), Pipeline.open(ready(exported_once(checkpoint))) as pipe:
        warnings.simplefilter("ignore")
        reference = diffusers.StableDiffusionUpscalePipeline.from_pretrained(str(checkpoint), torch_dtype=torch.float32)
        reference.set_progress_bar_config(disable=True)
        yield reference, pipe


@pytest.mark.parametrize(
    ("sampler", "guidance", "level"),
    [("ddim", 4.0, 20), *(pytest.param(*row, marks=pytest.mark.full) for row in MORE)],
)
def test_images_are_those_of_diffusers(both: tuple[Any, Pipeline], sampler: str, guidance: float, level: int) -> None:
    """At each level of noise, at sizes that are no multiple of the UNet's own."""
    import diffusers
    import torch
    from PIL import Image

    reference, pipe = both
    image = patches(SIZE, 3)
    named, changes = SAMPLERS[sampler]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        reference.scheduler = getattr(diffusers, named).from_config(reference.scheduler.config, **changes)
        latents = reference(
            "a red circle",
            image=Image.fromarray(image),
            negative_prompt="green",
            num_inference_steps=5,
            guidance_scale=guidance,
            noise_level=level,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images
        decoded = reference.vae.decode(latents / reference.vae.config.scaling_factor, return_dict=False)[0]
    expected = (reference.image_processor.postprocess(decoded, output_type="np")[0] * 255).round().astype(np.uint8)
    request = Request(
        prompt="a red circle",
        negative="green" if guidance > 1 else None,
        seed=5,
        steps=5,
        guidance=guidance,
        sampler=sampler,
        image=image,
        noise_level=level,
    )
    picture, found = ours(pipe, request)
    assert picture.shape == (4 * SIZE[1], 4 * SIZE[0], 3)
    assert_same_picture(picture, expected, found, decoded[0].numpy())


def test_the_size_follows_from_the_image_and_the_level_of_noise_counts(both: tuple[Any, Pipeline], tmp_path: Path) -> None:
    _, pipe = both
    image = patches(SIZE, 3)
    assert str(pipe.model.defaults) == "steps 75, guidance 9"  # those of diffusers' pipeline
    given: dict[str, Any] = {"seed": 1, "steps": 2}
    usual = pipe("a cat", image=image, **given).images[0]
    assert ", Noise level: 20, " in usual.text()["parameters"]
    assert np.array_equal(pipe("a cat", image=image, size=(48, 80), **given).pixels[0], usual.pixels)
    assert not np.array_equal(pipe("a cat", image=image, noise_level=21, **given).pixels[0], usual.pixels)
    assert pipe("a cat", image=image, size=(40, 40), fit="crop", **given).images[0].size == (40, 40)
    write_png(tmp_path / "small.png", image)
    place = [
        "generate",
        str(pipe.bundle.folder),
        "a cat",
        "--image",
        str(tmp_path / "small.png"),
        "-o",
        str(tmp_path / "large.png"),
    ]
    assert main([*place, "--seed", "1", "--steps", "2", "--noise-level", "100"]) == 0
    expected = pipe("a cat", image=image, noise_level=100, **given).pixels[0]
    assert np.array_equal(read_image(tmp_path / "large.png"), expected)
    with pytest.raises(SettingError, match="size 40x40: this model enlarges an image of 12x20 to 48x80: omit the size"):
        pipe("a cat", image=image, size=(40, 40), **given)
    with pytest.raises(SettingError, match="noise_level 351 is above 350, the most that this model takes"):
        pipe("a cat", image=image, noise_level=351, **given)
    with pytest.raises(SettingError, match="hires: this model is for upscaling, which has one pass: omit hires"):
        pipe("a cat", image=image, hires=2, **given)
    with pytest.warns(UserWarning, match="strength 0.5 has no effect: this model enlarges an image with noise_level"):
        pipe("a cat", image=image, strength=0.5, **given)
