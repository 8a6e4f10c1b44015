"""Schedules that users name, in place of a checkpoint's timestep_spacing: "karras", "sgm_uniform", "align_your_steps", …

They choose timesteps and noise-to-signal ratios (sigmas) from a Curve: by a formula between two sigmas (ratios.py), by the
trained timesteps, or from a published list (published.py).
"""

from __future__ import annotations

import numpy as np

from sdruntime.errors import SettingError
from sdruntime.sampling.noise_schedule import Array, Curve
from sdruntime.sampling.schedules.published import PUBLISHED
from sdruntime.sampling.schedules.ratios import RATIO_SCHEDULES

TIME_SCHEDULES = ("simple", "sgm_uniform", "normal", "ddim_uniform", "turbo")
SCHEDULES = (*RATIO_SCHEDULES, *TIME_SCHEDULES, *PUBLISHED)
TURBO = 10  # levels of the turbo schedule


def scheduled(kind: str, steps: int, curve: Curve, high: float, low: float, family: str | None = None) -> tuple[Array, Array]:
    """Return timesteps and sigmas of a named schedule between two sigmas; time schedules and published lists ignore those two.

    `family`: the model's, for lists that depend on it. Raises SettingError.
    """
    if low <= 0 or (low > high and steps > 1):
        raise SettingError(f"sigma_min {low:g} and sigma_max {high:g}: the schedule {kind!r} needs 0 < min <= max")
    if kind in TIME_SCHEDULES:
        times = _timesteps(kind, steps, len(curve.sigmas))
        return times, np.exp(np.interp(times, np.arange(len(curve.sigmas)), curve.log_sigmas))
    sigmas = RATIO_SCHEDULES[kind](high, low, steps) if kind in RATIO_SCHEDULES else PUBLISHED[kind](steps, family)
    if kind == "lu":  # the same from float32 logarithms, as in diffusers: rounding decides whole timesteps
        first, last = float(curve.log_sigmas[-1]), float(curve.log_sigmas[0])
        sigmas = np.exp(first + np.linspace(0, 1, steps) * (last - first))
    return np.array([curve.time_of(sigma) for sigma in sigmas.tolist()]), sigmas


def _timesteps(kind: str, steps: int, trained: int) -> Array:
    """Return the timesteps of a time schedule, by its definition in ComfyUI."""
    if kind == "simple":  # every n-th trained level
        return np.asarray(trained - 1 - np.floor(np.arange(steps) * (trained / steps)))
    if kind == "sgm_uniform":  # evenly in t, without timestep 0
        return np.linspace(trained - 1, 0, steps + 1)[:-1]
    if kind == "normal":  # evenly in t, including timestep 0 (k-diffusion's get_sigmas)
        return np.linspace(trained - 1, 0, steps)
    if kind == "ddim_uniform":  # a whole stride from timestep 1 up, as many as there are steps
        times = 1.0 + np.arange(steps)[::-1] * (trained // steps)
        if times[0] > trained - 1:
            raise SettingError(f"schedule 'ddim_uniform': at most {trained - 1} steps, for it begins at timestep 1; got {steps}")
        return times
    if steps > TURBO:
        raise SettingError(f"schedule 'turbo': at most {TURBO} steps, for it is the first of {TURBO} levels; got {steps}")
    return np.asarray(np.floor(trained / TURBO * (TURBO - np.arange(steps))) - 1)
