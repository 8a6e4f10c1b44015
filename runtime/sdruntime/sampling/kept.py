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
        kept = self.image
        if not run.done:
            alpha, sigma = run.table.levels[run.step].astype(np.float32)
            kept = alpha * self.image + sigma * self.noise
        x = run.x
        x[...] = (1 - self.mask) * kept + self.mask * x
