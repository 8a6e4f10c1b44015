"""Depth: image to image in which a UNet also takes how far away everything is.

Source: diffusers' StableDiffusionDepth2ImgPipeline, given a depth map.
"""

from __future__ import annotations

import dataclasses

from sdruntime.pipeline.images.depth import normalized
from sdruntime.pipeline.tasks.start import Setting, Start, from_image


def guided_by_depth(setting: Setting) -> Start:
    """Start from the request's image, with its depth map as an input of the UNet."""
    depth = setting.request.depth_map
    assert depth is not None
    return dataclasses.replace(from_image(setting), inputs={"depth": normalized(depth, *setting.shape[1:])[None]})
