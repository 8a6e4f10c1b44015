"""Grids: functions that select a Path of noise levels from a Curve, as scheduler_config.json says.

A grid is a function `(settings, steps, begin) -> Path`. `settings` holds every key that the sampler reads; `begin` is the number
of steps that image to image skips. If a paper and diffusers differ, grids follow diffusers, so that a checkpoint runs at the
same timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.noise_schedule import Array, Curve, FlowCurve, Point, Settings, at_ratio, shifted
from sdruntime.sampling.schedules import SCHEDULES, scheduled
from sdruntime.sampling.schedules.ratios import RATIO_SCHEDULES

FAMILY = "_family"  # the key under which a pipeline adds the model's family to the scheduler config


class Levels(Protocol):
    """Noise levels between those of a path, for samplers that evaluate the model there."""

    def at_sigma(self, sigma: float) -> Point: ...

    def at_time(self, t: int) -> Point: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """The steps of a sampler: pairs (s, t), each a step from Point s to Point t.

    Usually each t is the next s; the DDIM and PNDM grids have gaps, as in diffusers. `total`: number of pairs before image to
    image skipped some. `start_sigma`: factor of the initial noise, text to image. `start_level`: the level to which an image is
    noised, if it is not that of the first pair.
    """

    pairs: tuple[tuple[Point, Point], ...]
    total: int
    start_sigma: float
    levels: Levels
    start_level: Point | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[tuple[Point, Point]]:
        return iter(self.pairs)


def chained(points: list[Point], begin: int, start_sigma: float, levels: Levels) -> Path:
    """Return the Path through consecutive points. Raises SettingError unless sigma decreases in each step except the last."""
    pairs = tuple(pairwise(points))
    for s, t in pairs[:-1]:
        if t.sigma >= s.sigma:
            raise SettingError(f"{len(pairs)} steps visit timestep {t.t:g} twice: use fewer steps")
    return Path(pairs=pairs[begin:], total=len(pairs), start_sigma=start_sigma, levels=levels)


def spaced(spacing: str, steps: int, trained: int, offset: int, *, last: int | None = None, extra: int = 0) -> Array:
    """Return decreasing timesteps [steps] by one of the three spacings of arXiv 2305.08891, table 2.

    `extra` = 1 spaces one more timestep and drops the lowest, which is how the DPM-Solver family omits timestep 0. `last`: the
    number of timesteps to use, None for all (lambda_min_clipped lowers it). Raises SettingError if `offset` leads beyond the
    trained timesteps.
    """
    last = trained if last is None else last
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + extra)[::-1][:steps]
    if spacing == "leading":
        times = np.arange(steps + extra, dtype=float)[::-1][:steps] * (last // (steps + extra)) + offset
        if times[0] > trained - 1:
            raise SettingError(
                f"steps_offset {offset} with {steps} steps begins at timestep {times[0]:g}, "
                f"but the model was trained on 0 to {trained - 1}: lower one of them"
            )
        return times
    if spacing == "trailing":
        return np.asarray(np.arange(last, 0, -trained / steps)[:steps].round() - 1)
    raise UnknownName("timestep_spacing", str(spacing), ["linspace", "leading", "trailing"])


def chosen_schedule(settings: Settings) -> str | None:
    """Return the schedule in place of timestep_spacing: the caller's `schedule`, else the use_* key that is true, else None."""
    keys = {
        "use_karras_sigmas": "karras",
        "use_exponential_sigmas": "exponential",
        "use_beta_sigmas": "beta",
        "use_lu_lambdas": "lu",
        "use_flow_sigmas": "flow",
    }
    written = [key for key in keys if settings.get(key)]
    if "use_lu_lambdas" in written and len(written) == 2 and "use_flow_sigmas" not in written:
        written.remove("use_lu_lambdas" if "use_karras_sigmas" in written else written[0])  # diffusers' order of precedence
    requested = settings.get("schedule")
    if requested is not None and requested not in SCHEDULES:
        raise UnknownName("schedule", str(requested), SCHEDULES)
    if requested is not None and "use_flow_sigmas" in written:
        raise SettingError(f"schedule {requested!r} with use_flow_sigmas true: a flow grid takes only flow_shift")
    if requested is None and len(written) > 1:
        raise SettingError(f"{' and '.join(written)} are true together: set only one of them")
    return requested or next((keys[key] for key in written), None)


