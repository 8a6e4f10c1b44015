"""Samplers of models in EDM's preconditioning (arXiv 2206.00364), such as Playground v2.5 and CosXL."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from sdruntime.errors import SettingError
from sdruntime.sampling.grids import Path, chained
from sdruntime.sampling.noise_schedule import EdmCurve, Settings, at_ratio, stored_levels
from sdruntime.sampling.samplers.dpm import MULTISTEP_OPTIONS, dpm_multistep
from sdruntime.sampling.samplers.kdiffusion.slopes import euler, euler_ancestral, heun
from sdruntime.sampling.samplers.keys import ANCESTRAL, CHURN, EDM, EDM_DPM
from sdruntime.sampling.samplers.sampler import Sampler
from sdruntime.sampling.schedules.ratios import RATIO_SCHEDULES, karras


def edm_grid(settings: Settings, steps: int, begin: int, *, repeats_last: bool = False) -> Path:
    """Return a Path from sigma_max to sigma_min by a formula, and on to 0; the timesteps are log(sigma) / 4.

    `repeats_last`: with final_sigmas_type "sigma_min", the last of a schedule's sigmas comes twice, also if it is the only one.
    """
    kind, high, low = settings["schedule"] or settings["sigma_schedule"], settings["sigma_max"], settings["sigma_min"]
    if kind not in RATIO_SCHEDULES:
        raise SettingError(f"schedule {kind!r}: a model in EDM's preconditioning takes {', '.join(RATIO_SCHEDULES)}")
    if low > high:
        raise SettingError(f"sigma_min {low:g} and sigma_max {high:g}: the schedule {kind!r} needs min <= max")
    sigmas = karras(high, low, steps, settings["rho"]) if kind == "karras" else RATIO_SCHEDULES[kind](high, low, steps)
    levels = stored_levels(sigmas.tolist())
    end = 0.0
    if settings["final_sigmas_type"] == "sigma_min":
        end = levels[-1] if repeats_last or steps > 1 else low
    curve = EdmCurve()
    points = [*map(curve.at_sigma, levels), at_ratio(0.0, end, "edm")]
    return chained(points, begin, math.hypot(1.0, high), curve)


def _row(name: str, **more: Any) -> Sampler:
    more = {"reads": EDM, "choices": {}, "grid": partial(edm_grid, repeats_last=True), **more}
    choices = {"prediction_type": ("epsilon", "v_prediction"), **more.pop("choices")}
    return Sampler(name=f"edm_{name}", space="edm", takes_schedule=True, choices=choices, **more)


def _multistep(name: str, solver_order: int, algorithm: str, order: int, about: str) -> Sampler:
    return _row(
        name,
        solve=dpm_multistep,
        grid=edm_grid,
        order=order,
        reads=EDM_DPM,
        options=MULTISTEP_OPTIONS,
        choices={"solver_type": ("midpoint", "heun"), "algorithm_type": ("dpmsolver++", "sde-dpmsolver++")},
        implied={"solver_order": solver_order, "algorithm_type": algorithm},
        diffusers="EDMDPMSolverMultistepScheduler",
        about=about,
    )


_CHURN: dict[str, Any] = {"reads": {**EDM, **CHURN}, "options": tuple(CHURN)}
_ANCESTRAL: dict[str, Any] = {"reads": {**EDM, **ANCESTRAL}, "options": tuple(ANCESTRAL)}
ROWS = (
    _row(
        "euler",
        solve=euler,
        order=1,
        diffusers="EDMEulerScheduler",
        about="Euler's method for EDM models (arXiv 2206.00364)",
        **_CHURN,
    ),
    _multistep("dpmpp_2m", 2, "dpmsolver++", 2, "DPM-Solver++(2M) for EDM models (arXiv 2211.01095)"),
    _multistep("dpmpp_3m", 3, "dpmsolver++", 2, "DPM-Solver++(3M) for EDM models (arXiv 2211.01095)"),
    _multistep("dpmpp_2m_sde", 2, "sde-dpmsolver++", 2, "Stochastic DPM-Solver++(2M) for EDM models (arXiv 2211.01095)"),
    _multistep("dpmpp_3m_sde", 3, "sde-dpmsolver++", 2, "Stochastic DPM-Solver++(3M) for EDM models (k-diffusion)"),
    _row(
        "euler_a",
        solve=euler_ancestral,
        order=1,
        about="Euler with ancestral noise for EDM models (k-diffusion)",
        **_ANCESTRAL,
    ),
    _row(
        "heun",
        solve=heun,
        order=2,
        about="Heun's method for EDM models, two model calls per step (arXiv 2206.00364)",
        **_CHURN,
    ),
)
