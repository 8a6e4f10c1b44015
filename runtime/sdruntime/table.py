"""A sampler as a table of coefficients.

    x[i+1] = Σj X[i,j]·x[i-j] + Σj M[i,j]·m[i-j] + Σj N[i,j]·n[D[i]-1-j]        m[i] = model(scale[i]·x[i], t[i])

with D[i] = draws[0] + … + draws[i]. A Table is what a sampler's generator says when it is run on unit vectors; the
prediction type and the scale of the model's input are compiled in, so m is the raw output of the UNet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import SettingError, shown
from sdruntime.path import Path
from sdruntime.predict import clean_from_raw, input_scale
from sdruntime.samplers import Sampler, settled
from sdruntime.schedule import Point

Floats = NDArray[np.float64]
FORMAT, REVISION = "sdruntime.table", 1
MOST_STEPS = 1000  # a table of them takes 4 MB at most and half a second; its cost grows with their square


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """C model calls: start (a, b), t [C] float32, scale [C], X [C, ·], M [C, ·], N [C, ·] float64, draws [C] int.

    x[0] = a·image latent + b·unit noise; a is 0 for text to image. Columns count backwards from the newest. Raises
    SettingError where shapes disagree, a number is not finite, or a row reaches behind the beginning.
    """

    start: tuple[float, float]
    t: NDArray[np.float32]
    scale: Floats
    X: Floats
    M: Floats
    N: Floats
    draws: NDArray[np.int64]

    def __post_init__(self) -> None:
        faults = []
        calls = len(self.t)
        if calls == 0:
            faults.append("no model call")
        if self.t.ndim != 1 or self.scale.shape != (calls,) or self.draws.shape != (calls,) or np.any(self.draws < 0):
            faults.append(f"t {self.t.shape}, scale {self.scale.shape} and draws {self.draws.shape} must be one each call")
        drawn = np.cumsum(self.draws)
        reach = {"X": np.arange(1, calls + 1), "M": np.arange(1, calls + 1), "N": drawn}
        for name in ("X", "M", "N"):
            rows: Floats = getattr(self, name)
            if rows.ndim != 2 or len(rows) != calls:
                faults.append(f"{name} has shape {rows.shape}, it must have {calls} rows")
            elif np.any(rows[np.arange(rows.shape[1]) >= reach[name][:, None]]):
                faults.append(f"{name} reaches behind the beginning")
        numbers = ("start", "t", "scale", "X", "M", "N")
        faults += [f"{name} holds a number that is not finite" for name in numbers if not np.isfinite(getattr(self, name)).all()]
        if faults:
            raise SettingError("not a table: " + "; ".join(faults))

    @property
    def steps(self) -> int:
        """Number of model calls."""
        return len(self.t)

    def unrolled(self) -> Floats:
        """Each x[i] over (x[0], all m, all n): [C + 1, 1 + C + draws]. By this form two tables are compared."""
        calls, total = self.steps, int(self.draws.sum())
        rows = np.zeros((calls + 1, 1 + calls + total))
        rows[0, 0] = 1.0
        drawn = np.cumsum(self.draws)
        for i in range(calls):
            for j in np.flatnonzero(self.X[i]):
                rows[i + 1] += self.X[i, j] * rows[i - j]
            for j in np.flatnonzero(self.M[i]):
                rows[i + 1, 1 + i - j] += self.M[i, j]
            for j in np.flatnonzero(self.N[i]):
                rows[i + 1, calls + drawn[i] - j] += self.N[i, j]
        return rows

    def to_json(self) -> str:
        """The fields as one JSON document, with the format's name and revision."""
        fields = {name: getattr(self, name).tolist() for name in ("t", "scale", "X", "M", "N", "draws")}
        return json.dumps({"format": FORMAT, "revision": REVISION, "start": self.start, **fields}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Raises SettingError for another format, another revision, missing or unknown fields."""
        try:
            data = json.loads(text)
            named = data.pop("format"), data.pop("revision")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingError(f"not a table in JSON: {error!r}") from error
        if named != (FORMAT, REVISION):
            raise SettingError(f"{named[0]!r} revision {named[1]!r}: this reader knows {FORMAT!r} revision {REVISION}")
        kinds = {"t": np.float32, "draws": np.int64, **dict.fromkeys(("scale", "X", "M", "N"), np.float64)}
        if set(data) != {"start", *kinds}:
            raise SettingError(f"a table has the fields start, {', '.join(kinds)}; this one has {', '.join(data)}")
        try:
            arrays = {name: np.array(data[name], kind) for name, kind in kinds.items()}
            for name in ("X", "M", "N"):
                arrays[name] = arrays[name].reshape(len(arrays["t"]), -1)
            return cls(start=(float(data["start"][0]), float(data["start"][1])), **arrays)
        except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
            raise SettingError(f"not a table in JSON: {error!r:.200}") from error


# ---- compiling -------------------------------------------------------------------------------------------------------


@np.errstate(over="ignore", divide="ignore", invalid="ignore")  # what is not finite is refused by Table
def compile_table(
    config: Mapping[str, Any],
    *,
    steps: int,
    sampler: str | None = None,
    schedule: str | None = None,
    strength: float | None = None,
    **options: Any,
) -> Table:
    """The table of a checkpoint's scheduler_config.json (parsed), or of another sampler with from_config semantics.

    `steps` is diffusers' num_inference_steps, 1 to num_train_timesteps or MOST_STEPS. `strength` in (0, 1] makes it image to
    image, with diffusers' choice of the first step. `options` are keys that the sampler reads (eta, solver_order, …).
    Raises SettingError, UnknownName.
    """
    found, settings = settled(config, sampler=sampler, schedule=schedule, **options)
    trained = settings["num_train_timesteps"]
    most = min(trained, MOST_STEPS)
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
        path = found.grid(settings, steps, begin)
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
    """Steps that image to image leaves out: it does the last int(steps·strength) (diffusers' img2img pipelines)."""
    if not 0 < strength <= 1:
        raise SettingError(f"strength {strength!r}: it must lie above 0 and up to 1")
    if int(steps * strength) < 1:
        raise SettingError(f"strength {strength:g} of {steps} steps leaves none to do: raise one of them")
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
