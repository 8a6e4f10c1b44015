"""UniPC: one model call serves the predictor of the next step and the corrector of the previous one."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from sdruntime.sampling.grids import Path, vp_grid
from sdruntime.sampling.noise_schedule import Point
from sdruntime.sampling.samplers.integrals import phi
from sdruntime.sampling.samplers.keys import (
    BY_NAME,
    FINAL,
    FLOW,
    LINSPACE,
    PIXEL,
    SCHEDULED,
    TRAINED,
    ZERO_SNR,
)
from sdruntime.sampling.samplers.protocol import Draw, Solver, X, noise_of, stay_above_zero
from sdruntime.sampling.samplers.sampler import Sampler


def unipc(
    x: X,
    path: Path,
    noise: Draw,
    *,
    solver_order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
) -> Solver:
    """UniPC-p with B(h) = h ("bh1") or exp(h) - 1 ("bh2"), arXiv 2302.04867, algorithms 5 to 8.

    The corrector updates the x that was yielded: predictor and corrector differ only in `correction`. A step in which lambda
    becomes infinite or does not change is of order 1. disable_corrector: indices of steps, 0 for the path's first.
    """
    if not predict_x0:
        stay_above_zero(path, "predict_x0", predict_x0)
    past: deque[tuple[float, X]] = deque(maxlen=solver_order + 1)
    before: tuple[Step, int] | None = None
    disabled = frozenset(disable_corrector)
    for left, (s, t) in zip(range(len(path), 0, -1), path, strict=True):
        x, m = yield x, s
        past.appendleft((s.lam, m if predict_x0 else noise_of(x, m, s)))
        if before is not None and path.total - left - 1 not in disabled:
            step, order = before
            earlier = [*past][1 : order + 1]
            x = x + step.correction(earlier, now=past[0][1]) - step.correction(earlier)
        order = min(solver_order, len(past), left if lower_order_final else solver_order)
        step = Step(s, t, predict_x0, solver_type)
        if not 0 < step.h < math.inf:
            order = 1
        x = step.first_order(x, past[0][1]) + step.correction([*past][:order])
        before = step, order
    return x


class Step(NamedTuple):
    """One step from s to t. `data`: the model's output is read as the clean image, not as noise."""

    s: Point
    t: Point
    data: bool
    solver_type: str

    @property
    def h(self) -> float:
        return self.t.lam - self.s.lam

    def first_order(self, x: X, m: X) -> X:
        """Return x after a first-order step (DDIM)."""
        s, t = self.s, self.t
        if self.data:
            return t.sigma / s.sigma * x - t.alpha * math.expm1(-self.h) * m
        return t.alpha / s.alpha * x - t.sigma * math.expm1(self.h) * m

    def correction(self, past: list[tuple[float, X]], now: X = None) -> X:
        """Return what the differences to the newest of `past` add to the first-order step.

        Without `now` it is the predictor's part, equation 3; with `now`, the output at t, the corrector's, equation 7. A single
        difference has weight 1/2, which keeps the order without solving for it (section 3.4).
        """
        (lam0, m0), *older = past
        rates = [(lam - lam0) / self.h for lam, _ in older]
        slopes = [(m - m0) / r for r, (_, m) in zip(rates, older, strict=True)]
        if now is not None:
            rates.append(1.0)
            slopes.append(now - m0)
        z = -self.h if self.data else self.h
        bh = z if self.solver_type == "bh1" else math.expm1(z)
        weights = [0.5]
        if len(rates) > 1:
            moments = [phi(k, z) * math.factorial(k) / bh for k in range(1, len(rates) + 1)]
            weights = np.linalg.solve(np.vander(rates, increasing=True).T, moments).tolist()
        level = self.t.alpha if self.data else self.t.sigma
        return -level * bh * sum(w * d for w, d in zip(weights, slopes, strict=True)) if slopes else 0.0


ROWS = (
    Sampler(
        name="unipc",
        solve=unipc,
        grid=partial(vp_grid, repeats_last=True, flow_from_one=True),
        space="vp",
        order=2,
        takes_schedule=True,
        reads={
            **TRAINED,
            **LINSPACE,
            **SCHEDULED,
            **BY_NAME,
            **ZERO_SNR,
            **FINAL,
            **FLOW,
            **PIXEL,
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "lower_order_final": True,
            "disable_corrector": (),
            "solver_p": None,
            "shift_terminal": None,
        },
        options=("solver_order", "solver_type", "predict_x0", "lower_order_final", "disable_corrector"),
        choices={"solver_type": ("bh1", "bh2")},
        diffusers="UniPCMultistepScheduler",
        a1111=("UniPC",),
        about="Unified predictor-corrector (arXiv 2302.04867)",
    ),
)
