"""SDXL's micro-conditioning: the sizes that an image would have had (arXiv 2307.01952, section 2.2), and the refiner's score."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sdruntime.arrays import Array
from sdruntime.bundle.tasks import SCORED, SIZES
from sdruntime.errors import SettingError
from sdruntime.pipeline.requests.request import DEFAULTS, Request

_SIZES = ("original_size", "crop", "target_size")
_SCORED = ("original_size", "crop", "aesthetic_score", "negative_aesthetic_score")
_FOLLOWED: Mapping[int | None, tuple[str, ...]] = {SIZES: _SIZES, SCORED: _SCORED}  # by the number of time ids
_TAKERS = dict.fromkeys(_SIZES, "only models of SDXL's kind take it") | dict.fromkeys(_SCORED[2:], "only SDXL's refiner takes it")


def time_ids(request: Request, size: tuple[int, int], count: int) -> tuple[Array, Array]:
    """Return the UNet's time_ids, float32 [count], for the negative prompt and for the prompt.

    `size`: (width, height) of the image in pixels. They are the original size, the corner of the crop, and the target size or
    the score, each pair as (height, width) or (top, left). Without settings of the request: an uncropped image of this size.
    """
    original, crop = (pair[::-1] for pair in (request.original_size or size, request.crop))
    rows: list[tuple[float, ...]]
    if count == SCORED:  # diffusers' negative row is not cropped
        scores = request.negative_aesthetic_score, request.aesthetic_score
        rows = [(*original, *corner, score) for corner, score in zip(((0, 0), crop), scores, strict=True)]
    else:
        rows = [(*original, *crop, *(request.target_size or size)[::-1])] * 2
    negative, positive = (np.array(row, np.float32) for row in rows)
    return negative, positive


def check_conditions(request: Request, count: int | None) -> None:
    """Raise SettingError for each setting that a model with `count` time ids cannot follow."""
    for name, takers in _TAKERS.items():
        if name not in _FOLLOWED.get(count, ()) and getattr(request, name) != DEFAULTS[name]:
            instead = " (SDXL's refiner takes aesthetic_score instead)" if count == SCORED else ""
            raise SettingError(f"{name}: {takers}{instead}: omit it")
