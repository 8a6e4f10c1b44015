"""Resize images uint8, [H, W] or [H, W, C], bit for bit as Pillow does: first the rows, then the columns.

Pillow 13 begins with the columns if that costs less, which changes what is rounded and clipped in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sdruntime.pipeline.images.pixels import Pixels

Kernel = Literal["lanczos", "bicubic", "nearest"]
Box = tuple[int, int, int, int]  # (left, top, right, bottom)
Floats = NDArray[np.float64]
_BITS = 22  # of the fraction of a weight


def resample(pixels: Pixels, size: tuple[int, int], kernel: Kernel, box: Box | None = None) -> Pixels:
    """Return the part `box` of an image, by default the whole, at `size`, (width, height).

    A box of no height or width is a line between pixels; neighbours outside the box also count.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = box or (0, 0, width, height)
    for axis, first, last, length in ((1, left, right, size[0]), (0, top, bottom, size[1])):
        if (first, last, length) == (0, pixels.shape[axis], pixels.shape[axis]):
            continue
        if kernel == "nearest":
            scale = (last - first) / length
            places = first + np.cumsum([scale * 0.5] + [scale] * (length - 1))  # added up, so that rounding errors are Pillow's
            pixels = np.take(pixels, np.minimum(places.astype(np.int64), pixels.shape[axis] - 1), axis=axis)
        else:
            pixels = _along(pixels, axis, first, last, length, kernel)
    return pixels


def _along(pixels: Pixels, axis: int, first: int, last: int, length: int, kernel: Kernel) -> Pixels:
    total = pixels.shape[axis]
    weights_of, support = _KERNELS[kernel]
    scale = (last - first) / length
    stretch = max(scale, 1.0)
    reach = support * stretch
    centres = first + (np.arange(length) + 0.5) * scale
    begin = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((centres + reach + 0.5).astype(np.int64), total)
    places = begin[:, None] + np.arange(int((end - begin).max()))
    weights = weights_of((places - centres[:, None] + 0.5) / stretch) * (places < end[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    fixed = np.trunc(weights * (1 << _BITS) + np.copysign(0.5, weights)).astype(np.int32)
    places = np.minimum(places, total - 1)
    shape = [1] * pixels.ndim
    shape[axis] = length
    sums = np.full([*pixels.shape[:axis], length, *pixels.shape[axis + 1 :]], 1 << (_BITS - 1), np.int32)
    for place, weight in zip(places.T, fixed.T, strict=True):
        sums += np.take(pixels, place, axis=axis) * weight.reshape(shape)
    resized: Pixels = np.clip(sums >> _BITS, 0, 255).astype(np.uint8)
    return resized


def _lanczos(x: Floats) -> Floats:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _bicubic(x: Floats) -> Floats:
    a, x = -0.5, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_KERNELS: Mapping[Kernel, tuple[Callable[[Floats], Floats], float]] = {"lanczos": (_lanczos, 3.0), "bicubic": (_bicubic, 2.0)}


def proportional(size: tuple[int, int], into: tuple[int, int], *, cover: bool) -> tuple[int, int]:
    """Return (width, height) with the proportions of `size` that covers `into`, or fits inside; rounded down as in diffusers."""
    width, height = size
    ratio, own = into[0] / into[1], width / height
    if ratio > own if cover else ratio < own:
        return into[0], height * into[0] // width
    return width * into[1] // height, into[1]


def covering(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Return an image that covers `size`, (width, height), by Lanczos; what is too much is cropped on both sides."""
    wide, high = proportional((pixels.shape[1], pixels.shape[0]), size, cover=True)
    left, top = wide // 2 - size[0] // 2, high // 2 - size[1] // 2
    return resample(pixels, (wide, high), "lanczos")[top : top + size[1], left : left + size[0]]


def inside(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Return an image inside `size`, by Lanczos; its edge fills the rest: the resize mode "fill" of diffusers."""
    width, height = size
    wide, high = proportional((pixels.shape[1], pixels.shape[0]), size, cover=False)
    resized = resample(pixels, (wide, high), "lanczos")
    left, top = width // 2 - wide // 2, height // 2 - high // 2
    result = np.zeros((height, width, *pixels.shape[2:]), np.uint8)
    result[top : top + high, left : left + wide] = resized[: height - top, : width - left]
    if top:
        result[:top] = resample(resized, (width, top), "bicubic", (0, 0, width, 0))
        below = resample(resized, (width, top), "bicubic", (0, high, width, high))
        result[top + high :] = below[: height - top - high]
    elif left:
        result[:, :left] = resample(resized, (left, height), "bicubic", (0, 0, 0, height))
        beside = resample(resized, (left, height), "bicubic", (wide, 0, wide, height))
        result[:, left + wide :] = beside[:, : width - left - wide]
    return result
