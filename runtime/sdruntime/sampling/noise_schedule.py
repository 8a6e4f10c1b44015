"""The noise schedule: a Curve of trained noise levels, computed from betas. A noise level is a Point.

The trained levels are float32, as in diffusers: 1 - alpha_bar is so small at the clean end that in float64 sigma would differ
from diffusers' by 2e-5. All later computations are float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import SettingError, UnknownName

Array = NDArray[np.floating[Any]]
Space = Literal["ve", "vp", "flow", "edm"]
Settings = Mapping[str, Any]


class Point(NamedTuple):
    """A noise level, x = alpha·clean + sigma·noise, and its timestep t for the model.

    Spaces "ve" and "edm": alpha = 1. Space "vp": alpha² + sigma² = 1. Space "flow": alpha + sigma = 1.
    """

    t: float
    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        """lambda = log(alpha / sigma), half the log signal-to-noise ratio; inf at sigma 0, -inf at alpha 0."""
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha else -math.inf


def at_ratio(t: float, ratio: float, space: Space) -> Point:
    """Return the Point of noise-to-signal `ratio` ≥ 0 in a space; in "flow", `ratio` is the flow's sigma ≤ 1."""
    if space in ("ve", "edm"):
        return Point(t, 1.0, ratio)
    if space == "flow":
        return Point(t, 1.0 - ratio, ratio)
    alpha = 1.0 / math.sqrt(1.0 + ratio * ratio)
    return Point(t, alpha, ratio * alpha)


def alpha_bars(settings: Settings) -> NDArray[np.float32]:
    """Return alpha_bar, the cumulative alphas, [num_train_timesteps], decreasing (DDPM, arXiv 2006.11239, section 2).

    Raises SettingError for betas outside (0, 1), UnknownName for an unknown beta_schedule.
    """
    trained, first, last = settings["num_train_timesteps"], settings["beta_start"], settings["beta_end"]
    kind, explicit = settings["beta_schedule"], settings["trained_betas"]
    if explicit is not None:
        betas = np.asarray(explicit, np.float32)
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
        raise SettingError(f"betas from {betas.min():g} to {betas.max():g}: each must be between 0 and 1")
    if settings.get("rescale_betas_zero_snr"):
        betas = zero_terminal_snr(betas)
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)


def linspace_float32(first: float, last: float, count: int) -> NDArray[np.float32]:
    """Return torch.linspace bit for bit: a float32 step from either end to the middle, multiply-add with one rounding."""
    low, high = float(np.float32(first)), float(np.float32(last))
    step = float((np.float32(last) - np.float32(first)) / np.float32(max(count - 1, 1)))
    i = np.arange(count)
    return np.where(i < max(count // 2, 1), low + step * i, high - step * (count - 1 - i)).astype(np.float32)


def zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rescale betas so that the last level is pure noise, alpha_bar 0 (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas, dtype=np.float64).astype(np.float32))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bars = root**2
    return np.asarray(1 - np.concatenate([bars[:1], bars[1:] / bars[:-1]]), np.float32)


class Curve:
    """The trained noise levels in one space. `sigmas`: noise-to-signal ratios, [num_train_timesteps], increasing."""

    def __init__(self, settings: Settings, space: Space) -> None:
        self.space = space
        self.bars = alpha_bars(settings)
        # A ratio-based sampler cannot start at infinity: like diffusers, raise a last alpha_bar of 0 to 2^-24, sigma 4096.
        bars = np.where(self.bars > 0, self.bars, np.float32(2**-24))
        with np.errstate(over="ignore"):  # below 2^-127 the ratio overflows float32: Table refuses it
            self.sigmas: NDArray[np.float32] = np.sqrt((1 - bars) / bars)
        # float32 as in diffusers, which makes whole timesteps of them; computed via float64, the same on every machine.
        self.log_sigmas = np.log(self.sigmas.astype(np.float64)).astype(np.float32)

    def at_time(self, t: int) -> Point:
        """Return the trained level of timestep t. Raises SettingError unless 0 ≤ t < num_train_timesteps."""
        if not 0 <= t < len(self.bars):
            raise SettingError(
                f"the schedule reaches timestep {t}, but the model was trained on 0 to {len(self.bars) - 1}: "
                "lower steps_offset or steps"
            )
        bar = float(self.bars[t])
        return Point(float(t), math.sqrt(bar), math.sqrt(1.0 - bar))

    def at_sigma(self, sigma: float) -> Point:
        """Return the level of noise-to-signal ratio sigma, with its timestep interpolated in log sigma (k-diffusion)."""
        return at_ratio(self.time_of(sigma), sigma, self.space)

    def time_of(self, sigma: float) -> float:
        """Return the fractional timestep of a noise-to-signal ratio, interpolated in log sigma, within the trained ones."""
        log_sigma = math.log(max(sigma, 1e-10))
        low = int(np.clip(np.searchsorted(self.log_sigmas, log_sigma, side="right") - 1, 0, len(self.sigmas) - 2))
        below, above = self.log_sigmas[low], self.log_sigmas[low + 1]
        share = min(max((float(below) - log_sigma) / float(below - above), 0.0), 1.0)
        return low + share

    def ratio_at(self, t: Array) -> Array:
        """Return the noise-to-signal ratios at timesteps t; at fractional t, interpolate linearly in sigma."""
        return np.interp(t, np.arange(len(self.sigmas)), self.sigmas)


class FlowCurve:
    """The noise levels of a rectified flow (arXiv 2209.03003): sigma in [0, 1] is the share of noise, t = sigma·`trained`."""

    def __init__(self, trained: int) -> None:
        self.trained = trained

    def at_time(self, t: int) -> Point:
        return self.at_sigma(t / self.trained)

    def at_sigma(self, sigma: float) -> Point:
        return at_ratio(sigma * self.trained, sigma, "flow")


class EdmCurve:
    """The noise levels of a model in EDM's preconditioning (arXiv 2206.00364, table 1): any sigma, with t = log(sigma) / 4."""

    def at_time(self, t: int) -> Point:
        return self.at_sigma(math.exp(4 * t))

    def at_sigma(self, sigma: float) -> Point:
        return at_ratio(self.time_of(sigma), sigma, "edm")

    def time_of(self, sigma: float) -> float:
        return math.log(sigma) / 4 if sigma > 0 else 0.0  # at sigma 0 the model is not called


def shifted(sigma: Array, shift: float) -> Array:
    """Shift flow sigmas towards noise, for larger images (Stable Diffusion 3, arXiv 2403.03206, equation 23)."""
    return np.asarray(shift * sigma / (1 + (shift - 1) * sigma))


def stored_levels(sigmas: Sequence[float]) -> list[float]:
    """Return noise levels as a sampler stores them, in float32 as diffusers. Raises SettingError unless they decrease."""
    levels: list[float] = np.array(sigmas, np.float32).tolist()
    for i, (high, low) in enumerate(pairwise(levels), 1):  # two levels may round to one
        if low >= high:
            raise SettingError(f"sigmas[{i}] {sigmas[i]!r}: expected less than the level before it, {sigmas[i - 1]!r}")
    return levels
