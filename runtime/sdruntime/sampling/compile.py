"""A scheduler's config and a number of steps -> the table of a sampler: the sampler's own code, run once on symbols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdruntime.errors import SettingError, shown
from sdruntime.sampling.grids import Path
from sdruntime.sampling.noise_schedule import Point
from sdruntime.sampling.own_sigmas import own_path, own_steps
from sdruntime.sampling.prediction import clean_from_raw, input_scale
from sdruntime.sampling.samplers import Sampler, settled
from sdruntime.sampling.table import MOST_STEPS, Floats, Table


@np.errstate(over="ignore", divide="ignore", invalid="ignore")  # what is not finite is refused by Table
def compile_table(
    config: Mapping[str, Any],
    *,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    strength: float | None = None,
    **options: Any,
) -> Table:
    """The table of a checkpoint's scheduler_config.json (parsed), or of another sampler with from_config semantics.

    `steps` is diffusers' num_inference_steps, 1 to num_train_timesteps or MOST_STEPS. `sigmas` are noise levels in place of it
    (own_sigmas.py says which samplers take them and how). `strength` in (0, 1] makes it image to
    image, with diffusers' choice of the first step. `options` are keys that the sampler reads (eta, solver_order, …).
    Raises SettingError, UnknownName.
    """
    found, settings = settled(config, sampler=sampler, schedule=schedule, **options)
    trained = settings["num_train_timesteps"]
    most = min(trained, MOST_STEPS)
    if sigmas is not None:
        steps = own_steps(found, settings, sigmas, steps)
        most = MOST_STEPS
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise SettingError(
            f"steps {shown(steps)}: it must be a whole number from 1 to {most} "
            f"(num_train_timesteps {trained}, and never more than {MOST_STEPS})"
        )
    prediction = settings["prediction_type"]
    if prediction == "flow_prediction" and found.space != "flow" and not settings.get("use_flow_sigmas"):
        raise SettingError(
            f"prediction_type 'flow_prediction' with {found.name}: it needs a flow sampler, or use_flow_sigmas true"
        )
    begin = 0 if strength is None else first_step(steps, strength)
    try:
        path = found.grid(settings, steps, begin) if sigmas is None else own_path(found, settings, sigmas, begin)
        first = path.start_level or path.pairs[0][0]
        return traced(
            found,
            path,
            prediction=prediction,
            start=(0.0, path.start_sigma) if strength is None else (first.alpha, first.sigma),
            options={key: settings[key] for key in found.options},
        )
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise SettingError(
            f"{found.name} has no finite table for {steps} steps of this schedule ({error}): noise levels are equal or extreme"
        ) from error


def first_step(steps: int, strength: float) -> int:
    """Steps that image to image omits: it does the last int(steps·strength) (diffusers' img2img pipelines)."""
    if not 0 < strength <= 1:
        raise SettingError(f"strength {strength!r}: it must lie above 0 and up to 1")
    if int(steps * strength) < 1:
        raise SettingError(f"strength {strength:g} of {steps} steps leaves no steps to run: raise one of them")
    return steps - int(steps * strength)


def traced(sampler: Sampler, path: Path, *, prediction: str, start: tuple[float, float], options: Mapping[str, Any]) -> Table:
    """The table that a sampler's generator says on unit vectors: a fresh one for every x, m and n.

    A vector has room for two calls and two draws a pair of the path; no sampler makes more.
    """
    room = 2 * len(path)
    drawn = 0

    def unit(place: int) -> Floats:
        vector = np.zeros(3 * room)
        vector[place] = 1.0
        return vector

    def noise() -> Floats:
        nonlocal drawn
        drawn += 1
        return unit(2 * room + drawn - 1)

    solver = sampler.solve(unit(0), path, noise, **options)
    points: list[Point] = []
    totals: list[int] = []
    of_x: list[Floats] = []
    of_m: list[Floats] = []
    of_n: list[Floats] = []
    point: Point | None
    _, point = next(solver)
    while point is not None:
        call = len(points)
        p, q = clean_from_raw(prediction, point)
        points.append(point)
        try:
            row, point = solver.send((unit(call), p * unit(call) + q * unit(room + call)))
        except StopIteration as end:
            row, point = end.value, None
        totals.append(drawn)
        of_x.append(backwards(row[: call + 1]))
        of_m.append(backwards(row[room : room + call + 1]))
        of_n.append(backwards(row[2 * room : 2 * room + drawn]))
    return Table(
        start=start,
        t=np.array([at.t for at in points], np.float32),
        scale=np.array([input_scale(at, sampler.space) for at in points]),
        X=padded(of_x),
        M=padded(of_m),
        N=padded(of_n),
        draws=np.diff(totals, prepend=0),
    )


def backwards(row: Floats) -> Floats:
    """A row read from its newest column, as far as it holds anything."""
    used = np.flatnonzero(row)
    held: Floats = row[int(used[0]) if len(used) else len(row) :][::-1].copy()  # a view would keep the whole vector
    return held


def padded(rows: list[Floats]) -> Floats:
    """Rows side by side, as wide as the widest."""
    table = np.zeros((len(rows), max(len(row) for row in rows)))
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
