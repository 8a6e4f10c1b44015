"""guidance.py against the two formulas, written out in float64."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from solvers import STABLE

from sdruntime.errors import SettingError
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.executor import run
from sdruntime.sampling.guidance import combine, combine_with_image, guidance_embedding, over_calls, plus_plus, rescale
from sdruntime.sampling.noise_schedule import Point
from sdruntime.sampling.prediction import clean_from_raw
from sdruntime.sampling.samplers.ddim import posterior_std
from sdruntime.sampling.samplers.kdiffusion.slopes import ancestral


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


@pytest.mark.parametrize(
    ("guidances", "interval", "calls", "expected"),
    [
        ((7.5,), (0.0, 1.0), 3, (7.5, 7.5, 7.5)),
        ((7.5,), (0.2, 0.8), 10, (1, 1, 7.5, 7.5, 7.5, 7.5, 7.5, 7.5, 1, 1)),
        ((7.5,), (0.34, 0.99), 3, (1, 7.5, 1)),
        ((9.0, 0.5, 4.0), (0.0, 1.0), 3, (9.0, 1, 4.0)),  # 1 or less is no guidance
        ((9.0, 8.0, 4.0), (0.0, 0.5), 3, (9.0, 1, 1)),
    ],
)
def test_an_interval_is_of_the_model_calls(guidances: Any, interval: Any, calls: int, expected: Any) -> None:
    assert over_calls(guidances, interval, calls) == expected


def test_a_list_of_another_length_is_refused() -> None:
    with pytest.raises(SettingError, match="guidance: got a list of 2 numbers; the request makes 3 model calls"):
        over_calls((1.0, 2.0), (0.0, 1.0), 3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_a", "ddpm", "lcm"])
def test_cfg_plus_plus_is_a_list_of_guidances(sampler: str, prediction: str) -> None:
    """CFG++ (arXiv 2406.08070, algorithm 2): the guided clean image, and the noise of the unconditional output."""
    config = {**STABLE, "_class_name": "DDIMScheduler", "prediction_type": prediction, "timestep_spacing": "trailing"}
    table = compile_table(config, steps=8, sampler=sampler)
    rng, strengths = np.random.default_rng(5), (0.6, 0.1, 0.8, 1.0, 0.6, 0.3, 0.6, 0.7)
    outputs = rng.standard_normal((8, 2, 50))  # (unconditional, conditional) at each step
    levels = [Point(0.0, *level) for level in table.levels]
    ends = [*levels[1:], Point(0.0, 1.0, 0.0)]
    first = rng.standard_normal(50) * table.start[1]
    by_hand = first.copy()
    for i, ((without, with_text), s, t) in enumerate(zip(outputs, levels, ends, strict=True)):
        p, q = clean_from_raw(prediction, s)
        guided = p * by_hand + q * (without + strengths[i] * (with_text - without))
        noise = (by_hand - s.alpha * (p * by_hand + q * without)) / s.sigma
        if sampler == "euler_a":
            remaining = ancestral(s.sigma, t.sigma, 1.0)[0]
        elif sampler == "ddpm":  # equation 7 of DDPM is that of DDIM with eta 1
            remaining = math.sqrt(max(t.sigma**2 - posterior_std(s.alpha, s.sigma, t.alpha, t.sigma) ** 2, 0))
        else:
            remaining = 0.0 if sampler == "lcm" else t.sigma
        by_hand = t.alpha * guided + remaining * noise
    scales = plus_plus(table, strengths, sampler)
    calls = iter(zip(scales, outputs, strict=True))

    def model(x: Any, t: float) -> Any:
        scale, (without, with_text) = next(calls)
        return (without + scale * (with_text - without)).astype(np.float32)

    found = run(table, first.astype(np.float32), model, lambda: np.zeros(50, np.float32))
    np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-4)
    if sampler in ("ddim", "euler"):
        ratios = [*(level.sigma / level.alpha for level in levels), 0.0]
        expected = [strength * s / (s - t) for strength, (s, t) in zip(strengths, pairwise(ratios), strict=True)]
        np.testing.assert_allclose(scales, expected, rtol=1e-6)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "heun", "lms", "unipc", "pndm", "dpmpp_sde", "restart"])
def test_cfg_plus_plus_is_refused_where_steps_read_earlier_outputs(sampler: str) -> None:
    config = {**STABLE, "_class_name": "DDIMScheduler", "timestep_spacing": "leading", "steps_offset": 1}
    table = compile_table(config, steps=8, sampler=sampler)
    with pytest.raises(SettingError, match=f"cfg_pp with {sampler}: its steps read outputs of earlier ones"):
        plus_plus(table, (0.6,) * table.steps, sampler)
