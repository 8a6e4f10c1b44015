"""Emphasis: scale the encoded tokens of a chunk by their weights."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from sdruntime.arrays import Array

Emphasis = Literal["original", "no-norm", "ignore"]
EMPHASES: tuple[Emphasis, ...] = get_args(Emphasis)


def emphasized(hidden: Array, weights: Array, emphasis: Emphasis) -> Array:
    """Return `hidden`, float32 [S, D], with each token scaled by its weight, float32 [S], by the rule of AUTOMATIC1111's web UI.

    "original" then scales the whole chunk so that its mean stays what it was, except where the new mean is 0. "no-norm" does not.
    "ignore" returns `hidden` itself, as does a chunk whose weights are all 1.
    """
    if emphasis == "ignore" or (weights == 1).all():
        return hidden
    scaled = hidden * weights[:, None]
    if emphasis == "original" and (mean := scaled.mean()) != 0:
        scaled *= hidden.mean() / mean
    return np.asarray(scaled, np.float32)
