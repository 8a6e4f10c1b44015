"""Inpainting: regenerate the part of an image under a mask.

Source: diffusers' StableDiffusionInpaintPipeline, in the order in which it draws noise.
"""

from __future__ import annotations

import numpy as np

from sdruntime.arrays import Array
from sdruntime.pipeline.images.compose import filled
from sdruntime.pipeline.images.pixels import Pixels, from_uint8
from sdruntime.pipeline.requests.request import Request
from sdruntime.pipeline.tasks.canvas import Canvas
from sdruntime.pipeline.tasks.start import Setting, Start
from sdruntime.sampling.kept import Kept


def from_noise(request: Request) -> bool:
    """Return whether the masked part starts from pure noise: at full strength, or without an image."""
    return request.pixels is None or request.strength == 1


def keeping(setting: Setting) -> Start:
    """Inpaint with a UNet that knows of no mask: the rest of the image is put back after each step."""
    pixels, mask = _canvas(setting)
    latent_mask = _latent_mask(mask, setting)
    image = setting.encode(_fill(setting, pixels, mask), setting.posterior_noise())
    noise = setting.first_noise()
    setting.posterior_noise()  # the pipeline also encodes the masked image, which such a UNet does not use
    kept = Kept(mask=latent_mask, image=image, noise=noise)
    first = None if from_noise(setting.request) else _fill_latents(setting, image, noise, latent_mask)
    return Start(latents=setting.noised(first, noise), kept=kept)


def conditioned(setting: Setting) -> Start:
    """Inpaint with a UNet that takes the mask and the rest of the image; without an image, generate the whole of it."""
    width, height = setting.size
    if setting.request.pixels is None:
        pixels, mask = np.zeros((height, width, 3), np.uint8), np.full((height, width), 255, np.uint8)
    else:
        pixels, mask = _canvas(setting)
    latent_mask = _latent_mask(mask, setting)
    image = None if from_noise(setting.request) else setting.encode(_fill(setting, pixels, mask), setting.posterior_noise())
    noise = setting.first_noise()
    masked = setting.encode(from_uint8(pixels) * (mask < _HALF), setting.posterior_noise())
    inputs = {"mask": latent_mask, "masked_image_latents": masked.astype(np.float32)}
    if image is not None:
        image = _fill_latents(setting, image, noise, latent_mask)
    return Start(latents=setting.noised(image, noise), inputs=inputs)


def _canvas(setting: Setting) -> tuple[Pixels, Pixels]:
    """Return the image uint8 [H, W, 3] and the mask uint8 [H, W], at the size to generate."""
    return Canvas.of(setting.request, setting.size).part(setting.size)


def _fill(setting: Setting, pixels: Pixels, mask: Pixels) -> Array:
    """Return the image to start from, float32 [3, H, W]: with any fill but the original, the masked part is painted over."""
    return from_uint8(pixels if setting.request.mask_fill == "original" else filled(pixels, mask))


def _fill_latents(setting: Setting, image: Array, noise: Array, mask: Array) -> Array:
    """Return the latents of the image, noise or zeros under the mask if the request says so. The noise is that of the start."""
    fill = setting.request.mask_fill
    if fill not in ("noise", "zeros"):
        return image
    return (1 - mask) * image + (mask * noise if fill == "noise" else 0)


_HALF = 128  # of 255: diffusers compares the mask as a fraction with 0.5


def _latent_mask(mask: Pixels, setting: Setting) -> Array:
    """Return the mask of the latents, float32 [1, h, w] of 0 and 1: that of each cell's first pixel (torch's "nearest")."""
    factor = mask.shape[0] // setting.shape[1]
    return (mask[None, ::factor, ::factor] >= _HALF).astype(np.float32)
