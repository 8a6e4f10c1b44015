"""SDXL's micro-conditioning: the sizes that an image would have had (arXiv 2307.01952, section 2.2)."""

from __future__ import annotations

import numpy as np

from sdruntime.arrays import Array
from sdruntime.errors import SettingError
from sdruntime.pipeline.request import DEFAULTS, Request

SETTINGS = ("original_size", "crop", "target_size")


def time_ids(request: Request, size: tuple[int, int]) -> Array:
    """Return the UNet's time_ids for a request whose image has `size`, (width, height) in pixels.

    float32 [6]: original size, crop corner, target size, each as (height, width) or (top, left). Without settings of the request:
    an uncropped image of the generated size.
    """
    pairs = (request.original_size or size, request.crop, request.target_size or size)
    return np.array([side for pair in pairs for side in reversed(pair)], np.float32)


def check_no_sizes(request: Request) -> None:
    """Raise SettingError for each setting that a model without micro-conditioning cannot follow."""
    for name in SETTINGS:
        if getattr(request, name) != DEFAULTS[name]:
            raise SettingError(f"{name}: only models of SDXL's kind take it: omit it")
