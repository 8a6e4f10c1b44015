"""noise/cuda.py against known answers of Philox4x32-10 and numbers that others have printed from CUDA devices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdruntime.errors import SettingError
from sdruntime.sampling.noise.cuda import CudaNoiseStream, philox

# Random123's tests/kat_vectors: counter, key, output
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_has_the_known_answers(counter: str, key: str, output: str) -> None:
    c0, c1, c2, c3 = (np.array([int(word, 16)], np.uint64) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    assert [f"{int(word[0]):08x}" for word in philox((c0, c1, c2, c3), (low, high))] == output.split()


# seed, shape, threads of the GPU, {first index: numbers}, and where they were printed
PRINTED = [
    # AUTOMATIC1111's modules/rng_philox.py
    (
        *(0, (3, 4), None),
        {0: [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]}
        | {6: [-0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497]},
    ),
    (10, (3,), None, {0: [-0.1029, 1.6810, -0.2708]}),  # pytorch issue 79496
    # pytorch issue 143086: an H100, then an A100, with more than 30 numbers for each thread
    (1, (1, 9483264), 132 * 2048, {0: [-0.2963, 2.6764, -0.1408], -3: [-0.6970, -0.7780, 0.3267]}),
    (1, (1, 9483264), 108 * 2048, {0: [-0.2963, 2.6764, -0.1408], -3: [0.1549, -0.6797, -0.1656]}),
    # pytorch issue 62467: an RTX A6000
    (43, (1, 3, 128, 128), 84 * 1536, {0: [1.9983], 16384: [0.8704], 32768: [2.1127]}),
    # pytorch issue 158398: a GPU that is not named; 28 multiprocessors of 1536 threads explain its last numbers
    (
        *(42, (1, 64, 2048), 28 * 1536),
        {0: [0.1940, 2.1614, -0.1721], 2045: [1.4540, -2.7733, -0.8932, -0.4574, 0.8063, 0.1580], -3: [-0.4841, 1.2850, -0.0282]},
    ),
    # pytorch issue 97097: an RTX A4000, of normal_(5, 5**.5)
    (
        *(14, (1000, 100), 48 * 1536),
        {
            at: [(x - 5) / math.sqrt(5) for x in numbers]
            for at, numbers in (
                *((0, [2.8731, 5.2727, 2.9889]), (97, [1.6853, 9.6331, 6.6319, 3.9968, 3.8097, 5.7328])),
                *((-100, [2.7337, 2.2106, 7.7815]), (-3, [8.2207, 6.5395, 4.2604])),
            )
        },
    ),
]


@pytest.mark.parametrize(("seed", "shape", "threads", "printed"), PRINTED)
def test_numbers_that_a_gpu_printed(
    seed: int, shape: tuple[int, ...], threads: int | None, printed: dict[int, list[float]]
) -> None:
    noise = CudaNoiseStream(seed, threads).normal(shape)
    assert (noise.dtype, noise.shape) == (np.float32, shape)
    for at, numbers in printed.items():
        start = at % noise.size
        # printed with four decimals; by the web UI with eight, but its angles are not rounded to float32 as those of a GPU
        assert np.abs(noise.reshape(-1)[start : start + len(numbers)] - numbers).max() <= (6e-5 if seed else 2e-6)


def test_the_next_draw_continues_the_stream() -> None:
    stream = CudaNoiseStream(7)
    first, second = stream.normal((4, 8, 8)), stream.normal((4, 8, 8))
    assert np.array_equal(first, CudaNoiseStream(7).normal((4, 8, 8)))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.2
    again = CudaNoiseStream(7)
    again.normal((3,))  # each draw takes the same part of every thread's numbers, whatever its size
    assert np.array_equal(again.normal((4, 8, 8)), second)


def test_a_large_draw_on_a_small_gpu_takes_several_parts_of_the_stream() -> None:
    whole, wrapped = CudaNoiseStream(3).normal((16384,)), CudaNoiseStream(3, 1024).normal((16384,))
    assert np.array_equal(whole[:1024], wrapped[:1024])
    assert not np.isin(wrapped[1024:4096], whole).any()  # the other three numbers of each Philox output
    stream, small = CudaNoiseStream(3), CudaNoiseStream(3, 1024)
    small.normal((16384,))  # four outputs of each thread
    for part in range(4):
        assert np.array_equal(stream.normal((1024,)), wrapped[4096 * part : 4096 * part + 1024])
    assert np.array_equal(small.normal((1024,)), stream.normal((1024,)))


def test_the_numbers_are_normal() -> None:
    noise = CudaNoiseStream(2**64 - 1, 2048).normal((1 << 20,)).astype(np.float64)
    assert abs(noise.mean()) < 0.004
    assert abs(noise.std() - 1) < 0.003
    assert abs((noise**4).mean() - 3) < 0.03
    assert np.isfinite(noise).all()


def test_all_64_bits_of_a_seed_count() -> None:
    draws = [CudaNoiseStream(seed).normal((4,)).tolist() for seed in (3, 2**32 + 3, 2**63 + 3)]
    assert len({tuple(draw) for draw in draws}) == 3


def test_an_empty_shape_draws_nothing() -> None:
    stream = CudaNoiseStream(1)
    assert stream.normal((0, 4)).shape == (0, 4)
    assert np.array_equal(stream.normal((5,)), CudaNoiseStream(1).normal((5,)))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "7", None])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(SettingError, match=r"seed .* from 0 to 18446744073709551615"):
        CudaNoiseStream(seed)
