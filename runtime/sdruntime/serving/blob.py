"""The images that a job brings along, one after the other in the blob of its message."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sdruntime.bundle.limits import LARGEST_SIDE
from sdruntime.errors import SettingError
from sdruntime.serving.message import Images, Submit

MOST_BYTES = 5 * LARGEST_SIDE**2  # of a blob: the largest image with its mask and depth map


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    shape: tuple[int, ...]  # uint8 [H, W] or [H, W, 3]
    what: str

    @property
    def size(self) -> str:
        return f"{self.shape[1]}x{self.shape[0]}"


def _parts(message: Submit) -> Iterator[_Part]:
    if message.image is not None:
        width, height = message.image
        yield _Part("image", (height, width, 3), "RGB8 rows")
        if message.mask:
            yield _Part("mask", (height, width), "a mask of 8 bits")
    if message.depth is not None:
        width, height = message.depth
        yield _Part("depth", (height, width), f"a depth map of {width}x{height}")
    for control in message.controls:
        width, height = control.size
        yield _Part("control", (height, width, 3), f"a control image of {width}x{height}")
    for width, height in message.image_prompt:
        yield _Part("image_prompt", (height, width, 3), f"an image of an image prompt of {width}x{height}")
    for width, height in message.image_prompt_mask:
        yield _Part("image_prompt_mask", (height, width), f"a mask of an image prompt of {width}x{height}")


def bytes_of(message: Submit) -> int:
    """Return how many bytes the blob of a message may have, 0 if its images are too large, so that no other blob is read."""
    parts = list(_parts(message))
    total = sum(math.prod(part.shape) for part in parts)
    sides = [side for part in parts for side in part.shape[:2]]
    return total if all(0 < side <= LARGEST_SIDE for side in sides) and total <= MOST_BYTES else 0


def images_of(message: Submit, blob: bytes | memoryview | None, size: int) -> Images:
    """Return the images in a blob of `size` bytes. Raises SettingError if it has another size than the message says."""
    parts = list(_parts(message))
    for part in parts:
        if min(part.shape) < 1:
            raise SettingError(f"{part.name} {part.size}: expected its width and height in pixels")
    expected = sum(math.prod(part.shape) for part in parts)
    if size != expected:
        what = " and ".join(part.what for part in parts)
        head = f"{parts[0].name} {parts[0].size}" if parts else "image 0x0"
        raise SettingError(f"{head}: expected {expected:,} bytes of {what or 'RGB8 rows'} in the blob, got {size:,}")
    if blob is None or not size:
        return Images()
    ends = np.cumsum([math.prod(part.shape) for part in parts])
    arrays = np.split(np.frombuffer(blob, np.uint8).copy(), ends[:-1])
    shaped = [(part.name, array.reshape(part.shape)) for part, array in zip(parts, arrays, strict=True)]
    several = {"control": "controls", "image_prompt": "image_prompt", "image_prompt_mask": "image_prompt_mask"}
    lists = {field: tuple(array for name, array in shaped if name == part) for part, field in several.items()}
    return Images(**{name: array for name, array in shaped if name not in several}, **lists)  # type: ignore[arg-type]
