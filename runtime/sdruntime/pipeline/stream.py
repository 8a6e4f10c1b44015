"""A running generation, to watch, to stop, and to read the result of."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Sequence

from sdruntime.pipeline.result import Result
from sdruntime.sampling.job import Job, State

Loop = Generator[None, None, None]  # what `denoise` returns


class Stream:
    """A running generation: iterate for a State after each model call, then read `result`.

    To stop early, break out of the loop: `result` then decodes the latents as they are.
    """

    def __init__(self, jobs: Sequence[Job], loop: Callable[[Stream], Loop], result: Callable[[], Result]) -> None:
        self.jobs = tuple(jobs)
        self._loop, self._result = loop, result
        self._states, self.watched = self._run(), True

    def __iter__(self) -> Iterator[State]:
        return self._states

    def close(self) -> None:
        """Stop the loop and release what it holds on a device."""
        self._states.close()

    @property
    def whole(self) -> bool:
        """Whether all steps may be launched at once: nobody watches, and all jobs end together; when one ends, the others are
        regrouped."""
        return not self.watched and len({job.run.steps - job.run.step for job in self.jobs if not job.done}) == 1

    def _run(self) -> Generator[State, None, None]:
        steps = max(job.steps for job in self.jobs)
        with contextlib.closing(self._loop(self)) as loop:
            for step, _ in enumerate(loop, start=1):
                yield State(step=step, steps=steps, jobs=self.jobs)

    @functools.cached_property
    def result(self) -> Result:
        """Stop the loop and decode the images. Raises NotFinite."""
        self.close()
        return self._result()
