"""Published noise levels of Stable Diffusion: a list per model or number of steps, read at other numbers of steps in between.

The last level of each list is the lowest trained one; in its place a path ends at sigma 0, as the authors do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sdruntime.errors import SettingError
from sdruntime.sampling.noise_schedule import Array

# Align Your Steps (arXiv 2404.14507), by the model's family
_AYS_SD = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS: Mapping[str, Sequence[float]] = {
    "sd1": _AYS_SD,
    "sd2": _AYS_SD,
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}

# GITS (arXiv 2405.11326) for Stable Diffusion with the coefficient 1.2: 2 to 20 steps, each without the first level and the last
GITS_ENDS = (14.61464119, 0.02916753)
GITS: Sequence[Sequence[float]] = (
    (0.803307,),
    (1.56271636, 0.52423614),
    (2.36326075, 0.92192322, 0.36617002),
    (2.84484982, 1.24153244, 0.59516323, 0.25053367),
    (5.85520077, 2.05039096, 0.95350921, 0.45573691, 0.17026083),
    (5.85520077, 2.45070267, 1.24153244, 0.64427125, 0.29807833, 0.09824532),
    (5.85520077, 2.45070267, 1.36964464, 0.803307, 0.45573691, 0.25053367, 0.09824532),
    (5.85520077, 2.84484982, 1.61558151, 0.95350921, 0.59516323, 0.36617002, 0.19894916, 0.09824532),
    (5.85520077, 2.84484982, 1.67050016, 1.08895338, 0.74807048, 0.50118381, 0.32104823, 0.19894916, 0.09824532),
    (5.85520077, 2.95596409, 1.84880662, 1.24153244, 0.83188516, 0.59516323, 0.41087446, 0.27464288, 0.17026083, 0.09824532),
    (
        5.85520077,
        3.07277966,
        1.98035145,
        1.36964464,
        0.95350921,
        0.69515091,
        0.50118381,
        0.36617002,
        0.25053367,
        0.17026083,
        0.09824532,
    ),
    (
        6.77309084,
        3.46139455,
        2.36326075,
        1.56271636,
        1.08895338,
        0.803307,
        0.59516323,
        0.45573691,
        0.34370604,
        0.25053367,
        0.17026083,
        0.09824532,
    ),
    (
        6.77309084,
        3.46139455,
        2.45070267,
        1.61558151,
        1.162866,
        0.86115354,
        0.64427125,
        0.50118381,
        0.38853383,
        0.29807833,
        0.22545385,
        0.17026083,
        0.09824532,
    ),
    (
        7.49001646,
        4.65472794,
        3.07277966,
        2.12350607,
        1.51179266,
        1.08895338,
        0.83188516,
        0.64427125,
        0.50118381,
        0.38853383,
        0.29807833,
        0.22545385,
        0.17026083,
        0.09824532,
    ),
    (
        7.49001646,
        4.65472794,
        3.07277966,
        2.12350607,
        1.51179266,
        1.08895338,
        0.83188516,
        0.64427125,
        0.50118381,
        0.41087446,
        0.32104823,
        0.25053367,
        0.19894916,
        0.13792117,
        0.09824532,
    ),
    (
        7.49001646,
        4.65472794,
        3.07277966,
        2.12350607,
        1.51179266,
        1.08895338,
        0.83188516,
        0.64427125,
        0.50118381,
        0.41087446,
        0.34370604,
        0.27464288,
        0.22545385,
        0.17026083,
        0.13792117,
        0.09824532,
    ),
    (
        7.49001646,
        4.65472794,
        3.07277966,
        2.19988537,
        1.61558151,
        1.20157266,
        0.92192322,
        0.72133851,
        0.57119018,
        0.45573691,
        0.36617002,
        0.29807833,
        0.25053367,
        0.19894916,
        0.17026083,
        0.13792117,
        0.09824532,
    ),
    (
        7.49001646,
        4.65472794,
        3.07277966,
        2.19988537,
        1.61558151,
        1.24153244,
        0.95350921,
        0.74807048,
        0.59516323,
        0.4783645,
        0.38853383,
        0.32104823,
        0.27464288,
        0.22545385,
        0.19894916,
        0.17026083,
        0.13792117,
        0.09824532,
    ),
    (
        7.49001646,
        4.65472794,
        3.07277966,
        2.19988537,
        1.61558151,
        1.24153244,
        0.95350921,
        0.74807048,
        0.59516323,
        0.50118381,
        0.41087446,
        0.34370604,
        0.29807833,
        0.25053367,
        0.22545385,
        0.19894916,
        0.17026083,
        0.13792117,
        0.09824532,
    ),
)


def align_your_steps(steps: int, family: str | None) -> Array:
    """Return sigmas [steps] of Align Your Steps for a model's family. Raises SettingError for a family without a list."""
    if family is None or family not in AYS:
        whose = "the family of the model is not known: use a bundle" if family is None else f"there is no list for {family}"
        raise SettingError(f"schedule 'align_your_steps': {whose}; the authors list noise levels for {', '.join(AYS)}")
    return log_linear(AYS[family], steps)


def gits(steps: int, family: str | None) -> Array:
    """Return sigmas [steps] of GITS, whose authors publish one list for all Stable Diffusion models."""
    if steps == 1:
        return np.array(GITS_ENDS[:1])
    middle = GITS[min(steps - 2, len(GITS) - 1)]
    return log_linear((GITS_ENDS[0], *middle, GITS_ENDS[1]), steps)


def log_linear(levels: Sequence[float], steps: int) -> Array:
    """Return the first `steps` of steps + 1 levels that are spread evenly over a list and interpolated in the logarithm."""
    places = np.linspace(0, len(levels) - 1, steps + 1)[:-1]
    return np.exp(np.interp(places, np.arange(len(levels)), np.log(levels)))


PUBLISHED = {"align_your_steps": align_your_steps, "gits": gits}
