"""The noise of one image: of its seed, or between two seeds, or of its seed at another size.

Source: `ImageRNG` of AUTOMATIC1111's web UI (modules/rng.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import SettingError
from sdruntime.sampling.noise.cpu import NoiseStream
from sdruntime.sampling.noise.cuda import CudaNoiseStream

Noise = NDArray[np.float32]
Shape = tuple[int, int, int]
Rng = Literal["cpu", "cuda"]
RNGS: tuple[Rng, ...] = get_args(Rng)
_ALIKE = 0.9995  # mean cosine of two noises from which `slerp` interpolates linearly


class Stream(Protocol):
    """Seeded noise: each call continues the stream."""

    def normal(self, shape: tuple[int, ...]) -> Noise: ...


STREAMS: Mapping[Rng, Callable[[int], Stream]] = {"cpu": NoiseStream, "cuda": CudaNoiseStream}


class ImageNoise:
    """The noise of one image. `first` draws that of its first latents; `normal` all other noise, from the seed's stream alone.

    `rng`: whose numbers, those of torch on the CPU or on CUDA. `variation_seed`, `variation_strength`: move the first noise
    towards that of another seed, from 0 to 1. `origin`: (height, width) in latent cells; the first noise is that of an image
    of this size, in the middle of the image's own.
    """

    def __init__(
        self,
        seed: int,
        rng: Rng = "cpu",
        *,
        variation_seed: int = 0,
        variation_strength: float = 0.0,
        origin: tuple[int, int] | None = None,
    ) -> None:
        self._open = STREAMS[rng]
        self._seed, self._stream = seed, self._open(seed)
        self._variation_seed, self._strength, self._origin = variation_seed, variation_strength, origin
        self._draws = 0

    def normal(self, shape: tuple[int, ...]) -> Noise:
        """Draw unit noise."""
        self._draws += 1
        return self._stream.normal(shape)

    def first(self, shape: Shape) -> Noise:
        """Draw the noise of the first latents, float32 [C, h, w]. The seed's stream always advances by this one draw."""
        noise = self.normal(shape)
        small = shape if self._origin is None else (shape[0], *self._origin)
        start = noise if small == shape else self._nth(self._seed, small)
        if self._strength:
            start = slerp(self._strength, start, self._nth(self._variation_seed, small))
        return start if small == shape else centred(start, noise)

    def _nth(self, seed: int, shape: Shape) -> Noise:
        """Return what an image of this seed and shape draws at this point of its own stream."""
        stream = self._open(seed)
        for _ in range(self._draws - 1):
            stream.normal(shape)
        return stream.normal(shape)


def slerp(weight: float, low: Noise, high: Noise) -> Noise:
    """Interpolate on the sphere from `low` to `high`, float32 [C, h, w], for each column of each channel.

    Almost equal noises are mixed linearly, with the weights as the web UI has them there. Raises SettingError for opposite
    columns, which are likely only in latents one cell high.
    """
    start, end = low.astype(np.float64), high.astype(np.float64)
    cosine = (start / np.linalg.norm(start, axis=1, keepdims=True) * (end / np.linalg.norm(end, axis=1, keepdims=True))).sum(1)
    if cosine.mean() > _ALIKE:
        return (start * weight + end * (1 - weight)).astype(np.float32)
    if (np.abs(cosine) >= 1 - 1e-12).any():
        raise SettingError("variation_strength: the noises of the two seeds have parallel columns: use a larger size")
    angle = np.arccos(cosine)
    shares = np.sin(np.stack([1 - weight, weight])[:, None, None] * angle) / np.sin(angle)
    mixed: Noise = (shares[0][:, None] * start + shares[1][:, None] * end).astype(np.float32)
    return mixed


def centred(small: Noise, noise: Noise) -> Noise:
    """Return `noise` with `small`, or what fits of it, in its middle."""
    result: Noise = noise.copy()
    inner: list[slice] = []
    outer: list[slice] = []
    for ours, theirs in zip(noise.shape[1:], small.shape[1:], strict=True):
        margin = (ours - theirs) // 2  # below 0, rounded down: the web UI cuts an odd row more from the other side
        size = theirs + 2 * min(margin, 0)
        outer.append(slice(max(margin, 0), max(margin, 0) + size))
        inner.append(slice(max(-margin, 0), max(-margin, 0) + size))
    result[:, outer[0], outer[1]] = small[:, inner[0], inner[1]]
    return result
