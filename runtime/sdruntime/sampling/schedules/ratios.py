"""Schedules between two noise-to-signal ratios: functions of the largest sigma, the smallest and the number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from sdruntime.sampling.noise_schedule import Array


def karras(high: float, low: float, steps: int, rho: float = 7.0) -> Array:
    """Return sigmas [steps] spaced evenly in sigma^(1/rho) (arXiv 2206.00364, equation 5)."""
    ramp = np.linspace(0, 1, steps)
    return np.asarray((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def exponential(high: float, low: float, steps: int) -> Array:
    """Return sigmas [steps] spaced evenly in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def polyexponential(high: float, low: float, steps: int, rho: float = 1.0) -> Array:
    """Return sigmas [steps] whose logarithm decreases as ramp^rho, ramp from 1 to 0 (k-diffusion); rho = 1 is `exponential`."""
    return np.exp(np.linspace(1, 0, steps) ** rho * math.log(high / low) + math.log(low))


def beta(high: float, low: float, steps: int) -> Array:
    """Return sigmas [steps] at the quantiles of a Beta(0.6, 0.6) distribution (arXiv 2407.12173)."""
    return low + beta_quantile(1 - np.linspace(0, 1, steps)) * (high - low)


def beta_quantile(p: Array, a: float = 0.6) -> Array:
    """Return quantiles of the symmetric Beta(a, a) distribution, by Newton on x^a·S(x) with S its power series (DLMF 8.17.7)."""
    half = np.minimum(p, 1 - p)  # use the series only up to x = 1/2
    k = np.arange(60)
    ratios = np.where(k > 0, (k - a) / np.maximum(k, 1), 1.0)
    series = np.cumprod(ratios) * a / (a + k)
    mass = half * a * math.gamma(a) ** 2 / math.gamma(2 * a)
    x = mass ** (1 / a)
    for _ in range(8):
        power = x[:, None] ** k
        total = power @ series
        density = np.maximum(power @ (series * (a + k)), 1e-300)
        x = np.clip(x - (x * total - mass * x ** (1 - a)) / density, 0.0, 0.5)
    return np.where(p > 0.5, 1 - x, x)


def kl_optimal(high: float, low: float, steps: int) -> Array:
    """Return sigmas [steps] spaced evenly in arctan sigma (arXiv 2404.14507: optimal for Gaussian data)."""
    return np.tan(np.linspace(math.atan(high), math.atan(low), steps))


RATIO_SCHEDULES: Mapping[str, Callable[[float, float, int], Array]] = {
    "karras": karras,
    "exponential": exponential,
    "lu": exponential,  # spaced evenly in lambda (arXiv 2211.01095): the same sigmas
    "polyexponential": polyexponential,
    "beta": beta,
    "kl_optimal": kl_optimal,
}
