"""The noise schedule: betas become a Curve of noise levels, and a noise level on it is a Point.

The trained levels are kept in float32, as diffusers keeps them: 1 - alpha_bar is so small at the clean end that a Curve
in float64 would put sigma there 2e-5 beside diffusers'. From there on everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import SettingError, UnknownName

Array = NDArray[np.floating[Any]]
Space = Literal["ve", "vp", "flow"]
Settings = Mapping[str, Any]


class Point(NamedTuple):
    """A noise level, x = alpha·clean + sigma·noise, and the timestep t that the model is told there.

    In space "ve" alpha is 1, in "vp" alpha² + sigma² is 1, in "flow" alpha + sigma is 1.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        """log(alpha / sigma), half the logarithm of the signal-to-noise ratio; infinite at either end."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha else -math.inf


def at_ratio(t: float, ratio: float, space: Space) -> Point:
    """The Point at noise-to-signal `ratio` ≥ 0 in a space; in "flow" the ratio is that space's own sigma ≤ 1."""
    if space == "ve":
        return Point(t, 1.0, ratio)
    if space == "flow":
        return Point(t, 1.0 - ratio, ratio)
    alpha = 1.0 / math.sqrt(1.0 + ratio * ratio)
    return Point(t, alpha, ratio * alpha)


def alpha_bars(settings: Settings) -> NDArray[np.float32]:
    """Cumulative alphas [num_train_timesteps], falling (DDPM, arXiv 2006.11239, section 2).

    Raises SettingError for betas outside (0, 1), UnknownName for an unknown beta_schedule.
    """
    trained, first, last = settings["num_train_timesteps"], settings["beta_start"], settings["beta_end"]
    kind, given = settings["beta_schedule"], settings["trained_betas"]
    if given is not None:
        betas = np.asarray(given, np.float32)
        if betas.shape != (trained,):
            raise SettingError(f"trained_betas holds {betas.size} numbers, num_train_timesteps is {trained}")
    elif kind == "linear":
        betas = linspace_float32(first, last, trained)
    elif kind == "scaled_linear":
        betas = linspace_float32(math.sqrt(first), math.sqrt(last), trained) ** 2
    elif kind == "squaredcos_cap_v2":  # Improved DDPM, arXiv 2102.09672, equation 17
        bars = np.cos((np.arange(trained + 1) / trained + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - bars[1:] / bars[:-1], 0.999).astype(np.float32)
    else:
        raise UnknownName("beta_schedule", str(kind), ["linear", "scaled_linear", "squaredcos_cap_v2"])
    if not (np.all(betas > 0) and np.all(betas < 1)):
        raise SettingError(f"betas from {betas.min():g} to {betas.max():g}: each must lie between 0 and 1")
    if settings.get("rescale_betas_zero_snr"):
        betas = zero_terminal_snr(betas)
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)


