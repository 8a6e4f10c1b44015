"""Ranges and defaults of the numbers in a request, shared by the command line, the service and the C library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from sdruntime.bundle.limits import LARGEST_SIDE, MOST_GUIDANCE, NOISE_LEVELS
from sdruntime.errors import SettingError, shown
from sdruntime.sampling.noise_schedule import stored_levels
from sdruntime.sampling.table import MOST_STEPS


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers allowed for a setting, both ends included; `above` excludes `low`, `whole` allows only integers."""

    low: int
    high: int
    whole: bool = False
    above: bool = False

    def __str__(self) -> str:
        return f"{self.low}{' (excluded)' if self.above else ''} to {self.high:,}"

    def number(self, name: str, value: Any) -> Any:
        """Return `value`, also a NumPy number, as a Python int or float. Raises SettingError, also for a boolean."""
        if isinstance(value, bool | np.bool_) or not isinstance(value, Integral if self.whole else Real):
            kind = "a whole number" if self.whole else "a number"
            raise SettingError(f"{name} {shown(value)}: expected {kind} from {self}")
        try:
            number: int | float = int(value) if isinstance(value, Integral) else float(value)
        except OverflowError:  # the value does not fit float64
            number = math.inf
        if not self.low <= number <= self.high or (self.above and number == self.low):  # NaN fails the comparison
            raise SettingError(f"{name} {shown(value)} is outside {self}")
        return number if self.whole else float(number)


SIDE = Range(1, LARGEST_SIDE, whole=True)  # of an image, in pixels
CORNER = Range(0, LARGEST_SIDE, whole=True)  # of a crop, in pixels
SEED = Range(0, 2**64 - 1, whole=True)
RANGES: Mapping[str, Range] = {
    "seed": SEED,
    "variation_seed": SEED,
    "variation_strength": Range(0, 1),
    "steps": Range(1, MOST_STEPS, whole=True),
    "guidance": Range(0, MOST_GUIDANCE),  # models are used with 1 to 30
    "image_guidance": Range(1, 100),
    "rescale": Range(0, 1),
    "strength": Range(0, 1, above=True),
    "clip_skip": Range(0, 64, whole=True),
    "mask_blur": Range(0, 64),
    "aesthetic_score": Range(0, 10),
    "negative_aesthetic_score": Range(0, 10),
    "hires": Range(1, 8, above=True),
    "hires_strength": Range(0, 1, above=True),
    "hires_steps": Range(1, MOST_STEPS, whole=True),
    "refiner_at": Range(0, 1, above=True),
    "noise_level": Range(0, NOISE_LEVELS - 1, whole=True),
}
# the defaults
NUMBERS: Mapping[str, Any] = {
    "seed": 0,
    "variation_seed": 0,
    "variation_strength": 0.0,
    "steps": 20,
    "guidance": 7.5,
    "image_guidance": 1.5,
    "rescale": 0.0,
    "strength": 0.8,
    "clip_skip": 0,
    "mask_blur": 0.0,
    "aesthetic_score": 6.0,
    "negative_aesthetic_score": 2.5,
    "hires": None,
    "hires_strength": 0.7,
    "hires_steps": None,
    "refiner_at": 0.8,
    "noise_level": 20,
}

SHARE = Range(0, 1)
WHOLE = (0.0, 1.0)  # the interval of all model calls
MOST_CALLS = 2 * MOST_STEPS + 9  # of the model, by any sampler

# Noise levels (sigmas) that replace the number of steps: from high to low, each a ratio of noise to signal.
SIGMA = Range(0, 1_000_000)
SIGMAS = Range(1, MOST_STEPS + 1, whole=True)  # how many levels; most samplers need 2


def sigmas_of(value: Any) -> tuple[float, ...]:
    """Return a sequence of numbers as decreasing noise levels. Raises SettingError."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not listed and not (isinstance(value, np.ndarray) and value.ndim == 1):
        raise SettingError(f"sigmas {shown(value)}: expected a list of noise levels from high to low, such as [14.6, 6.5, 0]")
    if not SIGMAS.low <= len(value) <= SIGMAS.high:
        raise SettingError(f"sigmas: got {len(value):,} noise levels; expected {SIGMAS}")
    levels = tuple(SIGMA.number(f"sigmas[{i}]", level) for i, level in enumerate(value))
    stored_levels(levels)
    return levels


def steps_beside(sigmas: Sequence[float] | None, steps: int | None) -> int | None:
    """Return `steps`, or None if `sigmas` replace them: the default number of steps does not contradict any sigmas."""
    if sigmas is not None and steps == NUMBERS["steps"]:
        return None
    return NUMBERS["steps"] if steps is None and sigmas is None else steps


def guidance_of(value: Any) -> float | tuple[float, ...]:
    """Return a guidance, or a sequence of one for each model call, as Python numbers. Raises SettingError."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    if not listed and not (isinstance(value, np.ndarray) and value.ndim == 1):
        number: float = RANGES["guidance"].number("guidance", value)
        return number
    if not 1 <= len(value) <= MOST_CALLS:
        raise SettingError(f"guidance: got a list of {len(value):,} numbers; expected one for each model call")
    return tuple(RANGES["guidance"].number(f"guidance[{i}]", item) for i, item in enumerate(value))


def interval_of(value: Any) -> tuple[float, float]:
    """Return a guidance interval as (start, end), shares of the model calls. Raises SettingError."""
    pair = tuple(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes) else ()
    if len(pair) != 2:
        raise SettingError(f"guidance_interval {shown(value)}: expected (start, end), shares of the steps from 0 to 1")
    start, end = (SHARE.number(f"guidance_interval: {name}", part) for name, part in zip(("start", "end"), pair, strict=True))
    if start >= end:
        raise SettingError(f"guidance_interval: start {start:g} is not below end {end:g}")
    return start, end
