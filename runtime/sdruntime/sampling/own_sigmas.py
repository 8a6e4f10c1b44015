"""A path through noise levels of the caller, in place of a number of steps: the argument `sigmas` of diffusers' pipelines.

Every sampler that takes a schedule takes sigmas. In diffusers only EulerDiscreteScheduler and FlowMatchEulerDiscreteScheduler do;
the other samplers follow their rules: sigmas are noise-to-signal ratios, the list includes the last level, and timesteps are
interpolated in log sigma. The list for a flow omits the 0 at the end and is shifted as the model's config says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sdruntime.errors import SettingError
from sdruntime.sampling.grids import Path, chained, flow_path, ve_start
from sdruntime.sampling.noise_schedule import Curve, EdmCurve, Settings, at_ratio, stored_levels
from sdruntime.sampling.samplers import SAMPLERS, Sampler


def own_steps(sampler: Sampler, settings: Settings, sigmas: Sequence[float], steps: int | None = None) -> int:
    """Return the number of steps through `sigmas`. `steps`: the expected number, or None.

    Raises SettingError if the sampler or its settings do not support sigmas, for too few sigmas, and if `steps` differs.
    """
    flow = _predicts_flow(sampler)
    if not sampler.takes_schedule:
        others = [name for name, row in SAMPLERS.items() if row.takes_schedule and _predicts_flow(row) == flow]
        raise SettingError(f"sigmas: {sampler.name} takes no noise levels; samplers that do: {', '.join(others)}")
    if settings.get("schedule") is not None:
        raise SettingError(f"sigmas with schedule {settings['schedule']!r}: give one of them")
    if settings.get("use_flow_sigmas"):
        raise SettingError("sigmas with use_flow_sigmas true: that grid takes only flow_shift; flow_euler takes sigmas")
    if flow and (outside := [sigma for sigma in sigmas if not 0 < sigma <= 1]):
        raise SettingError(f"sigmas: got {outside[0]:g}; {sampler.name} takes those above 0, up to 1; omit the 0 at the end")
    count = len(sigmas) if flow else len(sigmas) - 1
    if count < 1:
        raise SettingError(f"sigmas: got {len(sigmas)}; {sampler.name} needs at least 2, for a step leads from one to the next")
    if steps is not None and steps != count:
        raise SettingError(f"steps {steps}: the {len(sigmas)} sigmas make {count} steps of {sampler.name}; omit steps")
    return count


def own_path(sampler: Sampler, settings: Settings, sigmas: Sequence[float], begin: int) -> Path:
    """Return the Path through `sigmas`, without its first `begin` steps. Raises SettingError unless they decrease."""
    levels = np.array(stored_levels(sigmas))
    if sampler.space == "flow":
        return flow_path(settings, levels, begin)
    curve = EdmCurve() if sampler.space == "edm" else Curve(settings, sampler.space)
    points = [at_ratio(curve.time_of(sigma), sigma, sampler.space) for sigma in levels.tolist()]
    start = 1.0
    if sampler.space == "ve":
        start = ve_start(settings, levels[0])
    elif sampler.space == "edm":
        start = math.hypot(1.0, levels[0])
    return chained(points, begin, start, curve)


def _predicts_flow(sampler: Sampler) -> bool:
    return bool(sampler.reads["prediction_type"] == "flow_prediction")
