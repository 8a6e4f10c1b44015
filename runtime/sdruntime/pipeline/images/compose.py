"""Put one image over another, bit for bit as Pillow does. Images with alpha are uint8 [H, W, 4]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sdruntime.pipeline.images.blur import boxes
from sdruntime.pipeline.images.pixels import Pixels

Integers = NDArray[np.int64]
_ROUNDS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))  # (radius of a blur, how often it is put over the image)


def overlaid(original: Pixels, image: Pixels, mask: Pixels) -> Pixels:
    """Return `image` under the original, whose opacity is 255 - `mask`: diffusers' `apply_overlay`."""
    return _over(image_with_alpha(image), _straight(_kept(original, mask)))[..., :3]


def filled(image: Pixels, mask: Pixels) -> Pixels:
    """Return an image whose masked part has the colours around it: blurs of the rest, the widest first, as the web UI has it."""
    kept = _kept(image, mask)
    result = np.zeros_like(kept)
    for radius, times in _ROUNDS:
        blurred = _straight(boxes(kept, radius))
        for _ in range(times):
            result = _over(result, blurred)
    return result[..., :3]


def image_with_alpha(image: Pixels) -> Pixels:
    """Return an opaque image with an alpha channel."""
    return np.concatenate([image, np.full((*image.shape[:2], 1), 255, np.uint8)], axis=2)


def _kept(image: Pixels, mask: Pixels) -> Pixels:
    """Return the part outside the mask, its colours multiplied by alpha."""
    opacity = (255 - mask.astype(np.int64))[..., None]
    return _divided(image_with_alpha(image) * opacity).astype(np.uint8)


def _straight(premultiplied: Pixels) -> Pixels:
    """Divide the colours by alpha."""
    alpha = premultiplied[..., 3:].astype(np.int64)
    colours = np.minimum(255 * premultiplied[..., :3].astype(np.int64) // np.maximum(alpha, 1), 255)
    return np.concatenate([np.where(alpha == 0, premultiplied[..., :3], colours), alpha], axis=2).astype(np.uint8)


def _over(below: Pixels, above: Pixels) -> Pixels:
    under, over = below.astype(np.int64), above.astype(np.int64)
    alpha = over[..., 3:]
    total = alpha * 255 + under[..., 3:] * (255 - alpha)
    weight = alpha * (255 * 255 << 7) // np.maximum(total, 1)
    colours = _divided(over[..., :3] * weight + under[..., :3] * ((255 << 7) - weight), bits=7)
    mixed = np.concatenate([colours, _divided(total)], axis=2)
    return np.where(alpha == 0, below, mixed).astype(np.uint8)


def _divided(products: Integers, bits: int = 0) -> Integers:
    """Divide by 255 and by 2**bits, rounded."""
    rounded = products + (128 << bits)
    return ((rounded >> 8) + rounded) >> 8 >> bits
