"""Seeded normal noise in NumPy that reproduces `torch.randn` with a CUDA generator.

Philox4x32-10 (Salmon et al. 2011) and Box-Muller (1958), as in torch's kernel (aten/src/ATen/native/cuda/DistributionTemplates.h)
and cuRAND: thread k reads the subsequence k of the seed's stream, and each call of torch.randn starts where the last one ended.
Uniform numbers and angles are float32, as on the GPU. Logarithm, sine and cosine are computed in float64 and rounded once, so all
machines agree to 1 ulp. cuRAND's fast sine and cosine are off by about 4e-7, which the radius multiplies by up to 6.7.

A GPU runs at most `threads` threads of this kernel at a time: its multiprocessors times the threads of each. A tensor with more
numbers wraps around: thread k also gives the numbers k + threads, k + 2·threads and so on, so that these differ between GPUs.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import SettingError

_BLOCK = 256  # threads
_LANES = 4  # numbers of one Philox output
_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_WORD = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_UNIT = np.float32(2.0**-32)
_TURN = _UNIT * np.float32(2 * math.pi)

Words = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]


class CudaNoiseStream:
    """The noise of one image: each call of `normal` continues the stream, like calls of torch.randn with one CUDA generator.

    `seed`: 0 to 2**64 - 1. `threads`: of the GPU to reproduce, see above; None for one that has a thread for each number.
    Raises SettingError.
    """

    __slots__ = ("_key", "_passed", "_threads")

    def __init__(self, seed: int, threads: int | None = None) -> None:
        if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 1 << 64:
            raise SettingError(f"seed {seed!r}: expected a whole number from 0 to {(1 << 64) - 1}")
        self._key = int(seed) & 0xFFFFFFFF, int(seed) >> 32
        self._passed, self._threads = 0, threads

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return a draw of standard normal noise, float32 [shape]."""
        size = math.prod(shape)
        if not size:
            return np.empty(shape, np.float32)
        threads = min(-(-size // _BLOCK) * _BLOCK, self._threads or size + _BLOCK)
        calls = -(-size // (threads * _LANES))
        noise = np.empty((calls, _LANES, threads), np.float32)
        lanes = min(_LANES, -(-size // threads))
        for call in range(calls):
            noise[call, :lanes] = self._drawn(self._passed + call, threads, lanes)
        self._passed += calls
        return noise.reshape(-1)[:size].reshape(shape)

    def _drawn(self, call: int, threads: int, lanes: int) -> NDArray[np.float32]:
        """Return what each thread draws in its nth call, float32 [lanes, threads]."""
        zeros = np.zeros(threads, np.uint64)
        index = np.arange(threads, dtype=np.uint64)
        words = philox((zeros + np.uint64(call & 0xFFFFFFFF), zeros + np.uint64(call >> 32), index, zeros), self._key)
        noise = np.empty((lanes, threads), np.float32)
        for pair in range(0, lanes, 2):
            _box_muller(words[pair], words[pair + 1], noise[pair : pair + 2])
        return noise


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Return the four 32-bit outputs of Philox4x32-10 for each counter."""
    c0, c1, c2, c3 = counter
    for turn in range(_ROUNDS):
        first, second = (np.uint64((word + turn * weyl) & 0xFFFFFFFF) for word, weyl in zip(key, _WEYL, strict=True))
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ first, p1 & _WORD, (p0 >> _HALF) ^ c3 ^ second, p0 & _WORD
    return c0, c1, c2, c3


def _box_muller(height: NDArray[np.uint64], turn: NDArray[np.uint64], out: NDArray[np.float32]) -> None:
    """Write one or two normal numbers of two 32-bit integers into `out` [1 or 2, n]: the sine first, as in cuRAND."""
    radius = np.sqrt(-2 * np.log(_fused(height, _UNIT)))
    angle = _fused(turn, _TURN)
    for row, wave in zip(out, (np.sin, np.cos), strict=False):
        row[:] = radius * wave(angle)


def _fused(word: NDArray[np.uint64], unit: np.float32) -> NDArray[np.float64]:
    """Return word·unit + unit/2 with float32 inputs, rounded once to float32, as the GPU's multiply-add does."""
    exact = word.astype(np.float32).astype(np.float64) * np.float64(unit) + np.float64(unit) / 2
    rounded: NDArray[np.float32] = exact.astype(np.float32)
    return rounded.astype(np.float64)
