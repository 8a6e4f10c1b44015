"""A sampler as a table of coefficients.

    x[i+1] = Σj X[i,j]·x[i-j] + Σj M[i,j]·m[i-j] + Σj N[i,j]·n[D[i]-1-j]        m[i] = model(scale[i]·x[i], t[i])
    estimate of the clean image at step i = clean[i,0]·x[i] + clean[i,1]·m[i]

with D[i] = draws[0] + … + draws[i], the number of noise draws so far. A Table is compiled by running a sampler's generator on
unit vectors. The prediction type and the scale of the model's input are compiled in, so m is the raw output of the UNet.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import SettingError

Floats = NDArray[np.float64]
FORMAT, REVISION = "sdruntime.sampling.table", 3
_ARRAYS = ("t", "scale", "X", "M", "N", "draws", "levels", "clean")
MOST_STEPS = 1000  # a table of 1000 takes at most 4 MB and half a second to compile; both grow with the square of the steps


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """The coefficients of C model calls: t [C] float32, scale [C], X [C, ·], M [C, ·], N [C, ·] float64, draws [C] int.

    `start` (a, b): x[0] = a·image latent + b·unit noise, a = 0 for text to image. `churn`: the factor of one more draw of unit
    noise, which is added to x[0] before the first call; 0 draws none. `levels` [C, 2] float64, (alpha, sigma): the noise level
    of each x[i], alpha·image latent + sigma·unit noise. `clean` [C, 2] float64: the estimate of the image latent that a preview
    shows. Columns count backwards from the newest. The arrays are read-only. Raises SettingError if shapes disagree, a number is
    not finite, or a row refers to x, m or n before the first.
    """

    start: tuple[float, float]
    t: NDArray[np.float32]
    scale: Floats
    X: Floats
    M: Floats
    N: Floats
    draws: NDArray[np.int64]
    levels: Floats
    clean: Floats
    churn: float = 0.0

    def __post_init__(self) -> None:
        faults = []
        calls = len(self.t)
        if calls == 0:
            faults.append("no model call")
        if self.t.ndim != 1 or self.scale.shape != (calls,) or self.draws.shape != (calls,) or np.any(self.draws < 0):
            shapes = f"t {self.t.shape}, scale {self.scale.shape} and draws {self.draws.shape}"
            faults.append(f"{shapes} must have one entry per call, and no draws below 0")
        for name, rows in (("levels", self.levels), ("clean", self.clean)):
            if rows.shape != (calls, 2):
                faults.append(f"{name} has shape {rows.shape}; expected {calls} rows of 2")
        drawn = np.cumsum(self.draws)
        reach = {"X": np.arange(1, calls + 1), "M": np.arange(1, calls + 1), "N": drawn}
        for name in ("X", "M", "N"):
            rows = getattr(self, name)
            if rows.ndim != 2 or len(rows) != calls:
                faults.append(f"{name} has shape {rows.shape}; expected {calls} rows")
            elif np.any(rows[np.arange(rows.shape[1]) >= reach[name][:, None]]):
                faults.append(f"{name} refers to entries before the first")
        numbers = ("start", "churn", *_ARRAYS)
        faults += [f"{name} holds a number that is not finite" for name in numbers if not np.isfinite(getattr(self, name)).all()]
        if faults:
            raise SettingError("not a table: " + "; ".join(faults))
        for name in _ARRAYS:  # jobs share a table
            array = getattr(self, name)
            own = array.copy() if array.flags.writeable else array
            own.flags.writeable = False
            object.__setattr__(self, name, own)

    def first(self, calls: int) -> Table:
        """Return the first calls. Raises SettingError if there are none."""
        if calls < 1:
            raise SettingError("this part of the timesteps has no step: use more steps, or a larger part")
        return self if calls == self.steps else replace(self, **{name: getattr(self, name)[:calls] for name in _ARRAYS})

    @property
    def steps(self) -> int:
        """Number of model calls."""
        return len(self.t)

    def unrolled(self) -> Floats:
        """Return each x[i] as coefficients of (x[0] after its churn, all m, all n), [C + 1, 1 + C + draws]."""
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
        """Return the fields as a JSON document, with the format's name and revision."""
        fields = {name: getattr(self, name).tolist() for name in _ARRAYS}
        first = {"start": self.start, **({"churn": self.churn} if self.churn else {})}
        return json.dumps({"format": FORMAT, "revision": REVISION, **first, **fields}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Read a table. Raises SettingError for another format or revision, and for missing, unknown or invalid fields."""
        try:
            data = json.loads(text)
            named, churn = (data.pop("format"), data.pop("revision")), data.pop("churn", 0.0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingError(f"not a table in JSON: {error!r}") from error
        if named != (FORMAT, REVISION):
            raise SettingError(f"{named[0]!r} revision {named[1]!r} is not supported; expected {FORMAT!r} revision {REVISION}")
        kinds = dict.fromkeys(_ARRAYS, np.float64) | {"t": np.float32, "draws": np.int64}
        if set(data) != {"start", *kinds}:
            raise SettingError(f"table: expected the fields start, {', '.join(kinds)}; got {', '.join(data)}")
        try:
            arrays = {name: np.array(data[name], kind) for name, kind in kinds.items()}
            for name in ("X", "M", "N", "levels", "clean"):
                arrays[name] = arrays[name].reshape(len(arrays["t"]), -1)
            return cls(start=(float(data["start"][0]), float(data["start"][1])), churn=float(churn), **arrays)
        except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
            raise SettingError(f"not a table in JSON: {error!r:.200}") from error
