"""The way through the noise: a Path of steps from Point to Point, cut from a Curve as scheduler_config.json says.

A grid is a function `(settings, steps, begin) -> Path`. `settings` holds every key that the sampler reads; `begin`
counts the steps that an image-to-image start omits. Where papers differ from diffusers, grids follow diffusers:
the same checkpoint shall be asked about the same timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np

from sdruntime.errors import SettingError, UnknownName
from sdruntime.sampling.noise_schedule import RATIO_SCHEDULES, Array, Curve, FlowCurve, Point, Settings, at_ratio, shifted

TIME_SCHEDULES = ("simple", "sgm_uniform", "normal")
SCHEDULES = (*RATIO_SCHEDULES, *TIME_SCHEDULES)


class Levels(Protocol):
    """What a sampler may ask for beside its steps: a noise level between two of them."""

    def at_sigma(self, sigma: float) -> Point: ...

    def at_time(self, t: int) -> Point: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """What a sampler walks along: pairs (s, t), each a step from Point s to Point t.

    Mostly each t is the next s; diffusers' DDIM and PNDM grids leave gaps, and are followed in that. `total` counts the
    pairs before an image-to-image start cut some off; `start_sigma` is the factor of the initial noise, text to image.
    `start_level` is the level to which an image is noised, if it is not that of the first pair.
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
    """A Path through consecutive points. Raises SettingError where a step but the last would stand still."""
    pairs = tuple(pairwise(points))
    for s, t in pairs[:-1]:
        if t.sigma >= s.sigma:
            raise SettingError(f"{len(pairs)} steps visit timestep {t.t:g} twice: take fewer steps")
    return Path(pairs=pairs[begin:], total=len(pairs), start_sigma=start_sigma, levels=levels)


