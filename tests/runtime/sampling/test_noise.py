"""noise.py against numbers that torch drew (tests/golden/make_noise.py), by its vectorised and its plain code path."""

import numpy as np
import pytest
from places import GOLDEN

from sdruntime.errors import SettingError
from sdruntime.sampling import noise
from sdruntime.sampling.noise import NoiseStream

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


def test_the_smallest_uniform_numbers_give_zeros():
    """A radius of -0, the square root of -2·log(1): not NaN."""
    assert np.array_equal(noise._box_muller(np.zeros(16, np.float32)), np.zeros(16, np.float32))
