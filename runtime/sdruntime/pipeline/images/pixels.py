"""Convert between pixels uint8 [H, W, 3] and the float arrays of the VAE."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import SdruntimeError

Pixels = NDArray[np.uint8]


def to_uint8(decoded: NDArray[np.float32]) -> Pixels:
    """Convert the decoder's float32 [.., 3, H, W] in [-1, 1] to uint8 [.., H, W, 3], clipped and rounded as in diffusers.

    Raises SdruntimeError if a number is not finite.
    """
    if not np.isfinite(decoded).all():
        raise SdruntimeError("the VAE decoder returned numbers that are not finite: in fp16 it overflows; build it in fp32")
    scaled = decoded * np.float32(0.5)
    scaled += np.float32(0.5)
    np.clip(scaled, 0, 1, out=scaled)
    scaled *= np.float32(255)
    np.rint(scaled, out=scaled)
    image = np.empty((*decoded.shape[:-3], *decoded.shape[-2:], decoded.shape[-3]), np.uint8)
    for channel in range(image.shape[-1]):  # one assignment of all three copies pixel by pixel and takes four times as long
        image[..., channel] = scaled[..., channel, :, :]
    return image


def from_uint8(image: Pixels) -> NDArray[np.float32]:
    """Convert uint8 [.., H, W, 3] to the encoder's float32 [.., 3, H, W] in [-1, 1], bit for bit as diffusers does."""
    scaled = np.moveaxis(image, -1, -3).astype(np.float32, order="C")
    scaled /= np.float32(255)
    scaled *= np.float32(2)
    scaled -= np.float32(1)
    return scaled
