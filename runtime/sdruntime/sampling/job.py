"""A job: one image in progress, with its table and its inputs of the UNet."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

import numpy as np

from sdruntime.arrays import Array
from sdruntime.sampling.control import ControlInput
from sdruntime.sampling.executor import Run
from sdruntime.sampling.kept import Kept

IN_FLIGHT = 2  # default number of steps queued on a device before the host waits for the first
Row = Mapping[str, Array]  # inputs of the UNet by name, for one row of a call: without the batch axis, read-only


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Following:
    """The pass that follows: `steps` of it and of those after it; `start` makes its job from the latents that this one leaves."""

    steps: int
    start: Callable[[Array], Job]


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One image in progress. `run.x`, float32 [C, h, w], is its latents; between steps the caller may read and edit it.

    `rows`: the UNet's inputs besides `sample` and `timestep`, for each row of a call: (unconditional, conditional), or without
    guidance the conditional row alone; with an image as a second condition (unconditional, image, conditional), of which
    `image_guidance` weighs the first two. `guidances`: the guidance of each step in place of `guidance`; at 1, only the
    conditional row counts. `changes`: step -> the rows from that step on, of the same names and shapes, if the prompt is edited
    on the way. `controls`: the ControlNets that act on it. `kept`: the part of an image that inpainting puts back after each
    step. Set `stopped` to leave the job as it is. `following`: the pass that the job goes on to once `run` is done; `passed`:
    the steps of those before. For messages: `sampler`; `cut`, the part of the prompt that did not fit; `warnings`, texts for
    users. `error`: the error that ended the job's call. The job is then where it was before the call, or is lost with a device's
    state.
    """

    run: Run
    rows: tuple[Row, ...]
    changes: Mapping[int, tuple[Row, ...]] = field(default_factory=dict)
    guidance: float = 1.0
    guidances: tuple[float, ...] = ()
    image_guidance: float = 1.0
    rescale: float = 0.0
    controls: tuple[ControlInput, ...] = ()
    kept: Kept | None = None
    sampler: str = ""
    cut: str = ""
    warnings: tuple[str, ...] = ()
    bundle: Path | None = None  # the bundle's folder, for messages
    adapters: Hashable = None  # what changes the UNet's weights (sdruntime.adapters.sets.AdapterSet), or None
    following: Following | None = None
    passed: int = 0
    stopped: bool = False
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.stopped or (self.run.done and self.following is None)

    @property
    def step(self) -> int:
        """Number of steps done, over all passes."""
        return self.passed + self.run.step

    @property
    def steps(self) -> int:
        """Number of steps, over all passes."""
        return self.passed + self.run.steps + (self.following.steps if self.following else 0)

    def proceed(self) -> None:
        """Go on to the pass that follows: take over its run and its inputs."""
        assert self.following is not None
        following, passed = self.following.start(self.run.x), self.passed + self.run.steps
        for one in fields(self):
            if one.name not in _OF_ALL_PASSES:
                setattr(self, one.name, getattr(following, one.name))
        self.passed = passed

    def finish_early(self) -> None:
        """Stop with the estimate of the finished latents in place of the latents. A step of the pass must have been done."""
        clean, latents = self.run.clean, self.run.x
        assert clean is not None
        self.run.lend(None)  # a loop on a device has nothing newer
        np.copyto(latents, clean)
        self.stopped = True

    @property
    def guided(self) -> bool:
        return len(self.rows) > 1

    @property
    def current_guidance(self) -> float:
        """The guidance of the next step."""
        return self.guidances[self.run.step] if self.guidances else self.guidance

    @property
    def pauses_guidance(self) -> bool:
        """Whether only the conditional row counts in the next step, though others have guidance."""
        return bool(self.guidances) and self.current_guidance == 1

    @property
    def current_rows(self) -> tuple[Row, ...]:
        """The rows of the next step."""
        last = max((step for step in self.changes if step <= self.run.step), default=None)
        return self.rows if last is None else self.changes[last]

    @property
    def sequence(self) -> int:
        """Number of tokens of the text."""
        return len(self.rows[-1]["encoder_hidden_states"])


_OF_ALL_PASSES = ("cut", "warnings", "passed", "stopped", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The state between two model calls.

    `jobs[k].run.x`, the latents of image k, may be edited in place; `jobs[k].stopped = True` stops image k there.
    """

    step: int  # model calls so far
    steps: int  # model calls of the longest job
    jobs: tuple[Job, ...]


class Stepper(Protocol):
    """Advance a group of jobs by one step at a time.

    `finish` brings the jobs' latents up to date, so that another stepper can continue them. If it fails, reading the latents
    raises the error.
    """

    @property
    def jobs(self) -> Sequence[Job]: ...

    def advance(self) -> None: ...

    def finish(self) -> None: ...


def at(step: int, job: Job) -> str:
    """Describe a step of a job, over all passes, for messages."""
    return f"step {step} of {job.steps}" + (f", sampler {job.sampler}" if job.sampler else "")


def after(job: Job) -> str:
    """Describe how far a job has come, for messages."""
    return f"after {at(job.step, job)}"


def grouped(jobs: Sequence[Job]) -> list[list[Job]]:
    """Group jobs that can share a call: of one bundle with the same weights, and with latents and inputs of the same shapes."""
    groups: list[tuple[dict[str, object], list[Job]]] = []
    for job in jobs:
        shapes: dict[str, object] = {"bundle": job.bundle, "adapters": job.adapters, "sample": job.run.x.shape}
        shapes.update({name: array.shape for row in job.rows for name, array in row.items()})
        for known, members in groups:
            if all(known.get(name, shape) == shape for name, shape in shapes.items()):
                known.update(shapes)
                members.append(job)
                break
        else:
            groups.append((shapes, [job]))
    return [members for _, members in groups]


def stacked(rows: Sequence[Row]) -> dict[str, Array]:
    """Stack the rows of a call by name; an input that a row lacks is zeros."""
    like = {name: array for row in rows for name, array in row.items()}
    return {name: np.stack([row[name] if name in row else np.zeros_like(other) for row in rows]) for name, other in like.items()}
