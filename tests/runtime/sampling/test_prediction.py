"""What a UNet predicts, undone."""

from __future__ import annotations

import math

import pytest

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.noise_schedule import Point, Space, at_ratio
from sdruntime.sampling.prediction import PREDICTIONS, clean_from_raw, input_scale

CLEAN, NOISE = 0.7, -1.3


def raw(prediction: str, point: Point) -> float:
    """What a perfect model says of x = alpha·clean + sigma·noise."""
    norm = math.hypot(point.alpha, point.sigma)
    return {
        "epsilon": NOISE,
        "v_prediction": (point.alpha * NOISE - point.sigma * CLEAN) / norm,
        "sample": CLEAN,
        "flow_prediction": NOISE - CLEAN,
    }[prediction]


@pytest.mark.parametrize("space", ["ve", "vp", "flow"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_model_gives_the_clean_image_back(prediction: str, space: Space) -> None:
    for ratio in (0.0, 0.03, 0.5, 0.95, 14.6):
        if space == "flow" and ratio > 1:
            continue
        point = at_ratio(0.0, ratio, space)
        p, q = clean_from_raw(prediction, point)
        x = point.alpha * CLEAN + point.sigma * NOISE
        assert p * x + q * raw(prediction, point) == pytest.approx(CLEAN)


def test_noise_alone_gives_a_clean_image_to_all_but_epsilon() -> None:
    noise = Point(999.0, 0.0, 1.0)
    for prediction in ("v_prediction", "sample", "flow_prediction"):
        p, q = clean_from_raw(prediction, noise)
        assert p * NOISE + q * raw(prediction, noise) == pytest.approx(CLEAN)
    with pytest.raises(SettingError, match=r"'epsilon' at timestep 999, where alpha is 0.*rescale_betas_zero_snr"):
        clean_from_raw("epsilon", noise)


def test_an_unknown_prediction_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="epsilon"):
        clean_from_raw("epsilonn", Point(0.0, 1.0, 1.0))


def test_only_exploding_x_is_scaled_for_the_model() -> None:
    assert input_scale(Point(0.0, 1.0, 3.0), "ve") == pytest.approx(1 / math.sqrt(10))
    assert input_scale(Point(0.0, 0.6, 0.8), "vp") == 1
    assert input_scale(Point(0.0, 0.2, 0.8), "flow") == 1