def linspace_float32(first: float, last: float, count: int) -> NDArray[np.float32]:
    """torch.linspace to the bit: a float32 step from either end to the middle, multiplied and added with one rounding."""
    low, high = float(np.float32(first)), float(np.float32(last))
    step = float((np.float32(last) - np.float32(first)) / np.float32(max(count - 1, 1)))
    i = np.arange(count)
    return np.where(i < max(count // 2, 1), low + step * i, high - step * (count - 1 - i)).astype(np.float32)


def zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Betas whose last level is pure noise (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas, dtype=np.float64).astype(np.float32))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bars = root**2
    return np.asarray(1 - np.concatenate([bars[:1], bars[1:] / bars[:-1]]), np.float32)


class Curve:
    """The trained noise levels in one space. `sigmas` [num_train_timesteps] are noise-to-signal ratios, rising."""

    def __init__(self, settings: Settings, space: Space) -> None:
        self.space = space
        self.bars = alpha_bars(settings)
        # A ratio-based sampler cannot start at infinity: diffusers lifts a zero last level to 2^-24, sigma 4096.
        bars = np.where(self.bars > 0, self.bars, np.float32(2**-24))
        with np.errstate(over="ignore"):  # a level below 2^-127 has no ratio in float32: a table that needs it is refused
            self.sigmas: NDArray[np.float32] = np.sqrt((1 - bars) / bars)
        # In float32 as in diffusers, for its timesteps are cut to whole ones; by way of float64, the same everywhere.
        self.log_sigmas = np.log(self.sigmas.astype(np.float64)).astype(np.float32)

    def at_time(self, t: int) -> Point:
        """The trained level of timestep t, 0 ≤ t < num_train_timesteps."""
        if not 0 <= t < len(self.bars):
            raise SettingError(
                f"the schedule reaches timestep {t}, the model was trained on 0 to {len(self.bars) - 1}: "
                "lower steps_offset or steps"
            )
        bar = float(self.bars[t])
        return Point(float(t), math.sqrt(bar), math.sqrt(1.0 - bar))

    def at_sigma(self, sigma: float) -> Point:
        """The level of noise-to-signal ratio sigma, its timestep interpolated in log sigma (k-diffusion)."""
        return at_ratio(self.time_of(sigma), sigma, self.space)

    def time_of(self, sigma: float) -> float:
        log_sigma = math.log(max(sigma, 1e-10))
        low = int(np.clip(np.searchsorted(self.log_sigmas, log_sigma, side="right") - 1, 0, len(self.sigmas) - 2))
        below, above = self.log_sigmas[low], self.log_sigmas[low + 1]
        share = min(max((float(below) - log_sigma) / float(below - above), 0.0), 1.0)
        return low + share

    def ratio_at(self, t: Array) -> Array:
        """Noise-to-signal ratios at timesteps, fractional ones interpolated linearly in sigma."""
        return np.interp(t, np.arange(len(self.sigmas)), self.sigmas)


class FlowCurve:
    """The noise levels of a rectified flow (arXiv 2209.03003): sigma is the share of noise, t = sigma·`trained`."""

    def __init__(self, trained: int) -> None:
        self.trained = trained

    def at_time(self, t: int) -> Point:
        return self.at_sigma(t / self.trained)

    def at_sigma(self, sigma: float) -> Point:
        return at_ratio(sigma * self.trained, sigma, "flow")


def karras(high: float, low: float, steps: int) -> Array:
    """sigmas spaced evenly in sigma^(1/7) (arXiv 2206.00364, equation 5)."""
    ramp = np.linspace(0, 1, steps)
    return np.asarray((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7)


def exponential(high: float, low: float, steps: int) -> Array:
    """sigmas spaced evenly in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def polyexponential(high: float, low: float, steps: int, rho: float = 1.0) -> Array:
    """sigmas whose logarithm falls as a power of the step (k-diffusion; rho 1 is exponential)."""
    return np.exp(np.linspace(1, 0, steps) ** rho * math.log(high / low) + math.log(low))


def beta(high: float, low: float, steps: int) -> Array:
    """sigmas at the quantiles of a Beta(0.6, 0.6) distribution (arXiv 2407.12173)."""
    return low + beta_quantile(1 - np.linspace(0, 1, steps)) * (high - low)


def beta_quantile(p: Array, a: float = 0.6) -> Array:
    """Quantiles of the symmetric Beta(a, a) distribution, by Newton on x^a·S(x) with S its power series (DLMF 8.17.7)."""
    half = np.minimum(p, 1 - p)  # the series is used up to x = 1/2 only
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


RATIO_SCHEDULES: Mapping[str, Callable[[float, float, int], Array]] = {
    "karras": karras,
    "exponential": exponential,
    "lu": exponential,  # even in the half log signal-to-noise ratio (arXiv 2211.01095): the same numbers
    "polyexponential": polyexponential,
    "beta": beta,
}


def shifted(sigma: Array, shift: float) -> Array:
    """Flow sigmas moved towards noise, for larger images (Stable Diffusion 3, arXiv 2403.03206, equation 23)."""
    return np.asarray(shift * sigma / (1 + (shift - 1) * sigma))
