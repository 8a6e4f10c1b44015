"""The denoising loop: many jobs, each at its own step of its own table, in one UNet call.

A step is a row of a table and the UNet takes a timestep per sample, so jobs with latents of the same shape can share a call.
A single image is a set of one job.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Sequence

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.engines.finite import advice, checked_rows, is_finite
from sdruntime.errors import NotFinite, SdruntimeError
from sdruntime.pipeline.control import residuals
from sdruntime.sampling.guidance import combine, combine_with_image, rescale
from sdruntime.sampling.job import Job, Stepper, after, at, grouped, stacked
from sdruntime.system.nvtx import annotate


def denoise(jobs: Collection[Job], steppers: Callable[[Sequence[Job]], Sequence[Stepper]]) -> Generator[None, None, None]:
    """Advance every active job by one model call and yield, until all are done.

    The caller may change `jobs` between two steps. Jobs of one shape and text length form a group; `steppers` returns the
    steppers that advance a group, and is called again when a job joins, leaves or goes on to its next pass. Raises NotFinite:
    right after the call if the loop runs on the host, at the end of a pass if it runs on a device. An error of a call is also
    stored as the `error` of each job that it affects; the other jobs are intact, and another `denoise` can continue them.
    """
    calls: list[Stepper] = []
    members: list[Job] = []
    try:
        while active := [job for job in jobs if not job.done]:
            ended = [job for job in active if job.run.done]
            if ended or active != members:
                members, done, calls = active, calls, []
                _finish(done)
                for job in ended:
                    with _attributed_to([job]):
                        check_latents(job)
                        job.proceed()
                for group in grouped(active):
                    with _attributed_to(group):
                        calls += steppers(group)
            step = active[0].step
            for number, call in enumerate(calls):
                with annotate(f"step {step}, group {number}"), _attributed_to(call.jobs):
                    call.advance()
            yield
    except BaseException as error:
        with contextlib.suppress(*() if isinstance(error, GeneratorExit) else (SdruntimeError,)):  # raise the first error
            _finish(calls)
        raise
    _finish(calls)
    for job in jobs:
        check_latents(job)


def check_latents(job: Job) -> None:
    """Raises NotFinite if the latents of a job hold NaN or infinity."""
    if not is_finite(job.run.x):
        raise NotFinite(f"unet, {after(job)}: the latents are no longer finite; {advice(bundle=job.bundle)}")


@contextlib.contextmanager
def _attributed_to(jobs: Sequence[Job]) -> Iterator[None]:
    """Store an error raised in the block in these jobs, unless one of them has it already."""
    try:
        yield
    except Exception as error:
        if not any(job.error is error for job in jobs):
            for job in jobs:
                job.error = job.error or error
        raise


def _finish(calls: list[Stepper]) -> None:
    """Finish all steppers, even if one fails; then raise the first error."""
    first: BaseException | None = None
    for call in calls:
        try:
            with _attributed_to(call.jobs):
                call.finish()
        except BaseException as error:
            first = first or error
    if first is not None:
        raise first


class Call:
    """Advance a group of jobs on the host with one UNet call per step.

    The UNet's inputs are allocated once; a step rewrites only `sample`, `timestep`, and the rows that change there. `unet` is
    called at each step and may return another engine. The unconditional rows come first. `controlnet` returns the engine of a
    ControlNet; it is called for each step that one acts in.
    """

    def __init__(
        self, jobs: Sequence[Job], unet: Callable[[], Engine], controlnet: Callable[[str], Engine] | None = None
    ) -> None:
        self.jobs, self._unet, self._controlnet = jobs, unet, controlnet
        others = [row for job in jobs for row in job.current_rows[:-1]]
        indices = iter(range(len(others)))
        # of each job: the indices of its rows, the conditional one last
        self._rows = [(job, (*(next(indices) for _ in job.rows[:-1]), len(others) + k)) for k, job in enumerate(jobs)]
        rows = others + [job.current_rows[-1] for job in jobs]
        self._sample = np.empty((len(rows), *jobs[0].run.x.shape), np.float32)
        self._timestep = np.empty(len(rows), np.float32)
        self._feeds: dict[str, Array] = {"sample": self._sample, "timestep": self._timestep, **stacked(rows)}

    def advance(self) -> None:
        for job, (*others, row) in self._rows:
            job.run.model_input(out=self._sample[row])
            self._timestep[row] = job.run.t
            for changed, index in zip(job.changes.get(job.run.step, ()), (*others, row), strict=False):
                for name, array in changed.items():
                    self._feeds[name][index] = array
            for other in others:
                self._sample[other] = self._sample[row]
                self._timestep[other] = job.run.t
        # the unconditional rows come first: without any guidance at this step, they are not computed
        skipped = len(self._sample) - len(self.jobs) if all(job.pauses_guidance for job in self.jobs if job.guided) else 0
        feeds = {name: array[skipped:] for name, array in self._feeds.items()} if skipped else self._feeds
        describe = lambda row: self._describe(row + skipped)  # noqa: E731
        try:
            unet, bundle = self._unet(), self.jobs[0].bundle
            if self._controlnet is not None:
                rows = [(job, [row - skipped for row in rows if row >= skipped]) for job, rows in self._rows]
                feeds = {**feeds, **residuals(rows, feeds, unet.component, self._controlnet, describe, bundle)}
            output = checked_rows(unet, feeds, describe, bundle)["out_sample"]
        except NotFinite as error:
            if error.row is not None:
                self._job_of(error.row + skipped).error = error
            raise
        except Exception:
            if len(self.jobs) == 1:
                raise
            return self._advance_alone()
        for job, (*others, row) in self._rows:
            conditional = model = output[row - skipped]
            guided = bool(others) and not job.pauses_guidance
            if guided and len(others) == 1:
                model = combine(output[others[0]], model, job.current_guidance)
            elif guided:
                model = combine_with_image(output[others[0]], output[others[1]], model, job.current_guidance, job.image_guidance)
            if guided and job.rescale:
                model = rescale(model[None], conditional[None], job.rescale)[0]
            job.run.advance(model)
            if job.kept is not None:
                job.kept.restore(job.run)

    def _describe(self, row: int) -> str:
        job = self._job_of(row)
        return at(job.step + 1, job)

    def _advance_alone(self) -> None:
        """Call the UNet for each job alone, after their common call failed: a fault of one job then ends only that job.

        Raises the first error; the `error` of a job is its own.
        """
        first: Exception | None = None
        for job in self.jobs:
            try:
                Call([job], self._unet, self._controlnet).advance()
            except Exception as error:
                job.error, first = error, first or error
        if first is not None:
            raise first

    def _job_of(self, row: int) -> Job:
        return next(job for job, rows in self._rows if row in rows)

    def finish(self) -> None:
        """Do nothing: `advance` leaves the jobs up to date."""
