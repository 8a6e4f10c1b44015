"""Why PNDM and LMS agree least with diffusers at high guidance: their coefficients amplify what is rounded.

Each model output is changed by one in turn, and the result's changes are added in squares. The model is guidance between two
Gaussians whose best noise estimates are known: all images N(0, 1), and those of the prompt N(c, 0.05²). The Adams-Bashforth
weights of order 4 that PNDM, PLMS, iPNDM and LMS have are stable for tiny steps only; at guidance 7.5 the steps are not tiny.
Tables equal diffusers' (test_golden.py, test_grid.py), so this is so in diffusers as well (integration/test_sensitivity.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from solvers import STABLE

from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.noise_schedule import Curve

pytestmark = pytest.mark.slow

CONFIG = {**STABLE, "timestep_spacing": "leading", "steps_offset": 1}


def growth(sampler: str, guidance: float, steps: int = 20) -> float:
    table = compile_table(CONFIG, steps=steps, sampler=sampler)
    bars = Curve({**CONFIG, "trained_betas": None}, "vp").bars.astype(float)
    slopes = [
        slope(np.interp(t, np.arange(len(bars)), bars), guidance) * scale for t, scale in zip(table.t, table.scale, strict=True)
    ]
    calls = table.steps
    changes = np.zeros((calls + 1, calls))  # of each x, one column for the call whose output was changed
    outputs = np.zeros((calls, calls))
    for i in range(calls):
        outputs[i] = slopes[i] * changes[i]
        outputs[i, i] += 1
        for j in range(min(i + 1, table.X.shape[1])):
            changes[i + 1] += table.X[i, j] * changes[i - j]
        for j in range(min(i + 1, table.M.shape[1])):
            changes[i + 1] += table.M[i, j] * outputs[i - j]
    return float(np.linalg.norm(changes[-1]))


def slope(bar: float, guidance: float) -> float:
    """d(guided noise estimate) / dx, for x = sqrt(bar)·image + sqrt(1 - bar)·noise."""
    sigma = math.sqrt(1 - bar)
    return guidance * sigma / (bar * 0.05**2 + sigma**2) - (guidance - 1) * sigma / (bar + sigma**2)


@pytest.mark.parametrize("sampler", ["pndm", "plms", "ipndm", "lms"])
def test_adams_bashforth_of_order_4_amplifies_rounding_at_high_guidance(sampler: str) -> None:
    assert growth(sampler, 1.0) < 2
    assert growth(sampler, 7.5) > 10_000


@pytest.mark.parametrize(
    ("sampler", "limit"), [("ddim", 3), ("euler", 3), ("dpmpp_2m", 20), ("heun", 20), ("deis", 60), ("unipc", 150)]
)
def test_the_others_do_not(sampler: str, limit: float) -> None:
    assert growth(sampler, 1.0) < 1
    assert growth(sampler, 7.5) < limit
