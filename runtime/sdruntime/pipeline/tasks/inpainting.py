"""Inpainting: regenerate the part of an image under a mask.

Source: diffusers' StableDiffusionInpaintPipeline, in the order in which it draws noise.
"""

from __future__ import annotations

import numpy as np

from sdruntime.arrays import Array
from sdruntime.pipeline.images.imagefile import fitted
from sdruntime.pipeline.request import Request
from sdruntime.pipeline.tasks.start import Setting, Start
from sdruntime.sampling.kept import Kept


def from_noise(request: Request) -> bool:
    """Return whether the masked part starts from pure noise: at full strength, or without an image."""
    return request.pixels is None or request.strength == 1


def keeping(setting: Setting) -> Start:
    """Inpaint with a UNet that knows of no mask: the rest of the image is put back after each step."""
    image = setting.encode(setting.pixels(), setting.draw())
    noise = setting.first_noise()
    setting.draw()  # the pipeline also encodes the masked image, which such a UNet does not use
    kept = Kept(mask=_latent_mask(_mask(setting), setting), image=image, noise=noise)
    return Start(latents=setting.noised(None if from_noise(setting.request) else image, noise), kept=kept)


def conditioned(setting: Setting) -> Start:
    """Inpaint with a UNet that takes the mask and the rest of the image; without an image, generate the whole of it."""
    width, height = setting.size
    if setting.request.pixels is None:
        pixels, mask = np.zeros((3, height, width), np.float32), np.ones((1, height, width), np.float32)
    else:
        pixels, mask = setting.pixels(), _mask(setting)
    image = None if from_noise(setting.request) else setting.encode(pixels, setting.draw())
    noise = setting.first_noise()
    masked = setting.encode(pixels * (mask < 0.5), setting.draw())
    inputs = {"mask": _latent_mask(mask, setting), "masked_image_latents": masked.astype(np.float32)}
    return Start(latents=setting.noised(image, noise), inputs=inputs)


def _mask(setting: Setting) -> Array:
    """Return the mask in pixels, float32 [1, H, W] of 0 and 1; without one, the whole image is regenerated."""
    mask, fit = setting.request.mask_pixels, setting.request.fit
    if mask is None:
        return np.ones((1, *setting.size[::-1]), np.float32)
    if fit:
        mask = fitted(mask, setting.size, fit)
    return (mask[None] >= _HALF).astype(np.float32)


_HALF = 128  # of 255: diffusers compares the mask as a fraction with 0.5


def _latent_mask(mask: Array, setting: Setting) -> Array:
    """Return the mask of the latents: that of the first pixel of each cell (torch's interpolation "nearest")."""
    factor = mask.shape[1] // setting.shape[1]
    return np.ascontiguousarray(mask[:, ::factor, ::factor])
