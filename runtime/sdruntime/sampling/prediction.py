"""Prediction types as affine maps from (x, raw output) to the clean-image estimate, and the scale of the model's input.

At a Point, x = alpha·clean + sigma·noise. With r = hypot(alpha, sigma), the model's variance-preserving input is x / r, and

    epsilon        raw = noise                                  (DDPM, arXiv 2006.11239)
    v_prediction   raw = (alpha·noise - sigma·clean) / r        (arXiv 2202.00512, appendix D)
    sample         raw = clean
    flow           raw = noise - clean                          (rectified flow, arXiv 2209.03003)

A model in EDM's preconditioning (arXiv 2206.00364, table 1) for data of deviation d has the input x / r, r = hypot(d, sigma), and

    epsilon        clean = d²/r²·x + sigma·d/r·raw
    v_prediction   clean = d²/r²·x - sigma·d/r·raw
"""

from __future__ import annotations

import math

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.noise_schedule import Point, Space

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def clean_from_raw(prediction: str, point: Point, sigma_data: float | None = None) -> tuple[float, float]:
    """Return (p, q) with clean = p·x + q·raw. `sigma_data`: the deviation of the data, for EDM's preconditioning.

    Raises SettingError for epsilon at alpha 0, where x is pure noise: then the noise does not determine the clean image.
    """
    _, alpha, sigma = point
    if sigma_data is not None:
        if prediction not in ("epsilon", "v_prediction"):
            raise UnknownName("prediction_type", str(prediction), ["epsilon", "v_prediction"])
        norm = math.hypot(sigma_data, sigma)
        out = sigma * sigma_data / norm
        return (sigma_data / norm) ** 2, out if prediction == "epsilon" else -out
    if prediction == "epsilon":
        if alpha == 0:
            raise SettingError(
                f"prediction_type 'epsilon' at timestep {point.t:g}, where alpha is 0 and x is pure noise: "
                "a schedule with rescale_betas_zero_snr needs a v_prediction or sample model"
            )
        return 1 / alpha, -sigma / alpha
    if prediction == "v_prediction":
        norm = math.hypot(alpha, sigma)
        return alpha / norm**2, -sigma / norm
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "flow_prediction":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    raise UnknownName("prediction_type", str(prediction), PREDICTIONS)


def input_scale(point: Point, space: Space, sigma_data: float | None = None) -> float:
    """Return the factor of x in the model's input: for variance-exploding x 1 / hypot(sigma_data, sigma), else 1.

    The result has unit variance for data of deviation `sigma_data`, 1 if not given.
    """
    return 1 / math.hypot(1.0 if sigma_data is None else sigma_data, point.sigma) if space in ("ve", "edm") else 1.0
