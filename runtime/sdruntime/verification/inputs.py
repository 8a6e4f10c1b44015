"""Images and masks for requests to models that need them, generated from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.bundle.tasks import Task
from sdruntime.sampling.noise.cpu import NoiseStream

_PATCHES = 8  # along each side


def task_settings(task: Task | None, size: tuple[int, int], seed: int, *, factor: int) -> dict[str, Any]:
    """Return the settings of a Request that a UNet with this task needs beside the prompt; `size` (width, height) in pixels.

    `factor`: pixels per latent cell.
    """
    if task is None:
        return {}
    if task == "upscaling":
        return {"image": patches((size[0] // factor, size[1] // factor), seed)}
    image = {"image": patches(size, seed)}
    if task == "inpainting":
        width, height = size
        mask = np.zeros((height, width), np.uint8)
        mask[:, width // 2 :] = 255
        return image | {"mask": mask, "strength": 1.0}
    if task == "depth":
        rows, columns = np.mgrid[: size[1], : size[0]]
        return image | {"depth": (np.hypot(rows, columns) % 40).astype(np.float32), "strength": 0.5}
    if task == "refining":
        return image | {"strength": 0.5}
    return image


def patches(size: tuple[int, int], seed: int) -> Array:
    """Return an image uint8 [H, W, 3] of patches in random colours."""
    colours = NoiseStream(seed).integers(256, (_PATCHES, _PATCHES, 3)).astype(np.uint8)
    rows, columns = (np.arange(side) * _PATCHES // side for side in size[::-1])
    image: Array = colours[rows][:, columns]
    return image
