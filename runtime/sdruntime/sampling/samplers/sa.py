"""SA-Solver: a stochastic Adams predictor and corrector on the clean or the noise estimate."""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from typing import NamedTuple

from sdruntime.sampling.grids import Path, vp_grid
from sdruntime.sampling.noise_schedule import Point
from sdruntime.sampling.samplers.integrals import adams_weights
from sdruntime.sampling.samplers.keys import (
    BY_NAME,
    FLOW,
    LINSPACE,
    PIXEL,
    SCHEDULED,
    TRAINED,
)
from sdruntime.sampling.samplers.protocol import Draw, Solver, X, noise_of
from sdruntime.sampling.samplers.sampler import Sampler


def sa_solver(
    x: X,
    path: Path,
    noise: Draw,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    algorithm_type: str = "data_prediction",
    lower_order_final: bool = True,
) -> Solver:
    """SA-Solver, arXiv 2309.05019, algorithm 1, equations 14 and 17; tau is 1 for timesteps 200 to 800 and 0 elsewhere.

    The corrector keeps the predictor's noise, so the corrected and the yielded x differ only in the Adams part.
    """
    data = algorithm_type == "data_prediction"
    past: deque[tuple[float, X]] = deque(maxlen=max(predictor_order, corrector_order) + 1)
    before: tuple[Step, int, int] | None = None
    for left, (s, t) in zip(range(len(path), 0, -1), path, strict=True):
        x, m = yield x, s
        past.appendleft((s.lam, m if data else noise_of(x, m, s)))
        if before is not None:
            step, predicted, corrected = before
            x = x + step.adams([*past][:corrected]) - step.adams([*past][1 : predicted + 1])
        step = Step(s, t, data, 1.0 if 200 <= s.t <= 800 else 0.0)
        most = left if lower_order_final else predictor_order + corrector_order
        predicted = min(predictor_order, len(past), most)
        corrected = min(corrector_order, len(past) + 1, most + 1)
        x = step.kept * x + step.adams([*past][:predicted]) + step.std * noise()
        before = step, predicted, corrected
    return x


class Step(NamedTuple):
    """One step from s to t with stochasticity tau. `data`: the model's output is read as the clean image, not as noise."""

    s: Point
    t: Point
    data: bool
    tau: float

    @property
    def h(self) -> float:
        return self.t.lam - self.s.lam

    @property
    def kept(self) -> float:
        """The factor of x."""
        if self.data:
            return self.t.sigma / self.s.sigma * math.exp(-(self.tau**2) * self.h)
        return self.t.alpha / self.s.alpha

    @property
    def std(self) -> float:
        """The standard deviation of the added noise."""
        if self.data:
            return self.t.sigma * math.sqrt(-math.expm1(-2 * self.tau**2 * self.h))
        return self.tau * self.t.sigma * math.sqrt(math.expm1(2 * self.h))

    def adams(self, past: list[tuple[float, X]]) -> X:
        """Return the weighted integral, over the step, of the polynomial through `past`.

        With two clean estimates, the integral of the linear part is replaced by h²/2, as in DPM-Solver++(2M) (from the authors'
        code, not in the paper).
        """
        rate = 1 + self.tau**2 if self.data else -1.0
        nodes = [lam for lam, _ in past]
        weights = adams_weights(nodes, self.s.lam, self.t.lam, rate)
        if self.data and len(nodes) == 2:
            z = rate * self.h
            change = (self.h**2 / 2 - (z + math.expm1(-z)) / rate**2) / (nodes[0] - nodes[1])
            weights = [weights[0] + change, weights[1] - change]
        level = self.t.alpha if self.data else -self.t.sigma
        return (1 + self.tau**2) * level * sum(w * m for w, (_, m) in zip(weights, past, strict=True))


ROWS = (
    Sampler(
        name="sa_solver",
        solve=sa_solver,
        grid=partial(vp_grid, final="sigma_min", repeats_last=True, starts_trained=True),
        space="vp",
        order=2,
        takes_schedule=True,
        reads={
            **TRAINED,
            **LINSPACE,
            **SCHEDULED,
            **BY_NAME,
            **FLOW,
            **PIXEL,
            "predictor_order": 2,
            "corrector_order": 2,
            "algorithm_type": "data_prediction",
            "lower_order_final": True,
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
        },
        options=("predictor_order", "corrector_order", "algorithm_type", "lower_order_final"),
        choices={"algorithm_type": ("data_prediction", "noise_prediction")},
        diffusers="SASolverScheduler",
        about="Stochastic Adams predictor-corrector (arXiv 2309.05019)",
    ),
)
