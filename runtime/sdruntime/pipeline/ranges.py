"""The numbers that a request may have: ranges that the command line, the service and the C library share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from sdruntime.bundle.limits import LARGEST_SIDE
from sdruntime.errors import SettingError, shown
from sdruntime.sampling.table import MOST_STEPS


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a setting may have, both ends included; `above`: `low` itself is not among them."""

    low: int
    high: int
    whole: bool = False
    above: bool = False

    def __str__(self) -> str:
        return f"{self.low}{' (excluded)' if self.above else ''} to {self.high:,}"

    def number(self, name: str, value: Any) -> Any:
        """`value` as Python's int or float; NumPy's numbers are welcome, truth values are not numbers. Raises SettingError."""
        if isinstance(value, bool | np.bool_) or not isinstance(value, Integral if self.whole else Real):
            kind = "a whole number" if self.whole else "a number"
            raise SettingError(f"{name} {shown(value)}: expected {kind} from {self}")
        try:
            number: int | float = int(value) if isinstance(value, Integral) else float(value)
        except OverflowError:  # beyond float64, by its own conversion
            number = math.inf
        if not self.low <= number <= self.high or (self.above and number == self.low):  # NaN is in no range
            raise SettingError(f"{name} {shown(value)} is outside {self}")
        return number if self.whole else float(number)


SIDE = Range(1, LARGEST_SIDE, whole=True)  # of an image, in pixels
RANGES: Mapping[str, Range] = {
    "seed": Range(0, 2**64 - 1, whole=True),
    "steps": Range(1, MOST_STEPS, whole=True),
    "guidance": Range(0, 100),  # models are used with 1 to 30
    "rescale": Range(0, 1),
    "strength": Range(0, 1, above=True),
}
NUMBERS: Mapping[str, Any] = {"seed": 0, "steps": 20, "guidance": 7.5, "rescale": 0.0, "strength": 0.8}  # the defaults
