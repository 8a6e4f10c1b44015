"""A queue for concurrent requests, whose jobs share UNet calls.

    with Pipeline.open("bundle") as pipe, Batcher(pipe) as batcher:
        future = batcher.submit(Request(prompt="a red fox in snow", seed=7), progress=print)
        image = future.result()

**Policy.** One thread generates. Between two steps, finished jobs leave (VAE) and new ones join (text encoder, VAE of a start
image), one after the other. A new job waits for the current step and for the jobs that join or leave before it; a single job
never waits for others. Jobs of the same latent size and text length share a call, whatever their step, sampler and prompt. Each
step advances every running job, and calls are split and padded to what the UNet's engines take. Jobs start in the order of their
submission, `running` of them at a time. The default is the number of images that one call of the UNet's largest profile takes,
both rows of guidance counted (`--batch` of the build): more would slow down the running jobs and speed up none. Each running job
needs memory for the activations of its rows, so lower `running` if memory is short. With TensorRT, the loop stays on the GPU
(`denoise`) and the host waits for each step, so that jobs can join and leave there.

**Bytes.** A job that runs alone from its first step to its last returns the same bytes as `Pipeline(...)`. In a larger batch,
the engine's arithmetic may change the last bits.
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from sdruntime.arrays import Array
from sdruntime.errors import QueueFull, SdruntimeError, SettingError
from sdruntime.pipeline.denoise import check_latents
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.pipeline.request import Request, requests_from, unused_lines
from sdruntime.pipeline.result import Image, Result
from sdruntime.sampling.job import Job

QUEUE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a job is: `step` of `steps` model calls are done, none when it has just joined. `latents`: a copy, float32 [C, h, w],
    where a preview was requested."""

    step: int
    steps: int
    latents: Array | None = None


@dataclass(slots=True)
class Timings:
    """Seconds of a job: in the queue, of its encoders, of its steps, of its decoder, and from its submission to its end."""

    queued: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0


