"""Pixels uint8 [H, W, 3] to and from the float arrays of the VAE."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import SdruntimeError

Pixels = NDArray[np.uint8]


def to_uint8(decoded: NDArray[np.float32]) -> Pixels:
    """The decoder's float32 [.., 3, H, W] in [-1, 1] as uint8 [.., H, W, 3]: clipped, and rounded as diffusers does.

    Raises SdruntimeError where a number is not finite.
    """
    if not np.isfinite(decoded).all():
        raise SdruntimeError("the VAE decoder returned numbers that are not finite: in fp16 it overflowed, so build it in fp32")
    scaled = decoded * np.float32(0.5)
    scaled += np.float32(0.5)
    np.clip(scaled, 0, 1, out=scaled)
    scaled *= np.float32(255)
    np.rint(scaled, out=scaled)
    image = np.empty((*decoded.shape[:-3], *decoded.shape[-2:], decoded.shape[-3]), np.uint8)
    for channel in range(image.shape[-1]):  # one assignment of all three would go pixel by pixel, at four times the cost
        image[..., channel] = scaled[..., channel, :, :]
    return image


def from_uint8(image: Pixels) -> NDArray[np.float32]:
    """uint8 [.., H, W, 3] as the encoder's float32 [.., 3, H, W] in [-1, 1], to the bit what diffusers makes of it."""
    scaled = np.moveaxis(image, -1, -3).astype(np.float32, order="C")
    scaled /= np.float32(255)
    scaled *= np.float32(2)
    scaled -= np.float32(1)
    return scaled
