"""The one executor: a Table, latents and noise, a model call at a time."""

from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sdruntime.sampling.table import Table

Latents = NDArray[np.float32]


class Run:
    """One job on its way through a table, in float32, sums too.

    `x` [C, h, w] is what the sampler holds now. It may be edited in place between two calls of `advance`: this row and later ones
    take the edit up. `noise` gives a fresh unit noise of the shape of x. After the last row `done` is true and x is the result.
    """

    __slots__ = ("_ahead", "_fetch", "_m", "_n", "_noise", "_rows", "_scale", "_t", "_term", "_x", "step", "steps", "table")

    def __init__(self, table: Table, x: Latents, noise: Callable[[], Latents]) -> None:
        self.step, self.steps, self.table = 0, table.steps, table
        self._t, self._scale = table.t.tolist(), table.scale.tolist()
        self._rows = [
            (draws, [[(j, weight) for j, weight in enumerate(row) if weight] for row in rows])
            for draws, *rows in zip(table.draws.tolist(), table.X.tolist(), table.M.tolist(), table.N.tolist(), strict=True)
        ]
        # windows, the newest first: as many as the widest row reaches back, and one that the next x is written to
        self._x = [np.array(x, np.float32, order="C")] + [np.zeros_like(x, np.float32) for _ in range(table.X.shape[1])]
        self._m = [np.zeros_like(self._x[0]) for _ in range(table.M.shape[1])]
        self._n = [np.empty_like(self._x[0]) for _ in range(table.N.shape[1])]
        self._term, self._noise = np.empty_like(self._x[0]), noise
        self._ahead: collections.deque[Latents | None] = collections.deque()  # noise terms of the next rows, drawn already
        self._fetch: Callable[[], None] | None = None

    @property
    def x(self) -> Latents:
        if self._fetch is not None:
            self._fetch()
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
        draws, (*weights, noise_weights) = self._rows[self.step]
        if self._m:
            self._m.insert(0, self._m.pop())
            np.copyto(self._m[0], output)
        if self._ahead:
            term = self._ahead.popleft()
            noise = ([] if term is None else [term], [(0, 1.0)] if term is not None else [])
        else:
            self._draw(draws)
            noise = (self._n, noise_weights)
        self._x.insert(0, self._x.pop())
        target, begun = self._x[0], False
        for window, row in (*zip((self._x[1:], self._m), weights, strict=True), noise):
            for j, weight in row:
                np.multiply(window[j], weight, out=self._term if begun else target)
                if begun:
                    target += self._term
                begun = True
        if not begun:
            target.fill(0)
        self.step += 1

    def _draw(self, draws: int) -> None:
        for _ in range(draws):
            noise = self._noise()
            if self._n:
                self._n = [noise, *self._n[:-1]]

    # -- for a loop that runs elsewhere, on a device: it takes the windows and the noise of some rows, and gives windows back

    def windows(self) -> tuple[list[Latents], list[Latents]]:
        """The last x, and the last model outputs before the one to come, as far back as a row reads; the newest first."""
        return self._x[: self.table.X.shape[1]], self._m[: max(len(self._m) - 1, 0)]

    def draw_ahead(self, count: int) -> list[Latents | None]:
        """What noise adds to x in each of the next `count` rows, None for nothing: drawn now, in the order of the rows."""
        while len(self._ahead) < count:
            draws, (_, _, weights) = self._rows[self.step + len(self._ahead)]
            self._draw(draws)
            terms = [np.float32(weight) * self._n[j] for j, weight in weights]
            self._ahead.append(sum(terms[1:], start=terms[0]) if terms else None)
        return list(self._ahead)[:count]

    def lend(self, fetch: Callable[[], None] | None) -> None:
        """While a loop elsewhere goes on, reading x calls `fetch`, which calls `restore`; None ends that."""
        self._fetch = fetch

    def skip(self) -> None:
        """One row was done elsewhere."""
        self._ahead.popleft()
        self.step += 1

    def restore(self, state: Latents) -> None:
        """Take the windows [slots, cells] as they are after the rows that were skipped: x, then model outputs, newest first."""
        fetch, self._fetch = self._fetch, None
        x, m = self.windows()
        for window, values in zip((*x, *m), state, strict=False):
            np.copyto(window, values.reshape(window.shape))
        self._fetch = fetch


def run(table: Table, x: Latents, model: Callable[[Latents, float], Latents], noise: Callable[[], Latents]) -> Latents:
    """One job from x[0] to the end. `model(scaled x, t)` gives the raw output, `noise()` fresh unit noise like x."""
    job = Run(table, x, noise)
    scaled = np.empty_like(job.x)
    while not job.done:
        job.model_input(out=scaled)
        job.advance(model(scaled, job.t))
    return job.x
