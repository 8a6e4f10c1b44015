"""Compile a scheduler config and a number of steps to a Table, by running the sampler's code once on unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sdruntime.errors import SettingError, shown
from sdruntime.sampling.grids import Path
from sdruntime.sampling.noise_schedule import Point
from sdruntime.sampling.own_sigmas import own_path, own_steps
from sdruntime.sampling.prediction import clean_from_raw, input_scale
from sdruntime.sampling.samplers import Sampler, settled
from sdruntime.sampling.table import MOST_STEPS, Floats, Table


@np.errstate(over="ignore", divide="ignore", invalid="ignore")  # Table refuses numbers that are not finite
def compile_table(
    config: Mapping[str, Any],
    *,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    sampler: str | None = None,
    schedule: str | None = None,
    strength: float | None = None,
    part: tuple[float, float] | None = None,
    **options: Any,
) -> Table:
    """Return the table of a checkpoint's scheduler_config.json (parsed), or of another `sampler` with from_config semantics.

    `steps`: diffusers' num_inference_steps, from 1 to num_train_timesteps, at most MOST_STEPS. `sigmas`: noise levels in place
    of `steps`, see own_sigmas.py. `strength` in (0, 1]: image to image, with the same first step as diffusers. `options`: keys
    that the sampler reads (eta, solver_order, …). `part`: only that part of the trained timesteps, from 0 to 1: diffusers'
    denoising_start and denoising_end; a part that begins above 0 continues latents as they are. Raises SettingError, UnknownName.
    """
    chosen, settings = settled(config, sampler=sampler, schedule=schedule, **options)
    trained = settings["num_train_timesteps"]
    most = min(trained, MOST_STEPS)
    if sigmas is not None:
        steps = own_steps(chosen, settings, sigmas, steps)
        most = MOST_STEPS
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise SettingError(
            f"steps {shown(steps)}: expected a whole number from 1 to {most} "
            f"(num_train_timesteps {trained}, at most {MOST_STEPS})"
        )
    prediction = settings["prediction_type"]
    if prediction == "flow_prediction" and chosen.space != "flow" and not settings.get("use_flow_sigmas"):
        raise SettingError(
            f"prediction_type 'flow_prediction' with {chosen.name}: use a flow sampler, or set use_flow_sigmas true"
        )
    count, begin = steps, 0 if strength is None else first_step(steps, strength)

    def table(begin: int) -> tuple[Table, int]:
        """Return the table without the first `begin` steps, and the number of its steps."""
        path = chosen.grid(settings, count, begin) if sigmas is None else own_path(chosen, settings, sigmas, begin)
        first = path.start_level or path.pairs[0][0]
        compiled = traced(
            chosen,
            path,
            prediction=prediction,
            sigma_data=settings["sigma_data"] if chosen.space == "edm" else None,
            start=(0.0, path.start_sigma) if strength is None else (first.alpha, first.sigma),
            options={key: settings[key] for key in chosen.options},
        )
        return compiled, len(path)

    try:
        if part is None:
            return table(begin)[0]
        return _part(table, begin, part, trained, chosen)
    except (ArithmeticError, np.linalg.LinAlgError) as error:
        raise SettingError(
            f"{chosen.name} has no finite table for {steps} steps of this schedule ({error}): noise levels are equal or extreme"
        ) from error


def _part(
    compiled: Callable[[int], tuple[Table, int]], begin: int, part: tuple[float, float], trained: int, of: Sampler
) -> Table:
    """Return the calls whose timesteps lie in a part, as diffusers' SDXL pipelines cut them. Raises SettingError for none.

    A sampler with two calls a step goes on from the first call of a step, even if the part before has done that one.
    """
    if of.space == "edm":
        raise SettingError(f"a part of the steps of {of.name}: its timesteps are not those of the training")
    first, last = (round(trained - share * trained) for share in part)
    table, steps = compiled(begin)
    if part[0] > 0:
        after = int(np.count_nonzero(table.t < first))
        twice = of.diffusers != "PNDMScheduler" and steps > 1 and table.steps >= 2 * steps - 1
        after += twice and after % 2 == 0
        skipped = (table.steps - after) // (2 if twice else 1)
        table = compiled(begin + skipped)[0] if skipped < steps else table.first(0)
    return table.first(int(np.count_nonzero(table.t >= last)) if part[1] < 1 else table.steps)


def first_step(steps: int, strength: float) -> int:
    """Return how many steps image to image skips: it runs the last int(steps·strength), as in diffusers' img2img pipelines."""
    if not 0 < strength <= 1:
        raise SettingError(f"strength {strength!r}: expected a number above 0, up to 1")
    if int(steps * strength) < 1:
        raise SettingError(f"strength {strength:g} of {steps} steps leaves no steps to run: raise one of them")
    return steps - int(steps * strength)


def traced(
    sampler: Sampler,
    path: Path,
    *,
    prediction: str,
    start: tuple[float, float],
    options: Mapping[str, Any],
    sigma_data: float | None = None,
) -> Table:
    """Return the table of a sampler, by running its generator on unit vectors: a separate one for x[0], each m and each n.

    The vectors have room for two calls and two draws per pair of the path; no sampler makes more.
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
    clean: list[tuple[float, float]] = []
    totals: list[int] = []
    of_x: list[Floats] = []
    of_m: list[Floats] = []
    of_n: list[Floats] = []
    point: Point | None
    first, point = next(solver)
    churned = drawn
    while point is not None:
        call = len(points)
        p, q = clean_from_raw(prediction, point, sigma_data)
        points.append(point)
        clean.append((p, q))
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
        scale=np.array([input_scale(at, sampler.space, sigma_data) for at in points]),
        X=padded(of_x),
        M=padded(of_m),
        N=padded(of_n),
        draws=np.diff(totals, prepend=churned),
        churn=float(first[2 * room]) if churned else 0.0,
        levels=np.array([(at.alpha, at.sigma) for at in points]),
        clean=np.array(clean),
    )


def backwards(row: Floats) -> Floats:
    """Return a row reversed, newest column first, without the zeros of the oldest columns."""
    used = np.flatnonzero(row)
    reversed_row: Floats = row[int(used[0]) if len(used) else len(row) :][::-1].copy()  # a view would keep the whole vector
    return reversed_row


def padded(rows: list[Floats]) -> Floats:
    """Stack rows to a matrix, padded with zeros to the widest."""
    table = np.zeros((len(rows), max(len(row) for row in rows)))
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
