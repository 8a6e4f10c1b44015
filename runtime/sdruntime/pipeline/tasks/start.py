"""The start of a job: from noise, or from an image at the noise level where its steps begin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from sdruntime.arrays import Array
from sdruntime.pipeline.images.imagefile import fitted
from sdruntime.pipeline.images.pixels import from_uint8
from sdruntime.pipeline.requests.request import Request
from sdruntime.sampling.job import Row
from sdruntime.sampling.kept import Kept
from sdruntime.sampling.noise.image import ImageNoise
from sdruntime.sampling.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The first latents of a job, float32 [C, h, w], and the UNet's inputs that follow from its image, without the batch axis."""

    latents: Array
    inputs: Row = field(default_factory=dict)
    kept: Kept | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a task starts from.

    `shape` (C, h, w): of the latents; `size` (width, height): of the image in pixels. `encode` and `encode_mode` return the
    latents of an image float32 [3, H, W] in [-1, 1]: a draw from the VAE's posterior, with this unit noise, scaled for the UNet;
    and the posterior's mode, as the VAE returns it. `posterior`: whether the VAE has one; a tiny VAE has not. `noise_levels`:
    alpha_bar of each level of noise in the image to enlarge.
    """

    request: Request
    table: Table
    shape: tuple[int, int, int]
    size: tuple[int, int]
    noise: ImageNoise
    encode: Callable[[Array, Array], Array]
    encode_mode: Callable[[Array], Array]
    posterior: bool = True
    noise_levels: Array | None = None

    def draw(self) -> Array:
        """Draw unit noise of the latents' shape."""
        return self.noise.normal(self.shape)

    def posterior_noise(self) -> Array:
        """Return the noise of a draw from the VAE's posterior: drawn only if it has one."""
        return self.draw() if self.posterior else np.zeros(self.shape, np.float32)

    def first_noise(self) -> Array:
        """Draw the noise of the first latents, which the request's variation and seed resize change."""
        return self.noise.first(self.shape)

    def pixels(self) -> Array:
        """Return the request's image at the size to generate, float32 [3, H, W] in [-1, 1]."""
        image = self.request.pixels
        assert image is not None
        return from_uint8(fitted(image, self.size, self.request.fit) if self.request.fit else image)

    def noised(self, image: Array | None, noise: Array) -> Array:
        """Return the latents at the noise level of the first step: of `image`, or pure noise."""
        image_weight, noise_weight = self.table.start
        first = noise_weight * noise if image is None else image_weight * image + noise_weight * noise
        return first.astype(np.float32)


def from_text(setting: Setting) -> Start:
    """Start from noise."""
    return Start(latents=setting.noised(None, setting.first_noise()))


def from_image(setting: Setting) -> Start:
    """Start from the request's image, as diffusers' StableDiffusionImg2ImgPipeline does."""
    image = setting.encode(setting.pixels(), setting.posterior_noise())
    return Start(latents=setting.noised(image, setting.first_noise()))
