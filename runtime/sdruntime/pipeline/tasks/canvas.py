"""What inpainting works on: the image with its extension, the blurred mask, and the part of both that is generated.

Sources: diffusers' `padding_mask_crop` and `apply_overlay`; mask blur and fill of AUTOMATIC1111's web UI.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdruntime.errors import SettingError
from sdruntime.pipeline.images.blur import gaussian
from sdruntime.pipeline.images.compose import overlaid
from sdruntime.pipeline.images.imagefile import fitted
from sdruntime.pipeline.images.pixels import Pixels
from sdruntime.pipeline.images.resampling import Box, covering, inside
from sdruntime.pipeline.requests.request import Request


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Canvas:
    """`image` uint8 [H, W, 3] and `mask` [H, W] of one size; `box`: the part that is generated at another size, None for all."""

    image: Pixels
    mask: Pixels
    box: Box | None = None

    @classmethod
    def of(cls, request: Request, size: tuple[int, int]) -> Canvas:
        """Return the canvas of a request with an image, of which `size`, (width, height), is generated.

        Without a mask or an extension, the mask covers everything. Raises SettingError for an empty mask of which only the
        masked part is to be generated.
        """
        image, mask = request.pixels, request.mask_pixels
        assert image is not None
        if mask is None:
            mask = np.full(image.shape[:2], 0 if any(request.extend) else 255, np.uint8)
        left, top, right, bottom = request.extend
        sides = ((top, bottom), (left, right))
        image = np.pad(image, (*sides, (0, 0)), mode="edge")
        mask = gaussian(np.pad(mask, sides, constant_values=255), request.mask_blur)
        if request.mask_padding is not None:
            return cls(image=image, mask=mask, box=crop_box(mask, size, request.mask_padding))
        if request.fit:
            image, mask = fitted(image, size, request.fit), fitted(mask, size, request.fit)
        return cls(image=image, mask=mask)

    def part(self, size: tuple[int, int]) -> tuple[Pixels, Pixels]:
        """Return the image and the mask to generate, at `size`."""
        if self.box is None:
            return self.image, self.mask
        left, top, right, bottom = self.box
        crops = (array[top:bottom, left:right] for array in (self.image, self.mask))
        image, mask = (inside(crop, size) for crop in crops)
        return image, mask

    def finished(self, generated: Pixels) -> Pixels:
        """Return the generated part in its place, under the pixels that the mask keeps."""
        if self.box is not None:
            left, top, right, bottom = self.box
            whole = np.zeros_like(self.image)
            whole[top:bottom, left:right] = covering(generated, (right - left, bottom - top))
            generated = whole
        return overlaid(self.image, generated, self.mask)


def finished(request: Request, generated: Pixels) -> Pixels:
    """Return the image of a request, of which `generated` comes from the model."""
    if not request.inpaints or not (request.overlay or request.mask_padding is not None):
        return generated
    return Canvas.of(request, (generated.shape[1], generated.shape[0])).finished(generated)


def crop_box(mask: Pixels, size: tuple[int, int], padding: int) -> Box:
    """Return the box of what is not black in a mask, enlarged by `padding` and to the proportions of `size`, inside the mask.

    As diffusers' `get_crop_region` rounds it. Raises SettingError if all is black.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        raise SettingError("mask: it is black everywhere, so that there is nothing to generate: paint a part of it white")
    height, width = mask.shape
    left, right = max(int(columns[0]) - padding, 0), min(int(columns[-1]) + 1 + padding, width)
    top, bottom = max(int(rows[0]) - padding, 0), min(int(rows[-1]) + 1 + padding, height)
    ratio = size[0] / size[1]
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _widened(top, bottom, int((right - left) / ratio - (bottom - top)), height)
    else:
        left, right = _widened(left, right, int((bottom - top) * ratio - (right - left)), width)
    return left, top, right, bottom


def _widened(first: int, last: int, more: int, limit: int) -> tuple[int, int]:
    """Widen a range by `more`, half on each side, and move it into 0 to `limit`."""
    first, last = first - more // 2, last + more - more // 2
    over = max(last - limit, 0)
    first, last = first - over, last - over
    return max(first, 0), min(last - min(first, 0), limit)


def result_size(request: Request, generated: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of a request's image, of which `generated` is what the model generates."""
    whole = request.image_size
    return generated if whole is None or request.mask_padding is None or not request.inpaints else whole
