"""The part of an image that inpainting keeps, if the UNet itself knows of no mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdruntime.arrays import Array
from sdruntime.sampling.executor import Run


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kept:
    """Latents that are put back after each step: x = (1 - mask)·(image at the step's noise level) + mask·x.

    `mask` float32 [1, h, w]: 1 where the image is regenerated. `image`, `noise` float32 [C, h, w].

    As diffusers' StableDiffusionInpaintPipeline does with a UNet of 4 channels: RePaint (arXiv 2201.09865, equation 8) without
    its resampling.
    """

    mask: Array
    image: Array
    noise: Array

    def restore(self, run: Run) -> None:
        """Put the kept part back into `run.x` after a step; without noise after the last one."""
        x = run.x
        x[...] = (1 - self.mask) * self.image + self.mask * x if run.done else self.over(x, run.table.levels[run.step])

    def over(self, x: Array, level: Array) -> Array:
        """Return latents with the kept part at a noise level (alpha, sigma)."""
        alpha, sigma = level.astype(np.float32)
        put: Array = (1 - self.mask) * (alpha * self.image + sigma * self.noise) + self.mask * x
        return put
