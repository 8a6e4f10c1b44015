"""A queue for concurrent requests, whose jobs share UNet calls.

    with Pipeline.open("bundle") as pipe, Batcher(pipe) as batcher:
        future = batcher.submit(Request(prompt="a red fox in snow", seed=7), progress=print)
        image = future.result()

**Policy.** One thread generates. Between two steps, finished jobs leave (VAE) and new jobs join (text encoder, VAE of a start
image), one after the other. A new job waits for the current step and for the jobs that join or leave before it; a single job
never waits for others. Jobs of the same latent size and text length share a call, whatever their step, sampler and prompt. Each
step advances every running job, and calls are split and padded to what the UNet's engines take. Jobs start in the order of their
submission, `running` of them at a time. The default is the number of images that one call of the UNet's largest profile takes,
both rows of guidance counted (`--batch` of the build): more would slow down the running jobs and speed up none. Jobs share a call
only if they have the same LoRAs; others take turns within each step. At most `Engines.most_sets` sets of LoRAs are in use at
a time: a request with another set waits until the jobs of one of these are done, and so do the requests behind it, so that nobody
is overtaken for ever. Each running job needs memory for the activations of its rows, so lower `running` if memory is short. With
TensorRT, the loop stays on the GPU (`denoise`) and the host waits for each step, so that jobs can join and leave there.

**Bytes.** A job that runs alone from its first step to its last returns the same bytes as `Pipeline(...)`. In a larger batch,
the engine's arithmetic may change the last bits.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from sdruntime.arrays import Array
from sdruntime.errors import QueueFull, QueueTimeout, SdruntimeError, SettingError
from sdruntime.pipeline.denoise import check_latents
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.requests.request import Request, requests_from
from sdruntime.pipeline.requests.unused import unused_lines
from sdruntime.pipeline.result import Image, Result
from sdruntime.sampling.job import Job

QUEUE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The progress of a job: `step` of `steps` model calls are done, 0 when it has just joined.

    If a preview was requested: `latents`, and from step 1 on `clean`, the estimate of the finished ones, which
    `Pipeline.preview` shows. Both are copies, float32 [C, h, w].
    """

    step: int
    steps: int
    latents: Array | None = None
    clean: Array | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """What a Batcher does at a moment: requests that wait, jobs that run, and since it was opened the steps of all jobs and the
    moment of the last step, by `time.monotonic()`."""

    waiting: int
    running: int
    steps: int
    last_step: float


@dataclass(slots=True)
class Timings:
    """Seconds of a job: waiting in the queue, encoding, denoising, decoding, and in total from its submission to its end."""

    queued: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0


class ImageFuture(concurrent.futures.Future[Image]):
    """The future image of a request: a standard Future that can also be cancelled while it runs. Every method may be called from
    any thread. `timings` and `warnings` (lines of text) are complete once it is done."""

    def __init__(self, batcher: Batcher) -> None:
        super().__init__()
        self.timings = Timings()
        self.warnings: list[str] = []
        self._batcher, self._joined = batcher, False

    def cancel(self) -> bool:
        """Remove the request from the queue at once, or end its job before the next step. Then `result` raises CancelledError.

        Return False if it is already done.
        """
        return self._batcher._cancel(self)

    def finish(self) -> bool:
        """End its job after the current step, with the estimate of the finished image there. A request that waits is cancelled.

        Return False if it is already done.
        """
        return self._batcher._finish(self)

    def running(self) -> bool:
        """Return whether its job has joined and is not done."""
        return self._joined and not self.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds and return whether it is done. Does not raise the job's error."""
        return bool(concurrent.futures.wait([self], timeout).done)

    def _end(self, image: Image | None, error: BaseException | None) -> None:
        """End the future with an image, an error, or if both are None as cancelled."""
        if error is not None:
            self.set_exception(error)
        elif image is not None:
            self.set_result(image)
        else:
            super().cancel()
            self.set_running_or_notify_cancel()


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """A request that is not done."""

    future: ImageFuture
    request: Request
    progress: Callable[[Progress], object] | None
    preview: bool
    submitted: float = field(default_factory=time.monotonic)
    joined: float = 0.0
    deadline: float | None = None  # a moment; after it, it does not start
    reported: int | None = None  # the last step that `progress` was called with
    cancelled: bool = False
    finishing: bool = False


