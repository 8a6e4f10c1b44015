"""InstructPix2Pix: edit an image as the prompt says (Brooks et al. 2022, arXiv 2211.09800).

Source: diffusers' StableDiffusionInstructPix2PixPipeline.
"""

from __future__ import annotations

import numpy as np

from sdruntime.pipeline.tasks.start import Setting, Start


def edit(setting: Setting) -> Start:
    """Start from noise; the UNet takes the latents of the image: the mode of the posterior, not scaled."""
    image = setting.encode_mode(setting.pixels())
    return Start(latents=setting.noised(None, setting.first_noise()), inputs={"image_latents": image.astype(np.float32)})
