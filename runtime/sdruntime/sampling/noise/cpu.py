"""Seeded normal noise in NumPy that reproduces `torch.randn` with a CPU generator: the same seed gives the same image.

Mersenne Twister (Matsumoto & Nishimura 1998) and Box-Muller (1958) in the order of torch's `normal_` for float32
(aten/src/ATen/native/cpu/DistributionTemplates.h): draws of 16 or more numbers in blocks of 16, smaller draws pair by pair in
float64. Logarithm, sine and cosine are computed in float64 and rounded once, so machines and NumPy versions agree to 1 ulp of
float32. The difference to torch is at most 4e-6; torch itself differs by 2.6e-6 between CPUs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import SettingError

_BLOCK = 16
_TURN = np.float32(2 * math.pi)
_STEP = 2 * math.pi / (1 << 14)
_CIRCLE = np.exp(1j * _STEP * np.arange((1 << 14) + 1))  # cosine + i·sine at every _STEP
_DOUBT = 2.0**-46


class NoiseStream:
    """The noise of one image: each call of `normal` continues the stream, like calls of torch.randn with one generator.

    `seed`: 0 to 2**64 - 1; only the low 32 bits count, as in torch's CPU generator. Raises SettingError.
    """

    __slots__ = ("_spare", "_twister")

    def __init__(self, seed: int) -> None:
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 1 << 64:
            raise SettingError(f"seed {seed!r}: expected a whole number from 0 to {(1 << 64) - 1}")
        # the legacy class, because NumPy has frozen its stream (NEP 19) and it is seeded as torch's is
        self._twister = np.random.RandomState(int(seed) & 0xFFFFFFFF)
        self._spare: float | None = None

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return a draw of standard normal noise, float32 [shape]."""
        size = math.prod(shape)
        return (self._small(size) if size < _BLOCK else self._large(size)).reshape(shape)

    def integers(self, below: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """Return uniform integers from 0 to `below` - 1, int64 [shape]: the same on every machine, but not those of torch."""
        return self._twister.randint(0, below, size=shape, dtype=np.int64)

    def _large(self, size: int) -> NDArray[np.float32]:
        noise = np.empty(size, np.float32)
        whole = size - size % _BLOCK
        uniform = self._uniform(size)
        noise[:whole] = _box_muller(uniform[:whole])
        if whole < size:  # torch draws the last 16 again and overwrites the end of the last whole block
            noise[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return noise

    def _small(self, size: int) -> NDArray[np.float32]:
        noise = np.empty(size, np.float32)
        for i in range(size):
            if self._spare is not None:  # the sine of the last pair is kept across calls, also of larger draws
                noise[i], self._spare = self._spare, None
                continue
            turn, height = self._uniform_double(), self._uniform_double()
            radius = math.sqrt(-2 * math.log1p(-height))
            noise[i] = radius * math.cos(2 * math.pi * turn)
            self._spare = radius * math.sin(2 * math.pi * turn)
        return noise

    def _uniform(self, size: int) -> NDArray[np.float32]:
        """Return uniform numbers in [0, 1) from the low 24 bits of each 32-bit output, exact in float32."""
        uniform: NDArray[np.float32] = (self._bits(size) & np.uint32(0xFFFFFF)).astype(np.float32)
        uniform *= 2.0**-24
        return uniform

    def _uniform_double(self) -> float:
        """Return a uniform number in [0, 1) from the low 53 bits of two 32-bit outputs, the first in the high bits."""
        high, low = self._bits(2).tolist()
        return float((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53

    def _bits(self, size: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 1 << 32, size=size, dtype=np.uint32)


def _box_muller(uniform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Transform uniform [16·n] to normal float32 [16·n]: in each block of 16, the first 8 give radii, the last 8 angles."""
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(-2 * np.log((1 - blocks[:, 0]).astype(np.float64)))
    angle = (_TURN * blocks[:, 1]).astype(np.float64)  # the angle is float32, as in torch
    noise = np.empty_like(blocks)
    pairs = _on_circle(angle)
    pairs *= radius
    wide = pairs.view(np.float64).reshape(*radius.shape, 2)
    low, high = ((wide * share).astype(np.float32) for share in (1 - _DOUBT, 1 + _DOUBT))
    if radius.all() and np.array_equal(low, high):
        noise.swapaxes(1, 2)[...] = low
    else:  # in one of several hundred calls, a number is so close to the middle of two float32 that only np.sin and np.cos decide
        noise[:, 0] = radius * np.cos(angle)
        noise[:, 1] = radius * np.sin(angle)
    return noise.reshape(-1)


def _on_circle(angle: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Return cos + i·sin of `angle` in [0, 2π], each with relative error 2**-47, in a quarter of the time of np.cos and np.sin.

    The nearest point of a table is rotated by the rest of the angle (Taylor; the next terms are below 6e-17).
    """
    nearest = np.rint(angle / _STEP)
    rest = angle - nearest * _STEP
    square = rest * rest
    rotation = np.empty(angle.shape, np.complex128)
    rotation.real = 1 - square / 2
    rotation.imag = rest - rest * square / 6
    rotation *= _CIRCLE[nearest.astype(np.intp)]
    return rotation
