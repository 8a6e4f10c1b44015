"""Upscaling: generate a larger image from a small one, which the UNet takes with noise of a level that the request chooses.

Source: diffusers' StableDiffusionUpscalePipeline, in the order in which it draws noise. A latent cell is one pixel of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.bundle.model import ModelSpec
from sdruntime.bundle.tasks import NOISE_LEVEL, Task
from sdruntime.errors import SettingError
from sdruntime.pipeline.images.imagefile import fitted
from sdruntime.pipeline.images.pixels import from_uint8
from sdruntime.pipeline.requests.request import DEFAULTS, Request
from sdruntime.pipeline.tasks.start import Setting, Start
from sdruntime.sampling.noise_schedule import alpha_bars

SCHEDULER = "low_res_scheduler/scheduler_config.json"
# of diffusers' DDPMScheduler, as far as its noise levels depend on them
READS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
}


def noise_levels(config: Mapping[str, Any]) -> Array:
    """Return alpha_bar of each noise level of a DDPMScheduler's config. Raises SettingError."""
    return alpha_bars({key: config.get(key, default) for key, default in READS.items()})


def check_noise(request: Request, model: ModelSpec) -> None:
    """Raise SettingError for a level of noise that the model does not know."""
    if model.max_noise_level is not None and request.noise_level > model.max_noise_level:
        raise SettingError(f"noise_level {request.noise_level} is above {model.max_noise_level}, the most that this model takes")


def unused_lines(request: Request, task: Task | None) -> Iterator[str]:
    """Yield a line for each setting that has no effect on a model with this task."""
    if task != "upscaling" and request.noise_level != DEFAULTS["noise_level"]:
        yield f"noise_level {request.noise_level} has no effect: only models that enlarge an image take it"
    if task == "upscaling" and request.strength != DEFAULTS["strength"]:
        yield f"strength {request.strength:g} has no effect: this model enlarges an image with noise_level"


def latent_shape(request: Request, model: ModelSpec) -> tuple[int, int, int]:
    """Return the shape of the latents of a request: as large as its image in pixels. Raises SettingError."""
    assert request.image_size is not None
    factor, cells = model.vae_factor, model.step // model.vae_factor
    width, height = request.image_size
    if request.fit is not None and request.size is not None:
        if any(side % model.step for side in request.size):
            sides = "{}x{}".format(*request.size)
            raise SettingError(f"size {sides}: both sides must be multiples of {model.step}")
        width, height = (side // factor for side in request.size)
    larger = (width * factor, height * factor)
    if request.size not in (None, larger):
        assert request.size is not None
        raise SettingError(
            "size {}x{}: this model enlarges an image of {}x{} to {}x{}: omit the size, or pass fit "
            '"resize" or "crop" (--fit)'.format(*request.size, width, height, *larger)
        )
    if width % cells or height % cells:
        raise SettingError(f"the image is {width}x{height}: both sides must be multiples of {cells}")
    return model.latent_channels, height, width


def enlarged(setting: Setting) -> Start:
    """Start from noise; the UNet takes the image with noise of the level, and the level."""
    image, request = setting.request.pixels, setting.request
    assert image is not None
    assert setting.noise_levels is not None
    _, height, width = setting.shape
    pixels = from_uint8(fitted(image, (width, height), request.fit) if request.fit else image)
    bar = setting.noise_levels[request.noise_level]
    noisy = np.sqrt(bar) * pixels + np.sqrt(1 - bar) * setting.noise.normal(pixels.shape)
    inputs = {"low_res_image": noisy.astype(np.float32), NOISE_LEVEL: np.array(request.noise_level, np.float32)}
    return Start(latents=setting.noised(None, setting.first_noise()), inputs=inputs)