class Batcher:
    """A queue over an open pipeline, which nothing else may use meanwhile.

    Leaving the context cancels unfinished requests and waits for the current step. Leave it before the pipeline.

    `queue`: how many requests may wait, besides the running ones; `running`: how many run at a time (see the module's
    documentation). Raises SettingError if either is less than 1. Every method may be called from any thread, also in callbacks.
    """

    def __init__(self, pipeline: Pipeline, *, queue: int = QUEUE, running: int | None = None) -> None:
        self.queue, self.running = queue, pipeline.engines.room if running is None else running
        for name, value in (("queue", self.queue), ("running", self.running)):
            if value < 1:
                raise SettingError(f"{name} {value}: at least 1 image")
        self._pipe, self._steppers = pipeline, functools.partial(pipeline.device_steppers, ahead=0)
        self._changed = threading.Condition()  # guards what follows
        self._unfinished: dict[ImageFuture, _Entry] = {}
        self._waiting: collections.deque[_Entry] = collections.deque()
        self._open = False
        self._counted, self._last_step = 0, time.monotonic()
        self._jobs: dict[Job, _Entry] = {}  # used by the generating thread only
        self._thread = threading.Thread(target=self._generate, name="sdruntime-batcher", daemon=True)

    def __repr__(self) -> str:
        state = f"{len(self._unfinished)} unfinished requests" if self._open else "not open"
        return f"<Batcher of {self._pipe!r}, {state}>"

    def __enter__(self) -> Batcher:
        self._open = True
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def counts(self) -> Counts:
        """What it does now. May be read from any thread."""
        with self._changed:
            waiting = len(self._waiting)
            return Counts(waiting, len(self._unfinished) - waiting, self._counted, self._last_step)

    def submit(
        self,
        request: Request | str,
        *,
        progress: Callable[[Progress], object] | None = None,
        preview: bool = False,
        done: Callable[[ImageFuture], object] | None = None,
        patience: float | None = None,
        **settings: Any,
    ) -> ImageFuture:
        """Put a request into the queue, or a prompt with the `settings` of a Request and a random seed. Never waits.

        An invalid setting or a NaN becomes the exception of the future. If an engine fails on a call of several jobs, the call is
        repeated for each of them alone, and only a job whose own call fails gets the exception (on a GPU, all of them get it,
        since the loop has gone on).

        `progress` is called when the job joins and after each of its steps, `done` at its end, both on the generating thread (for
        a job that never ran, on the thread that cancels or closes). That thread waits for them, so they must be quick. An
        exception of `progress` ends the job. `preview`: progress includes the latents, which on a GPU waits for a copy.
        `patience`: the seconds in the queue after which its exception is QueueTimeout; None for any.

        Raises QueueFull; SdruntimeError if the batcher is not open; SettingError for a setting that a Request does not have.
        """
        if not isinstance(request, str | Request):
            raise SettingError(f"submit: expected text or a Request, got {type(request).__name__}")
        if "count" in settings:
            raise SettingError("submit: count: a submission is one image; for several, see submit_all")
        requests = requests_from(request, **settings)
        [future] = self.submit_all(requests, progress=progress, preview=preview, done=done, patience=patience)
        return future

    def submit_all(
        self,
        requests: Sequence[Request],
        *,
        progress: Callable[[Progress], object] | None = None,
        preview: bool = False,
        done: Callable[[ImageFuture], object] | None = None,
        patience: float | None = None,
    ) -> list[ImageFuture]:
        """Put requests into the queue, all of them or, if it has no room for all, none. Otherwise as `submit`."""
        futures = [ImageFuture(self) for _ in requests]
        for future in futures:
            if done is not None:
                future.add_done_callback(done)  # type: ignore[arg-type]
        with self._changed:
            if not self._open:
                raise SdruntimeError("the batcher is not open: submit inside `with Batcher(pipe) as batcher:`")
            if len(self._unfinished) + len(requests) > self.running + self.queue:
                raise QueueFull(
                    f"{len(self._unfinished)} requests are running or waiting, and the queue holds {self.queue} besides the "
                    f"{self.running} that run: wait for one of them, or open it with a longer queue"
                )
            deadline = None if patience is None else time.monotonic() + patience
            for request, future in zip(requests, futures, strict=True):
                entry = _Entry(future=future, request=request, progress=progress, preview=preview, deadline=deadline)
                self._unfinished[future] = entry
                self._waiting.append(entry)
            self._changed.notify()
        return futures

    def close(self) -> None:
        """Cancel unfinished requests, and wait for the thread to end, except in a callback. May be called again."""
        with self._changed:
            self._open = False
            for entry in self._unfinished.values():
                entry.cancelled = True
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for entry in waiting:
            self._end(entry)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _cancel(self, future: ImageFuture) -> bool:
        with self._changed:
            entry = self._unfinished.get(future)
            if entry is None:
                return future.cancelled()
            entry.cancelled = True
            waiting = entry in self._waiting
            if waiting:
                self._waiting.remove(entry)
        if waiting:
            self._end(entry)
        return True

    def _finish(self, future: ImageFuture) -> bool:
        with self._changed:
            entry = self._unfinished.get(future)
            if entry is None:
                return False
            entry.finishing = True
            waiting = entry in self._waiting
        return self._cancel(future) if waiting else True

    def _end(self, entry: _Entry, image: Image | None = None, error: BaseException | None = None) -> None:
        with self._changed:
            del self._unfinished[entry.future]
            cancelled = entry.cancelled
        entry.future.timings.total = time.monotonic() - entry.submitted
        entry.future._end(*(None, None) if cancelled else (image, error))

    # -- the generating thread

    def _generate(self) -> None:
        fault: BaseException | None = None
        try:
            while self._wait():
                try:
                    self._admit()
                    for _ in self._pipe.loop(self._jobs, self._steppers):
                        with self._changed:
                            self._counted, self._last_step = self._counted + len(self._jobs), time.monotonic()
                        self._leave()
                        self._admit()
                except Exception as error:
                    self._fail(error)
                    self._leave()  # other jobs may be done
        except BaseException as error:
            fault = error
        finally:
            with self._changed:
                self._open = False
                unfinished = list(self._unfinished.values())
                self._waiting.clear()
            for entry in unfinished:
                self._end(entry, error=fault)

    def _wait(self) -> bool:
        """Wait for a job; return False once the batcher is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._waiting or not self._open)
            return self._open

    def _expire(self) -> None:
        """End the requests that waited for too long."""
        now = time.monotonic()
        with self._changed:
            late = [entry for entry in self._waiting if entry.deadline is not None and entry.deadline < now]
            for entry in late:
                self._waiting.remove(entry)
        for entry in late:
            waited = now - entry.submitted
            self._end(entry, error=QueueTimeout(f"the request waited for {waited:.1f} s and did not start: try again later"))

    def _admit(self) -> None:
        """Start waiting requests while fewer than `running` jobs run."""
        self._expire()
        while len(self._jobs) < self.running:
            with self._changed:
                if not self._waiting or not self._has_room_for(self._waiting[0].request):
                    return
                entry = self._waiting.popleft()
            begun = time.monotonic()
            entry.future.timings.queued, entry.future._joined = begun - entry.submitted, True
            try:
                [job] = self._pipe.jobs([entry.request])
                entry.joined = time.monotonic()
                entry.future.timings.encode = entry.joined - begun
                entry.future.warnings += unused_lines([self._pipe.completed(entry.request)])
                entry.future.warnings += job.warnings
                _report_progress(job, entry)
            except BaseException as error:
                self._end(entry, error=error)
            else:
                self._jobs[job] = entry

    def _has_room_for(self, request: Request) -> bool:
        """Return whether the engines of a request's LoRAs can be open beside those of the running jobs."""
        running = {entry.request.loras for entry in self._jobs.values() if entry.request.loras}
        return not request.loras or request.loras in running or len(running) < self._pipe.engines.most_sets

    def _leave(self) -> None:
        """Report the progress of each job, and end those that are done, cancelled, or whose callback failed."""
        for job, entry in list(self._jobs.items()):
            image, error = None, None
            try:
                if not entry.cancelled:
                    _report_progress(job, entry)
                finished = job.done or (entry.finishing and job.run.step > 0)
                if not finished and not entry.cancelled:
                    continue
                del self._jobs[job]
                if not entry.cancelled:
                    if not job.done:
                        job.finish_early()
                    image = self._decoded(job, entry)
            except BaseException as raised:
                error = raised
                self._jobs.pop(job, None)
            self._end(entry, image, error)

    def _decoded(self, job: Job, entry: _Entry) -> Image:
        begun = time.monotonic()
        entry.future.timings.denoise = begun - entry.joined
        check_latents(job)
        [image] = self._pipe.images([entry.request], [job])
        entry.future.warnings += Result(images=(image,), folder=self._pipe.bundle.folder).warnings
        entry.future.timings.decode = time.monotonic() - begun
        return image

    def _fail(self, error: Exception) -> None:
        """End the jobs of the call that failed, or all jobs if it is unknown."""
        failed = [job for job in self._jobs if job.error is not None] or list(self._jobs)
        for job in failed:
            self._end(self._jobs.pop(job), error=job.error or error)


def _report_progress(job: Job, entry: _Entry) -> None:
    """Call `progress` once per step."""
    if entry.progress is not None and entry.reported != job.step:
        entry.reported = job.step
        latents, clean = (job.run.x.copy(), job.run.clean) if entry.preview else (None, None)
        entry.progress(Progress(step=job.step, steps=job.steps, latents=latents, clean=clean))