# ---- grids in trained timesteps --------------------------------------------------------------------------------------

CLEAN = Point(-1.0, 1.0, 0.0)


def ddim_grid(settings: Settings, steps: int, begin: int) -> Path:
    """Return trained timesteps t, each with a step to t - num_train_timesteps // steps (DDIM, arXiv 2010.02502)."""
    curve, times = _trained_times(settings, steps)
    stride = settings["num_train_timesteps"] // steps
    end = CLEAN if settings["set_alpha_to_one"] else curve.at_time(0)
    pairs = tuple((curve.at_time(t), curve.at_time(t - stride) if t >= stride else end) for t in times)
    return Path(pairs=pairs[begin:], total=steps, start_sigma=1.0, levels=curve)


def ddpm_grid(settings: Settings, steps: int, begin: int) -> Path:
    """Return trained timesteps, each with a step to the next, the last to the clean image."""
    curve, times = _trained_times(settings, steps)
    return chained([*map(curve.at_time, times), CLEAN], begin, 1.0, curve)


def pndm_grid(settings: Settings, steps: int, begin: int) -> Path:
    """Return the model calls of PNDM (arXiv 2202.09778) as pairs.

    With skip_prk_steps the second pair repeats the first step (a pseudo improved Euler step). Without it, each of the first three
    steps is four pairs, those of the Runge-Kutta method. Image to image skips calls as diffusers does, which also takes the
    second remaining call for the repetition.
    """
    curve, times = _trained_times(settings, steps)
    stride = settings["num_train_timesteps"] // steps
    end = CLEAN if settings["set_alpha_to_one"] else curve.at_time(0)

    def at(t: int) -> Point:
        return curve.at_time(t) if t >= 0 else end

    if settings["skip_prk_steps"]:
        calls = [*times[:2], *times[1:]][begin:]
        pairs = [(at(t), at(t - stride)) for t in calls]
        if len(calls) > 1:
            pairs[1] = (at(calls[1] + stride), at(calls[1]))
        return Path(pairs=tuple(pairs), total=steps + 1, start_sigma=1.0, levels=curve)
    times = times[begin:]
    if len(times) < 4:
        raise SettingError(f"{len(times)} steps: the Runge-Kutta start of pndm needs 4; use more steps, or skip_prk_steps true")
    pairs = []
    for s, t in pairwise(times[:4]):
        pairs += [(at(s), at(s - stride // 2)), (at(s), at(t + stride // 2)), (at(s), at(t)), (at(s), at(t))]
    pairs += [(at(t), at(t - stride)) for t in times[3:]]
    return Path(pairs=tuple(pairs), total=len(pairs), start_sigma=1.0, levels=curve)


def _trained_times(settings: Settings, steps: int) -> tuple[Curve, list[int]]:
    times = spaced(settings["timestep_spacing"], steps, settings["num_train_timesteps"], settings["steps_offset"])
    return Curve(settings, "vp"), [int(t) for t in times.round()]


def consistency_grid(settings: Settings, steps: int, begin: int, *, to_clean: bool) -> Path:
    """Return a subset of the timesteps that a consistency model was distilled on (LCM, arXiv 2310.04378).

    `to_clean`: the last step leads to the clean image, not to timestep 0.
    """
    trained, original = settings["num_train_timesteps"], settings["original_inference_steps"]
    if not 1 <= original <= trained:
        raise SettingError(f"original_inference_steps {original}: expected 1 to num_train_timesteps {trained}")
    if steps > original:
        raise SettingError(f"{steps} steps: at most {original}, as the model was distilled on (original_inference_steps)")
    distilled = np.arange(original, 0, -1) * (trained // original) - 1
    times = distilled[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]
    curve = Curve(settings, "vp")
    return chained([*(curve.at_time(int(t)) for t in times), CLEAN if to_clean else curve.at_time(0)], begin, 1.0, curve)


# ---- grids in noise-to-signal ratios ---------------------------------------------------------------------------------


def ve_grid(
    settings: Settings,
    steps: int,
    begin: int,
    *,
    whole_karras_times: bool = False,
    karras_bounds: bool = True,
) -> Path:
    """Return k-diffusion's grid: fractional timesteps with interpolated sigmas, or a schedule from the first to the last sigma.

    `whole_karras_times`: round the timesteps of the "karras" schedule. `karras_bounds` false: the "karras" schedule ignores
    sigma_min and sigma_max.
    """
    curve = Curve(settings, "ve")
    trained, spacing = settings["num_train_timesteps"], settings["timestep_spacing"]
    times = spaced(spacing, steps, trained, settings["steps_offset"]).astype(np.float32)  # float32, as in diffusers
    sigmas = curve.ratio_at(times)
    kind = chosen_schedule(settings)
    if kind is not None:
        bounded = karras_bounds or kind != "karras"
        bounds = sigma_bounds(settings, sigmas[0], sigmas[-1], bounded)
        times, sigmas = scheduled(kind, steps, curve, *bounds, settings.get(FAMILY))
        if kind == "karras" and whole_karras_times:
            times = times.round()
    sigmas = sigmas.astype(np.float32)  # float32, as in diffusers
    start = ve_start(settings, sigmas.max())
    points = [at_ratio(t, sigma, "ve") for t, sigma in zip(times.tolist(), sigmas.tolist(), strict=True)]
    return chained([*points, at_ratio(0.0, final_sigma(settings, "zero", curve), "ve")], begin, start, curve)


def ve_start(settings: Settings, top: float) -> float:
    """Return the factor of the initial noise for a path that begins at sigma `top`."""
    return float(top) if settings["timestep_spacing"] in ("linspace", "trailing") else math.hypot(1.0, top)


def vp_grid(
    settings: Settings,
    steps: int,
    begin: int,
    *,
    final: str = "zero",
    repeats_last: bool = False,
    whole_cosine_times: bool = True,
    flow_from_one: bool = False,
    starts_trained: bool = False,
) -> Path:
    """Return DPM-Solver's grid: steps + 1 whole timesteps without the lowest, or a schedule over the whole curve.

    `final`: the final_sigmas_type of samplers that do not read that key. `repeats_last`: with "sigma_min", a schedule's last
    sigma comes twice; otherwise the last sigma is the lowest trained one, even if the schedule ends below it.
    `whole_cosine_times`: round "karras" and "lu" timesteps also for squaredcos_cap_v2 betas. `flow_from_one`: flow sigmas from 1
    to 1 / num_train_timesteps, in place of 1 - 1 / num_train_timesteps to 0. `starts_trained`: an image is noised to the trained
    level of the first timestep, not to the first sigma.
    """
    path = _vp_path(settings, steps, begin, final, repeats_last, whole_cosine_times, flow_from_one)
    if not starts_trained:
        return path
    return replace(path, start_level=Curve(settings, "vp").at_time(int(path.pairs[0][0].t)))


def _vp_path(
    settings: Settings, steps: int, begin: int, final: str, repeats_last: bool, whole_cosine_times: bool, flow_from_one: bool
) -> Path:
    trained, kind = settings["num_train_timesteps"], chosen_schedule(settings)
    if kind == "flow":
        sigmas = np.linspace(1, 1 / trained, steps + 1)  # the expression of diffusers: rounding decides whole timesteps
        return _flow_path(settings, sigmas[:-1] if flow_from_one else (1 - sigmas)[::-1][:-1], begin, final, repeats_last)
    curve = Curve(settings, "vp")
    if kind is None:
        last = int(np.count_nonzero(-curve.log_sigmas >= settings.get("lambda_min_clipped", -math.inf)))
        spacing, offset = settings.get("timestep_spacing", "linspace"), settings.get("steps_offset", 0)
        times = spaced(spacing, steps, trained, offset, last=last, extra=1).round()
        sigmas = curve.ratio_at(times)
    else:
        bounds = sigma_bounds(settings, curve.sigmas[-1], curve.sigmas[0], kind != "lu")
        times, sigmas = scheduled(kind, steps, curve, *bounds, settings.get(FAMILY))
        if kind in ("karras", "lu") and (whole_cosine_times or settings["beta_schedule"] != "squaredcos_cap_v2"):
            times = times.round()
        if kind in RATIO_SCHEDULES and kind != "kl_optimal":  # those that diffusers has
            times = np.trunc(times)
    sigmas = sigmas.astype(np.float32)  # float32, as in diffusers
    points = [at_ratio(t, sigma, "vp") for t, sigma in zip(times.tolist(), sigmas.tolist(), strict=True)]
    end = final_sigma(settings, final, curve)
    if end > 0 and repeats_last and kind is not None:
        end = float(sigmas[-1])
    return chained([*points, at_ratio(0.0, end, "vp")], begin, 1.0, curve)


def sigma_bounds(settings: Settings, high: float, low: float, bounded: bool) -> tuple[float, float]:
    """Return a schedule's largest and smallest sigma: `high` and `low`, or the config's sigma_max and sigma_min if `bounded`."""
    if not bounded:
        return float(high), float(low)
    sigma_max, sigma_min = settings.get("sigma_max"), settings.get("sigma_min")
    return float(high if sigma_max is None else sigma_max), float(low if sigma_min is None else sigma_min)


def final_sigma(settings: Settings, default: str, curve: Curve) -> float:
    """Return the sigma at the end of a path: 0, or the lowest trained one for final_sigmas_type "sigma_min"."""
    return 0.0 if settings.get("final_sigmas_type", default) == "zero" else float(curve.sigmas[0])


# ---- grids of flow models --------------------------------------------------------------------------------------------


def _flow_path(settings: Settings, sigmas: Array, begin: int, final: str, repeats_last: bool) -> Path:
    trained = settings["num_train_timesteps"]
    sigmas = ended_at(shifted(sigmas, settings["flow_shift"]), settings.get("shift_terminal"))
    sigmas[0] = min(sigmas[0], 1 - 1e-6)  # log(alpha / sigma) must be finite
    times = np.floor(sigmas * trained).tolist()
    points = [at_ratio(t, sigma, "flow") for t, sigma in zip(times, sigmas.astype(np.float32).tolist(), strict=True)]
    end = 0.0
    if settings.get("final_sigmas_type", final) == "sigma_min":  # of the betas, as in diffusers, though a flow has none
        end = points[-1].sigma if repeats_last else float(Curve(settings, "vp").sigmas[0])
        if end >= 1:
            raise SettingError(f"final_sigmas_type 'sigma_min': the lowest trained sigma is {end:g}; a flow's must be below 1")
    return chained([*points, at_ratio(0.0, end, "flow")], begin, 1.0, FlowCurve(trained))


def flow_grid(settings: Settings, steps: int, begin: int) -> Path:
    """Return diffusers' flow-matching grid: evenly from 1 to the smallest trained sigma, which is thus shifted twice."""
    trained, shift = settings["num_train_timesteps"], settings["shift"]
    return flow_path(settings, np.linspace(1, float(shifted(np.asarray(1 / trained), shift)), steps), begin)


def flow_path(settings: Settings, sigmas: Array, begin: int) -> Path:
    """Return the Path through shifted flow sigmas to 0, or through a schedule between the first and the last of them."""
    trained, kind = settings["num_train_timesteps"], chosen_schedule(settings)
    sigmas = ended_at(shifted(sigmas, settings["shift"]), settings.get("shift_terminal"))
    if kind is not None and kind in RATIO_SCHEDULES:
        sigmas = RATIO_SCHEDULES[kind](*sigma_bounds(settings, sigmas[0], sigmas[-1], True), len(sigmas))
    elif kind is not None:
        raise SettingError(f"schedule {kind!r}: a flow grid takes {', '.join(RATIO_SCHEDULES)}")
    points = [at_ratio(sigma * trained, sigma, "flow") for sigma in sigmas.tolist()]
    return chained([*points, at_ratio(0.0, 0.0, "flow")], begin, 1.0, FlowCurve(trained))


def ended_at(sigmas: Array, terminal: float | None) -> Array:
    """Stretch flow sigmas so that the last is `terminal` (shift_terminal, LTX-Video)."""
    if not terminal:
        return sigmas
    if len(sigmas) == 1:
        raise SettingError(
            f"shift_terminal {terminal:g} with 1 step: the first sigma cannot also be the last; use at least 2 steps"
        )
    return np.asarray(1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal)))
