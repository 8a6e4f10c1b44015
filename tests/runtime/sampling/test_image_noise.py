"""noise/image.py: variations and seed resize, with numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sdruntime import Request, SettingError
from sdruntime.pipeline.requests.request import requests_from
from sdruntime.sampling.noise.cpu import NoiseStream
from sdruntime.sampling.noise.cuda import CudaNoiseStream
from sdruntime.sampling.noise.image import ImageNoise, Noise, Rng, centred, slerp

SHAPE = (4, 8, 6)


def columns(*numbers: list[float]) -> Noise:
    """One channel; each argument is a column."""
    return np.array(numbers, np.float32).T[None]


def test_slerp_turns_each_column_by_its_own_angle() -> None:
    low = columns([1, 0], [2, 0])
    high = columns([0, 1], [0.5, math.sqrt(0.75)])  # 90 degrees away, and 60
    expected = columns(
        [math.sin(math.radians(60)), math.sin(math.radians(30))],
        # sin 40°/sin 60° = 0.742227 of (2, 0), sin 20°/sin 60° = 0.394931 of (0.5, 0.866025)
        [2 * 0.742227 + 0.5 * 0.394931, 0.866025 * 0.394931],
    )
    np.testing.assert_allclose(slerp(1 / 3, low, high), expected, atol=2e-6)
    np.testing.assert_allclose(slerp(0, low, high), low, atol=1e-6)
    np.testing.assert_allclose(slerp(1, low, high), high, atol=1e-6)


def test_slerp_is_linear_from_a_mean_cosine_of_0_9995_and_there_swaps_the_weights() -> None:
    degrees = [1.80, 1.82]  # cosines 0.999507 and 0.999496
    low = columns([1.0, 0.0])
    near, far = (columns([math.cos(math.radians(angle)), math.sin(math.radians(angle))]) for angle in degrees)
    np.testing.assert_allclose(slerp(0.25, low, near)[0, 1, 0], 0.75 * math.sin(math.radians(1.80)), atol=1e-7)
    np.testing.assert_allclose(slerp(0.25, low, far)[0, 1, 0], math.sin(math.radians(1.82 / 4)), atol=1e-7)


def test_columns_of_one_cell_cannot_be_turned() -> None:
    with pytest.raises(SettingError, match="variation_strength: the noises of the two seeds have parallel columns"):
        slerp(0.5, columns([1], [2]), columns([1], [-1]))


@pytest.mark.parametrize(
    ("ours", "theirs", "outer", "inner"),
    [
        (8, 4, slice(2, 6), slice(0, 4)),
        (8, 5, slice(1, 6), slice(0, 5)),
        (4, 8, slice(0, 4), slice(2, 6)),
        (8, 11, slice(0, 7), slice(2, 9)),  # floor(-3 / 2) = -2 on both sides: one cell of the image keeps its own noise
    ],
)
def test_the_smaller_noise_is_in_the_middle_of_the_larger(ours: int, theirs: int, outer: slice, inner: slice) -> None:
    big, small = np.zeros((1, ours, 3), np.float32), np.arange(1, theirs * 3 + 1, dtype=np.float32).reshape(1, theirs, 3)
    for noise, other in ((big, small), (big.swapaxes(1, 2), small.swapaxes(1, 2))):
        result = centred(other, noise)
        expected = np.zeros_like(big)
        expected[:, outer] = small[:, inner]
        assert np.array_equal(result, expected if noise is big else expected.swapaxes(1, 2))
    assert not big.any()


STREAMS = {"cpu": NoiseStream, "cuda": CudaNoiseStream}


@pytest.mark.parametrize("rng", ["cpu", "cuda"])
def test_the_settings_change_the_first_noise_alone(rng: Rng) -> None:
    plain, other, small = (STREAMS[rng](seed) for seed in (7, 9, 7))
    first, later = plain.normal(SHAPE), plain.normal(SHAPE)
    noise = ImageNoise(7, rng)
    assert np.array_equal(noise.first(SHAPE), first)
    noise = ImageNoise(7, rng, variation_seed=9, variation_strength=0.4)
    assert np.array_equal(noise.first(SHAPE), slerp(0.4, first, other.normal(SHAPE)))
    assert np.array_equal(noise.normal(SHAPE), later)
    noise = ImageNoise(7, rng, origin=(4, 10))
    assert np.array_equal(noise.first(SHAPE), centred(small.normal((4, 4, 10)), first))
    assert np.array_equal(noise.normal(SHAPE), later)


def test_both_settings_vary_the_noise_of_the_other_size() -> None:
    small = [NoiseStream(seed).normal((4, 4, 10)) for seed in (7, 9)]
    noise = ImageNoise(7, variation_seed=9, variation_strength=0.4, origin=(4, 10))
    assert np.array_equal(noise.first(SHAPE), centred(slerp(0.4, *small), NoiseStream(7).normal(SHAPE)))


def test_after_another_draw_the_other_seed_is_as_far() -> None:
    """Image to image draws the posterior first: at strength 1 its first noise is that of the other seed's own image."""
    noise, other = ImageNoise(7, variation_seed=9, variation_strength=1), ImageNoise(9)
    noise.normal(SHAPE)
    other.normal(SHAPE)
    np.testing.assert_allclose(noise.first(SHAPE), other.first(SHAPE), atol=1e-6)


def test_with_a_variation_the_images_of_a_call_count_its_seed() -> None:
    seeds = [
        (request.seed, request.variation_seed)
        for request in requests_from("a", count=3, seed=5, variation_seed=40, variation_strength=0.1)
    ]
    assert seeds == [(5, 40), (5, 41), (5, 42)]
    plain = requests_from(["a", "b"], seed=5, variation_seed=40)
    assert [(request.seed, request.variation_seed) for request in plain] == [(5, 40), (6, 40)]
    random = {requests_from("a", seed=5, variation_strength=0.1)[0].variation_seed for _ in range(3)}
    assert len(random) == 3
    assert Request(prompt="a").variation_seed == 0
