"""guidance.py against the two formulas, written out in float64."""

import numpy as np
import pytest

from sdruntime.sampling.guidance import combine, combine_with_image, guidance_embedding, rescale


@pytest.fixture
def pair():
    rng = np.random.default_rng(3)
    return tuple(rng.normal(size=(3, 4, 8, 8)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_combine_is_the_line_through_both(pair, scale):
    uncond, cond = pair
    expected = uncond.astype(np.float64) + scale * (cond.astype(np.float64) - uncond)
    guided = combine(uncond, cond, scale)
    assert guided.dtype == np.float32
    np.testing.assert_allclose(guided, expected, rtol=0, atol=4e-6)


def test_combine_takes_a_scale_a_row(pair):
    scales = np.array([1.0, 5.0, 7.5], np.float32).reshape(3, 1, 1, 1)
    together = combine(*pair, scales)
    for row in range(3):
        assert np.array_equal(together[row], combine(pair[0][row], pair[1][row], float(scales[row].item())))


def test_combine_writes_over_cond_only_when_told(pair):
    uncond, cond = pair
    kept = uncond.copy(), cond.copy()
    expected = combine(uncond, cond, 7.5)
    assert np.array_equal(uncond, kept[0])
    assert np.array_equal(cond, kept[1])
    assert combine(uncond, cond, 7.5, out=cond) is cond
    assert np.array_equal(cond, expected)
    assert np.array_equal(uncond, kept[0])


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescale_mixes_towards_the_deviation_of_cond(pair, phi):
    cond, guided = pair
    guided *= np.array([1.0, 2.0, 9.0], np.float32).reshape(3, 1, 1, 1)
    wide = guided.astype(np.float64)
    ratio = (cond.astype(np.float64).std(axis=(1, 2, 3)) / wide.std(axis=(1, 2, 3))).reshape(3, 1, 1, 1)
    expected = phi * wide * ratio + (1 - phi) * wide
    result = rescale(guided, cond, phi)
    assert result is guided
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=2e-6, atol=1e-6)


def test_rescale_takes_a_phi_a_row(pair):
    cond, guided = pair
    phis = np.array([0.0, 0.5, 1.0], np.float32).reshape(3, 1, 1, 1)
    alone = [rescale(guided[row : row + 1].copy(), cond[row : row + 1], float(phis[row].item())) for row in range(3)]
    np.testing.assert_allclose(rescale(guided, cond, phis), np.concatenate(alone), rtol=1e-6)


def test_a_constant_row_stays(pair):
    cond = pair[0]
    guided = np.full_like(cond, 2.0)
    assert np.array_equal(rescale(guided, cond, 0.7), np.full_like(cond, 2.0))


@pytest.mark.parametrize(("scale", "width"), [(1.0, 256), (7.5, 256), (8.5, 33), (100.0, 512)])
def test_the_embedding_of_the_guidance_is_that_of_diffusers(scale: float, width: int) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding(None, torch.tensor([scale - 1]), width)[0].numpy()
    ours = guidance_embedding(scale, width)
    assert ours.dtype == np.float32
    largest = np.float32((scale - 1) * 1000)  # angle, of which float32 keeps the last digit
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2 * np.spacing(largest) + 1e-6)


def test_the_embedding_of_no_guidance_is_of_the_angle_zero() -> None:
    assert guidance_embedding(1.0, 6).tolist() == [0, 0, 0, 1, 1, 1]


def test_guidance_by_an_image_is_the_plane_through_the_three(pair):
    uncond, cond = pair
    image = 0.5 * cond[::-1]
    expected = uncond + 7.0 * (cond - image) + 1.5 * (image - uncond)
    np.testing.assert_allclose(combine_with_image(uncond, image, cond, 7.0, 1.5), expected, rtol=1e-5, atol=1e-5)
