"""The one executor: a Table, latents and noise, a model call at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sdruntime.table import Table

Latents = NDArray[np.float32]


class Run:
    """One job on its way through a table, in float32, sums too.

    `x` [C, h, w] is what the sampler holds now. It may be edited in place between two calls of `advance`: this row and later ones
    take the edit up. `noise` gives a fresh unit noise of the shape of x. After the last row `done` is true and x is the result.
    """

    __slots__ = ("_m", "_n", "_noise", "_rows", "_scale", "_t", "_term", "_x", "step", "steps")

    def __init__(self, table: Table, x: Latents, noise: Callable[[], Latents]) -> None:
        self.step, self.steps = 0, table.steps
        self._t, self._scale = table.t.tolist(), table.scale.tolist()
        self._rows = [
            (draws, [[(j, weight) for j, weight in enumerate(row) if weight] for row in rows])
            for draws, *rows in zip(table.draws.tolist(), table.X.tolist(), table.M.tolist(), table.N.tolist(), strict=True)
        ]
        # windows, the newest first: as many as the widest row reaches back, and one that the next x is written to
        self._x = [np.array(x, np.float32, order="C")] + [np.empty_like(x, np.float32) for _ in range(table.X.shape[1])]
        self._m = [np.empty_like(self._x[0]) for _ in range(table.M.shape[1])]
        self._n = [np.empty_like(self._x[0]) for _ in range(table.N.shape[1])]
        self._term, self._noise = np.empty_like(self._x[0]), noise

    @property
    def x(self) -> Latents:
        return self._x[0]

    @property
    def done(self) -> bool:
        return self.step == self.steps

    @property
    def t(self) -> float:
        """The timestep that the model is told with the next call."""
        return float(self._t[self.step])

    def model_input(self, out: Latents) -> None:
        """Write what the model is called with into `out`."""
        np.multiply(self._x[0], self._scale[self.step], out=out)

    def advance(self, output: Latents) -> None:
        """Take the model's raw output, which is copied, and go on by one row."""
        draws, weights = self._rows[self.step]
        if self._m:
            self._m.insert(0, self._m.pop())
            np.copyto(self._m[0], output)
        for _ in range(draws):
            noise = self._noise()
            if self._n:
                self._n = [noise, *self._n[:-1]]
        self._x.insert(0, self._x.pop())
        target, begun = self._x[0], False
        for window, row in zip((self._x[1:], self._m, self._n), weights, strict=True):
            for j, weight in row:
                np.multiply(window[j], weight, out=self._term if begun else target)
                if begun:
                    target += self._term
                begun = True
        if not begun:
            target.fill(0)
        self.step += 1


def run(table: Table, x: Latents, model: Callable[[Latents, float], Latents], noise: Callable[[], Latents]) -> Latents:
    """One job from x[0] to the end. `model(scaled x, t)` gives the raw output, `noise()` fresh unit noise like x."""
    job = Run(table, x, noise)
    scaled = np.empty_like(job.x)
    while not job.done:
        job.model_input(out=scaled)
        job.advance(model(scaled, job.t))
    return job.x