def spaced(spacing: str, steps: int, trained: int, offset: int, *, last: int | None = None, extra: int = 0) -> Array:
    """Timesteps, falling, by the three spacings of arXiv 2305.08891, table 2.

    `extra` = 1 makes one more and drops the lowest, which is how the DPM-Solver family omits timestep 0. `last`
    is where the curve is cut (lambda_min_clipped). Raises SettingError where `offset` leads beyond the trained ones.
    """
    last = trained if last is None else last
    if spacing == "linspace":
        return np.linspace(0, last - 1, steps + extra)[::-1][:steps]
    if spacing == "leading":
        times = np.arange(steps + extra, dtype=float)[::-1][:steps] * (last // (steps + extra)) + offset
        if times[0] > trained - 1:
            raise SettingError(
                f"steps_offset {offset} with {steps} steps begins at timestep {times[0]:g}, "
                f"the model was trained on 0 to {trained - 1}: lower one of them"
            )
        return times
    if spacing == "trailing":
        return np.asarray(np.arange(last, 0, -trained / steps)[:steps].round() - 1)
    raise UnknownName("timestep_spacing", str(spacing), ["linspace", "leading", "trailing"])


def chosen_schedule(settings: Settings) -> str | None:
    """What replaces the plain spacing: the caller's `schedule`, or else the one use_* key that is true."""
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
    asked = settings.get("schedule")
    if asked is not None and asked not in SCHEDULES:
        raise UnknownName("schedule", str(asked), SCHEDULES)
    if asked is not None and "use_flow_sigmas" in written:
        raise SettingError(f"schedule {asked!r} with use_flow_sigmas true: a flow grid takes flow_shift only")
    if asked is None and len(written) > 1:
        raise SettingError(f"{' and '.join(written)} are true together: a path has one schedule")
    return asked or next((keys[key] for key in written), None)


# ---- grids in trained timesteps --------------------------------------------------------------------------------------

CLEAN = Point(-1.0, 1.0, 0.0)


def ddim_grid(settings: Settings, steps: int, begin: int) -> Path:
    """Trained timesteps t, each with a step to t - num_train_timesteps // steps (DDIM, arXiv 2010.02502)."""
    curve, times = _trained_times(settings, steps)
    stride = settings["num_train_timesteps"] // steps
    end = CLEAN if settings["set_alpha_to_one"] else curve.at_time(0)
    pairs = tuple((curve.at_time(t), curve.at_time(t - stride) if t >= stride else end) for t in times)
    return Path(pairs=pairs[begin:], total=steps, start_sigma=1.0, levels=curve)


def ddpm_grid(settings: Settings, steps: int, begin: int) -> Path:
    """Trained timesteps, each with a step to the next, the last one to clean."""
    curve, times = _trained_times(settings, steps)
    return chained([*map(curve.at_time, times), CLEAN], begin, 1.0, curve)


def pndm_grid(settings: Settings, steps: int, begin: int) -> Path:
    """The model calls of PNDM (arXiv 2202.09778) with the steps that they belong to.

    With skip_prk_steps the second pair repeats the first step (a pseudo improved Euler step); without, each of the
    first three steps is four pairs, those of the Runge-Kutta method. An image-to-image start cuts the list of calls
    where diffusers cuts it, so that there, too, the second call is taken for the repetition.
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
        raise SettingError(f"{len(times)} steps: the Runge-Kutta start of pndm needs 4, or skip_prk_steps true")
    pairs = []
    for s, t in pairwise(times[:4]):
        pairs += [(at(s), at(s - stride // 2)), (at(s), at(t + stride // 2)), (at(s), at(t)), (at(s), at(t))]
    pairs += [(at(t), at(t - stride)) for t in times[3:]]
    return Path(pairs=tuple(pairs), total=len(pairs), start_sigma=1.0, levels=curve)


def _trained_times(settings: Settings, steps: int) -> tuple[Curve, list[int]]:
    times = spaced(settings["timestep_spacing"], steps, settings["num_train_timesteps"], settings["steps_offset"])
    return Curve(settings, "vp"), [int(t) for t in times.round()]


def consistency_grid(settings: Settings, steps: int, begin: int, *, to_clean: bool) -> Path:
    """A subset of the timesteps that a consistency model was distilled on (LCM, arXiv 2310.04378)."""
    trained, original = settings["num_train_timesteps"], settings["original_inference_steps"]
    if not 1 <= original <= trained:
        raise SettingError(f"original_inference_steps {original} must lie between 1 and num_train_timesteps {trained}")
    if steps > original:
        raise SettingError(f"{steps} steps: a model distilled on original_inference_steps {original} takes no more")
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
    """k-diffusion's grid: fractional timesteps, sigmas interpolated, or a schedule between the first and last of them.

    `karras_bounds` false: the "karras" schedule of this class ignores sigma_min and sigma_max, which others read.
    """
    curve = Curve(settings, "ve")
    trained, spacing = settings["num_train_timesteps"], settings["timestep_spacing"]
    times = spaced(spacing, steps, trained, settings["steps_offset"]).astype(np.float32)  # as diffusers cuts them
    sigmas = curve.ratio_at(times)
    kind = chosen_schedule(settings)
    if kind is not None:
        bounded = karras_bounds or kind != "karras"
        times, sigmas = scheduled(kind, steps, curve, *sigma_bounds(settings, sigmas[0], sigmas[-1], bounded))
        if kind == "karras" and whole_karras_times:
            times = times.round()
    sigmas = sigmas.astype(np.float32)  # as diffusers keeps them
    start = ve_start(settings, sigmas.max())
    points = [at_ratio(t, sigma, "ve") for t, sigma in zip(times.tolist(), sigmas.tolist(), strict=True)]
    return chained([*points, at_ratio(0.0, final_sigma(settings, "zero", curve), "ve")], begin, start, curve)


def ve_start(settings: Settings, top: float) -> float:
    """The factor of the initial noise of a path from sigma `top` down."""
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
    """DPM-Solver's grid: whole timesteps, of which one more is cut and the lowest omitted, or a schedule over all.

    `final` is the final_sigmas_type of the samplers that do not read that key. With `repeats_last` "sigma_min" means that
    a schedule's last sigma comes twice, otherwise it is the lowest trained sigma, even where a schedule ends below it.
    `flow_from_one`: flow sigmas from 1 to 1 / num_train_timesteps in place of 1 - 1 / num_train_timesteps to 0.
    `starts_trained`: an image is noised to the trained level of the first timestep, not to the first sigma.
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
        sigmas = np.linspace(1, 1 / trained, steps + 1)  # written as in diffusers: timesteps are cut to whole ones
        return _flow_path(settings, sigmas[:-1] if flow_from_one else (1 - sigmas)[::-1][:-1], begin, final, repeats_last)
    curve = Curve(settings, "vp")
    if kind is None:
        last = int(np.count_nonzero(-curve.log_sigmas >= settings.get("lambda_min_clipped", -math.inf)))
        spacing, offset = settings.get("timestep_spacing", "linspace"), settings.get("steps_offset", 0)
        times = spaced(spacing, steps, trained, offset, last=last, extra=1).round()
        sigmas = curve.ratio_at(times)
    else:
        times, sigmas = scheduled(kind, steps, curve, *sigma_bounds(settings, curve.sigmas[-1], curve.sigmas[0], kind != "lu"))
        if kind in ("karras", "lu") and (whole_cosine_times or settings["beta_schedule"] != "squaredcos_cap_v2"):
            times = times.round()
        if kind in RATIO_SCHEDULES:
            times = np.trunc(times)
    sigmas = sigmas.astype(np.float32)  # as diffusers keeps them
    points = [at_ratio(t, sigma, "vp") for t, sigma in zip(times.tolist(), sigmas.tolist(), strict=True)]
    end = final_sigma(settings, final, curve)
    if end > 0 and repeats_last and kind is not None:
        end = float(sigmas[-1])
    return chained([*points, at_ratio(0.0, end, "vp")], begin, 1.0, curve)


def sigma_bounds(settings: Settings, high: float, low: float, bounded: bool) -> tuple[float, float]:
    """The largest and smallest sigma of a schedule: sigma_max and sigma_min of the config where they count."""
    if not bounded:
        return float(high), float(low)
    given_high, given_low = settings.get("sigma_max"), settings.get("sigma_min")
    return float(high if given_high is None else given_high), float(low if given_low is None else given_low)


def scheduled(kind: str, steps: int, curve: Curve, high: float, low: float) -> tuple[Array, Array]:
    """Timesteps and sigmas of a named schedule between two sigmas; the time schedules take the whole curve."""
    if low <= 0 or (low > high and steps > 1):
        raise SettingError(f"sigma_min {low:g} and sigma_max {high:g}: the schedule {kind!r} needs 0 < min <= max")
    if kind in RATIO_SCHEDULES:
        sigmas = RATIO_SCHEDULES[kind](high, low, steps)
        if kind == "lu":  # the same from float32 logarithms: diffusers cuts its timesteps to whole ones
            first, last = float(curve.log_sigmas[-1]), float(curve.log_sigmas[0])
            sigmas = np.exp(first + np.linspace(0, 1, steps) * (last - first))
        return np.array([curve.time_of(sigma) for sigma in sigmas.tolist()]), sigmas
    trained = len(curve.sigmas)
    if kind == "simple":  # every n-th trained level, as ComfyUI and A1111 name it
        times = trained - 1 - np.floor(np.arange(steps) * (trained / steps))
    elif kind == "sgm_uniform":  # evenly in t, the end omitted
        times = np.linspace(trained - 1, 0, steps + 1)[:-1]
    else:  # normal: evenly in t, timestep 0 included (k-diffusion's get_sigmas)
        times = np.linspace(trained - 1, 0, steps)
    return times, np.exp(np.interp(times, np.arange(trained), curve.log_sigmas))


def final_sigma(settings: Settings, default: str, curve: Curve) -> float:
    return 0.0 if settings.get("final_sigmas_type", default) == "zero" else float(curve.sigmas[0])


# ---- grids of flow models --------------------------------------------------------------------------------------------


def _flow_path(settings: Settings, sigmas: Array, begin: int, final: str, repeats_last: bool) -> Path:
    trained = settings["num_train_timesteps"]
    sigmas = ended_at(shifted(sigmas, settings["flow_shift"]), settings.get("shift_terminal"))
    sigmas[0] = min(sigmas[0], 1 - 1e-6)  # log(alpha / sigma) must be finite
    times = np.floor(sigmas * trained).tolist()
    points = [at_ratio(t, sigma, "flow") for t, sigma in zip(times, sigmas.astype(np.float32).tolist(), strict=True)]
    end = 0.0
    if settings.get("final_sigmas_type", final) == "sigma_min":  # that of the betas, which a flow does not have, in diffusers
        end = points[-1].sigma if repeats_last else float(Curve(settings, "vp").sigmas[0])
        if end >= 1:
            raise SettingError(f"final_sigmas_type 'sigma_min': the lowest trained sigma is {end:g}, but a flow's are below 1")
    return chained([*points, at_ratio(0.0, end, "flow")], begin, 1.0, FlowCurve(trained))


def flow_grid(settings: Settings, steps: int, begin: int) -> Path:
    """diffusers' flow-matching grid: evenly from 1 to the smallest trained sigma, which is shifted a second time."""
    trained, shift = settings["num_train_timesteps"], settings["shift"]
    return flow_path(settings, np.linspace(1, float(shifted(np.asarray(1 / trained), shift)), steps), begin)


def flow_path(settings: Settings, sigmas: Array, begin: int) -> Path:
    """From sigma to sigma and at last to 0, once they are shifted, or replaced by a schedule between the first and the last."""
    trained, kind = settings["num_train_timesteps"], chosen_schedule(settings)
    sigmas = ended_at(shifted(sigmas, settings["shift"]), settings.get("shift_terminal"))
    if kind is not None and kind in RATIO_SCHEDULES:
        sigmas = RATIO_SCHEDULES[kind](*sigma_bounds(settings, sigmas[0], sigmas[-1], True), len(sigmas))
    elif kind is not None:
        raise SettingError(f"schedule {kind!r}: a flow grid takes {', '.join(RATIO_SCHEDULES)}")
    points = [at_ratio(sigma * trained, sigma, "flow") for sigma in sigmas.tolist()]
    return chained([*points, at_ratio(0.0, 0.0, "flow")], begin, 1.0, FlowCurve(trained))


def ended_at(sigmas: Array, terminal: float | None) -> Array:
    """Flow sigmas stretched so that the last is `terminal` (shift_terminal, LTX-Video)."""
    if not terminal:
        return sigmas
    if len(sigmas) == 1:
        raise SettingError(f"shift_terminal {terminal:g} with 1 step: the first sigma cannot be the last, take 2 steps")
    return np.asarray(1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - terminal)))