class ImageFuture(concurrent.futures.Future[Image]):
    """The future image of a request: a standard Future that can also be cancelled while it runs. Every method may be called from
    any thread. `timings`, and `warnings` (lines for a person), are complete once it is done."""

    def __init__(self, batcher: Batcher) -> None:
        super().__init__()
        self.timings = Timings()
        self.warnings: list[str] = []
        self._batcher, self._joined = batcher, False

    def cancel(self) -> bool:
        """Take it out of the queue at once, or end it at the next step boundary: then `result` raises CancelledError. False where
        it is done already."""
        return self._batcher._cancel(self)

    def running(self) -> bool:
        return self._joined and not self.done()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is done, at the latest after `timeout` seconds; raises nothing of what it ended with."""
        return bool(concurrent.futures.wait([self], timeout).done)

    def _end(self, picture: Image | None, error: BaseException | None) -> None:
        """Neither: cancelled."""
        if error is not None:
            self.set_exception(error)
        elif picture is not None:
            self.set_result(picture)
        else:
            super().cancel()
            self.set_running_or_notify_cancel()


@dataclass(slots=True, kw_only=True, eq=False)
class _Entry:
    """What the batcher keeps about a request until it is done."""

    future: ImageFuture
    request: Request
    progress: Callable[[Progress], object] | None
    preview: bool
    submitted: float = field(default_factory=time.monotonic)
    joined: float = 0.0
    told: int | None = None  # step
    cancelled: bool = False


class Batcher:
    """A queue over an open pipeline, which nobody else uses meanwhile; leaving the context cancels what is not done and waits for
    the step that is under way. Leave it before the pipeline.

    `queue`: how many requests may wait besides the running ones; `running`: how many run at a time (see above). Raises
    SettingError for less than one of either. Every method may be called from any thread, callbacks included.
    """

    def __init__(self, pipeline: Pipeline, *, queue: int = QUEUE, running: int | None = None) -> None:
        self.queue, self.running = queue, pipeline.engines.room if running is None else running
        for name, value in (("queue", self.queue), ("running", self.running)):
            if value < 1:
                raise SettingError(f"{name} {value}: at least 1 image")
        self._pipe, self._steppers = pipeline, functools.partial(pipeline.device_steppers, ahead=0)
        self._changed = threading.Condition()  # guards what follows
        self._held: dict[ImageFuture, _Entry] = {}
        self._waiting: collections.deque[_Entry] = collections.deque()
        self._open = False
        self._jobs: dict[Job, _Entry] = {}  # used by the generating thread only
        self._thread = threading.Thread(target=self._draw, name="sdruntime-batcher", daemon=True)

    def __repr__(self) -> str:
        state = f"{len(self._held)} under way" if self._open else "not open"
        return f"<Batcher of {self._pipe!r}, {state}>"

    def __enter__(self) -> Batcher:
        self._open = True
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def submit(
        self,
        request: Request | str,
        *,
        progress: Callable[[Progress], object] | None = None,
        preview: bool = False,
        done: Callable[[ImageFuture], object] | None = None,
        **settings: Any,
    ) -> ImageFuture:
        """Put a request into the queue, or a prompt with the `settings` of a Request and a random seed; it never waits.

        A wrong setting or NaN is the exception of its future. If an engine fails on a call of several jobs, the call is repeated
        for each of them alone, and only a job whose own call fails gets the exception (on a GPU, all of them get it, since the
        loop has gone on).

        `progress` is called when the job joins and after each of its steps, `done` at its end, both on the generating thread (or,
        for a job that never ran, on the one that cancels or closes), which waits for them: be quick. What `progress` raises ends
        the job. `preview`: with the latents, which on a GPU waits for a copy.
        Raises QueueFull, SdruntimeError where the batcher is not open, SettingError for a setting that no request has.
        """
        if not isinstance(request, str | Request):
            raise SettingError(f"submit: expected text or a Request, got {type(request).__name__}")
        if "count" in settings:
            raise SettingError("submit: count: a submission is one image; submit it several times")
        [request] = requests_from(request, **settings)
        future = ImageFuture(self)
        if done is not None:
            future.add_done_callback(done)  # type: ignore[arg-type]
        with self._changed:
            if not self._open:
                raise SdruntimeError("the batcher is not open: submit inside `with Batcher(pipe) as batcher:`")
            if len(self._held) >= self.running + self.queue:
                raise QueueFull(
                    f"{len(self._held)} requests are running or waiting, and the queue holds {self.queue} besides the "
                    f"{self.running} that run: wait for one of them, or open it with a longer queue"
                )
            entry = _Entry(future=future, request=request, progress=progress, preview=preview)
            self._held[future] = entry
            self._waiting.append(entry)
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancel what is not done, and wait for the thread to end (but not in a callback). A second time does nothing."""
        with self._changed:
            self._open = False
            for entry in self._held.values():
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
            entry = self._held.get(future)
            if entry is None:
                return future.cancelled()
            entry.cancelled = True
            waits = entry in self._waiting
            if waits:
                self._waiting.remove(entry)
        if waits:
            self._end(entry)
        return True

    def _end(self, entry: _Entry, picture: Image | None = None, error: BaseException | None = None) -> None:
        with self._changed:
            del self._held[entry.future]
            cancelled = entry.cancelled
        entry.future.timings.total = time.monotonic() - entry.submitted
        entry.future._end(*(None, None) if cancelled else (picture, error))

    # -- the generating thread

    def _draw(self) -> None:
        fault: BaseException | None = None
        try:
            while self._wait():
                try:
                    self._admit()
                    for _ in self._pipe.loop(self._jobs, self._steppers):
                        self._leave()
                        self._admit()
                except Exception as error:
                    self._fail(error)
                    self._leave()  # others may be done
        except BaseException as error:
            fault = error
        finally:
            with self._changed:
                self._open = False
                left = list(self._held.values())
                self._waiting.clear()
            for entry in left:
                self._end(entry, error=fault)

    def _wait(self) -> bool:
        """Wait for a job; return False once the batcher is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._waiting or not self._open)
            return self._open

    def _admit(self) -> None:
        while len(self._jobs) < self.running:
            with self._changed:
                if not self._waiting:
                    return
                entry = self._waiting.popleft()
            begun = time.monotonic()
            entry.future.timings.queued, entry.future._joined = begun - entry.submitted, True
            try:
                [job] = self._pipe.jobs([entry.request])
                entry.joined = time.monotonic()
                entry.future.timings.encode = entry.joined - begun
                entry.future.warnings += unused_lines([entry.request])
                entry.future.warnings += job.warnings
                _tell(job, entry)
            except BaseException as error:
                self._end(entry, error=error)
            else:
                self._jobs[job] = entry

    def _leave(self) -> None:
        """After a step: finish the jobs that are done, were cancelled, or whose callback failed."""
        for job, entry in list(self._jobs.items()):
            picture, error = None, None
            try:
                if not entry.cancelled:
                    _tell(job, entry)
                if not job.done and not entry.cancelled:
                    continue
                del self._jobs[job]
                if not entry.cancelled:
                    picture = self._decoded(job, entry)
            except BaseException as raised:
                error = raised
                self._jobs.pop(job, None)
            self._end(entry, picture, error)

    def _decoded(self, job: Job, entry: _Entry) -> Image:
        begun = time.monotonic()
        entry.future.timings.denoise = begun - entry.joined
        check_latents(job)
        [picture] = self._pipe.images([entry.request], [job])
        entry.future.warnings += Result(images=(picture,), folder=self._pipe.bundle.folder).warnings
        entry.future.timings.decode = time.monotonic() - begun
        return picture

    def _fail(self, error: Exception) -> None:
        """End the jobs that an error concerns: those of its call, or all of them if that is unknown."""
        concerned = [job for job in self._jobs if job.error is not None] or list(self._jobs)
        for job in concerned:
            self._end(self._jobs.pop(job), error=job.error or error)


def _tell(job: Job, entry: _Entry) -> None:
    if entry.progress is not None and entry.told != job.run.step:
        entry.told = job.run.step
        latents = job.run.x.copy() if entry.preview else None
        entry.progress(Progress(step=job.run.step, steps=job.run.steps, latents=latents))
