"""noise/cpu.py against numbers of torch (tests/golden/make_noise.py), from its vectorised and its plain code path."""

import numpy as np
import pytest
from places import GOLDEN

from sdruntime.errors import SettingError
from sdruntime.sampling.noise import cpu as noise
from sdruntime.sampling.noise.cpu import NoiseStream

GOLDEN = np.load(GOLDEN / "noise.npz")


def ends(values):
    return [values] if values.size <= 64 else [values[:32], values[-32:]]


@pytest.mark.parametrize("path", ["vector", "plain"])
@pytest.mark.parametrize("row", range(len(GOLDEN["seeds"])))
def test_consecutive_draws_of_every_size_are_those_of_torch(row, path):
    stream = NoiseStream(int(GOLDEN["seeds"][row]))
    draws = [stream.normal((size,)) for size in GOLDEN["sizes"].tolist()]
    ours = np.concatenate([part for values in draws for part in ends(values)])
    assert ours.dtype == np.float32
    assert np.abs(ours - GOLDEN[path][row]).max() <= 4e-6


def test_a_shape_is_filled_in_order():
    assert np.array_equal(NoiseStream(7).normal((4, 8, 9)), NoiseStream(7).normal((4 * 8 * 9,)).reshape(4, 8, 9))


def test_whole_blocks_may_be_drawn_in_any_portions():
    stream = NoiseStream(11)
    portions = [stream.normal((size,)) for size in (16, 160, 32)]
    assert np.array_equal(np.concatenate(portions), NoiseStream(11).normal((208,)))


def test_streams_do_not_share_state():
    first, second = NoiseStream(5), NoiseStream(5)
    before = first.normal((33,))
    NoiseStream(6).normal((100,))
    assert np.array_equal(second.normal((33,)), before)


def test_neighbouring_seeds_differ_and_seeds_count_by_their_low_32_bits():
    assert not np.array_equal(NoiseStream(0).normal((16,)), NoiseStream(1).normal((16,)))
    assert np.array_equal(NoiseStream(3).normal((16,)), NoiseStream(2**32 + 3).normal((16,)))


def test_an_empty_shape_draws_nothing():
    stream = NoiseStream(1)
    assert stream.normal((0, 4)).shape == (0, 4)
    assert np.array_equal(stream.normal((5,)), NoiseStream(1).normal((5,)))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "7", None])
def test_a_seed_that_torch_would_not_take_is_refused(seed):
    with pytest.raises(SettingError, match=r"seed .* from 0 to 18446744073709551615"):
        NoiseStream(seed)


def straight(uniform):
    """Box-Muller with the library's own sine and cosine, in float64, rounded once."""
    blocks = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(-2 * np.log((1 - blocks[:, 0]).astype(np.float64)))
    angle = (np.float32(2 * np.pi) * blocks[:, 1]).astype(np.float64)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32).reshape(-1)


@pytest.mark.parametrize("doubt", [2.0**-46, 2.0**-26, 1.0])  # at 1 every draw is left to the library
def test_the_short_way_round_the_circle_changes_no_bit(doubt, monkeypatch):
    monkeypatch.setattr(noise, "_DOUBT", doubt)
    twister = np.random.RandomState(1)
    for _ in range(50):
        uniform = (twister.randint(0, 1 << 24, size=16384) * 2.0**-24).astype(np.float32)
        uniform[:32] = 0  # radius and angle 0: even the sign of zero is kept
        assert np.array_equal(noise._box_muller(uniform).view(np.int32), straight(uniform).view(np.int32))


def test_every_angle_that_can_be_drawn_is_well_within_the_doubt():
    for first in range(0, 1 << 24, 1 << 20):
        uniform = (np.arange(max(first, 1), first + (1 << 20)) * 2.0**-24).astype(np.float32)
        angle = (np.float32(2 * np.pi) * uniform).astype(np.float64)
        near = noise._on_circle(angle)
        for ours, exact in ((near.real, np.cos(angle)), (near.imag, np.sin(angle))):
            assert np.abs(ours / exact - 1).max() <= 2.0**-49
