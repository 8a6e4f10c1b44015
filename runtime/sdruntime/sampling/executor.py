"""The executor of tables: apply one row of a Table after each model call."""

from __future__ import annotations

import collections
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sdruntime.sampling.table import Table

Latents = NDArray[np.float32]


class Run:
    """Execute a table on one image, in float32, sums included.

    `x` [C, h, w] is the sampler's current state. It may be edited in place between two calls of `advance`; this row and later
    ones use the edited x. `noise` returns a fresh draw of unit noise of x's shape. After the last row, `done` is true and x is
    the result.
    """

    __slots__ = (
        "_ahead",
        "_clean",
        "_fetch",
        "_m",
        "_n",
        "_noise",
        "_rows",
        "_scale",
        "_t",
        "_term",
        "_x",
        "step",
        "steps",
        "table",
    )

    def __init__(self, table: Table, x: Latents, noise: Callable[[], Latents]) -> None:
        self.step, self.steps, self.table = 0, table.steps, table
        self._t, self._scale = table.t.tolist(), table.scale.tolist()
        self._rows = [
            (draws, [[(j, weight) for j, weight in enumerate(row) if weight] for row in rows])
            for draws, *rows in zip(table.draws.tolist(), table.X.tolist(), table.M.tolist(), table.N.tolist(), strict=True)
        ]
        # windows, newest first: as many as the widest row reaches back, and one more for the next x
        first = x + np.float32(table.churn) * noise() if table.churn else x
        self._x = [np.array(first, np.float32, order="C")] + [
            np.zeros_like(x, np.float32) for _ in range(max(1, table.X.shape[1]))
        ]
        self._m = [np.zeros_like(self._x[0]) for _ in range(max(1, table.M.shape[1]))]
        self._n = [np.empty_like(self._x[0]) for _ in range(table.N.shape[1])]
        self._term, self._noise = np.empty_like(self._x[0]), noise
        self._ahead: collections.deque[Latents | None] = collections.deque()  # noise terms of the next rows, already drawn
        self._fetch: Callable[[], None] | None = None
        self._clean: Latents | None = None  # by a loop on a device

    @property
    def x(self) -> Latents:
        if self._fetch is not None:
            self._fetch()
        return self._x[0]

    @property
    def clean(self) -> Latents | None:
        """A copy of the estimate of the finished latents at the last model call, float32 [C, h, w]; None before the first."""
        if not self.step:
            return None
        if self._fetch is not None:
            self._fetch()
        if self._clean is not None:
            return np.array(self._clean)
        p, q = self.table.clean[self.step - 1].tolist()
        estimate: Latents = np.multiply(self._x[1], np.float32(p)) + np.float32(q) * self._m[0]
        return estimate

    @property
    def done(self) -> bool:
        return self.step == self.steps

    @property
    def t(self) -> float:
        """The timestep of the next model call."""
        return float(self._t[self.step])

    def model_input(self, out: Latents) -> None:
        """Write the model's input, the scaled x, into `out`."""
        np.multiply(self._x[0], self._scale[self.step], out=out)

    def advance(self, output: Latents) -> None:
        """Apply the next row to the model's raw output, which is copied."""
        draws, (*weights, noise_weights) = self._rows[self.step]
        self._clean = None
        self._m.insert(0, self._m.pop())
        np.copyto(self._m[0], output)
        if self._ahead:
            term = self._ahead.popleft()
            noise = ([] if term is None else [term], [(0, 1.0)] if term is not None else [])
        else:
            self._draw(draws)
            noise = (self._n, noise_weights)
        self._x.insert(0, self._x.pop())
        target, written = self._x[0], False
        for window, row in (*zip((self._x[1:], self._m), weights, strict=True), noise):
            for j, weight in row:
                np.multiply(window[j], weight, out=self._term if written else target)
                if written:
                    target += self._term
                written = True
        if not written:
            target.fill(0)
        self.step += 1

    def _draw(self, draws: int) -> None:
        for _ in range(draws):
            noise = self._noise()
            if self._n:
                self._n = [noise, *self._n[:-1]]

    # -- for a loop on a device, which takes the windows and the noise of some rows and later writes the windows back

    def windows(self) -> tuple[list[Latents], list[Latents]]:
        """Return the past x and the past model outputs that the next row can read, newest first."""
        return self._x[: self.table.X.shape[1]], self._m[: max(self.table.M.shape[1] - 1, 0)]

    def draw_ahead(self, count: int) -> list[Latents | None]:
        """Draw the noise of the next `count` rows now, in order; return each row's noise term of x, None for no noise."""
        while len(self._ahead) < count:
            draws, (_, _, weights) = self._rows[self.step + len(self._ahead)]
            self._draw(draws)
            terms = [np.float32(weight) * self._n[j] for j, weight in weights]
            self._ahead.append(sum(terms[1:], start=terms[0]) if terms else None)
        return list(self._ahead)[:count]

    def lend(self, fetch: Callable[[], None] | None) -> None:
        """Mark x as held by a loop on a device: reading x calls `fetch`, which calls `restore`. None ends that."""
        self._fetch = fetch

    def skip(self) -> None:
        """Count one row as done, by a loop on a device."""
        self._ahead.popleft()
        self.step += 1

    def restore(self, state: Latents, clean: Latents | None = None) -> None:
        """Write the windows back after skipped rows. `state` [slots, cells]: x, then model outputs, newest first.

        `clean` [cells]: the estimate of the last of these rows.
        """
        fetch, self._fetch = self._fetch, None
        x, m = self.windows()
        for window, values in zip((*x, *m), state, strict=False):
            np.copyto(window, values.reshape(window.shape))
        self._clean = None if clean is None else clean.reshape(self._x[0].shape).copy()
        self._fetch = fetch


def run(table: Table, x: Latents, model: Callable[[Latents, float], Latents], noise: Callable[[], Latents]) -> Latents:
    """Run a table from x[0]; return the last x. `model(scaled x, t)`: the raw output. `noise()`: a draw of unit noise like x."""
    state = Run(table, x, noise)
    scaled = np.empty_like(state.x)
    while not state.done:
        state.model_input(out=scaled)
        state.advance(model(scaled, state.t))
    return state.x
