"""A job: one image on its way through the steps of its table, and what the UNet is given for it beside sample and timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sdruntime.arrays import Array
from sdruntime.sampling.executor import Run

IN_FLIGHT = 2  # steps that are queued on a device before the host waits for the first of them, by default
Row = Mapping[str, Array]  # inputs of the UNet by name, for one row of a call: without the axis `batch`, to be read only


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One image on its way. `run.x` float32 [C, h, w] is the latents: between steps a caller may read and edit it.

    `rows`: what each of its rows in a call is given beside `sample` and `timestep`, either (unconditional, conditional) or the
    conditional one alone, without guidance. Set `stopped` to leave the job as it is. `sampler` is for messages, and so are `cut`,
    what of the prompt did not fit, and `warnings`, lines for a person. `error`: what ended the call that the job was in; the job
    is where it was before, or is lost with a device's state.
    """

    run: Run
    rows: tuple[Row, ...]
    guidance: float = 1.0
    rescale: float = 0.0
    sampler: str = ""
    cut: str = ""
    warnings: tuple[str, ...] = ()
    bundle: Path | None = None  # its folder, for messages too
    stopped: bool = False
    error: Exception | None = None

    @property
    def done(self) -> bool:
        return self.stopped or self.run.done

    @property
    def guided(self) -> bool:
        return len(self.rows) == 2

    @property
    def sequence(self) -> int:
        """Tokens of its text."""
        return len(self.rows[-1]["encoder_hidden_states"])


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Between two model calls.

    `jobs[k].run.x`, the latents of image k, may be edited in place; `jobs[k].stopped = True` leaves it as it is.
    """

    step: int  # model calls so far
    steps: int  # model calls of the longest job
    jobs: tuple[Job, ...]


class Stepper(Protocol):
    """Some jobs on their way together. `finish` leaves them where they are, for others to go on with; where it cannot, reading
    their latents raises why."""

    @property
    def jobs(self) -> Sequence[Job]: ...

    def advance(self) -> None: ...

    def finish(self) -> None: ...


def at(step: int, job: Job) -> str:
    """For a person: a step of a job."""
    return f"step {step} of {job.run.steps}" + (f", sampler {job.sampler}" if job.sampler else "")


def after(job: Job) -> str:
    """For a person: how far a job has come."""
    return f"after {at(job.run.step, job)}"


def grouped(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that can share a call: their latents have one shape, and so has each input that several of them have."""
    groups: list[tuple[dict[str, tuple[int, ...]], list[Job]]] = []
    for job in jobs:
        shapes = {"sample": job.run.x.shape} | {name: array.shape for row in job.rows for name, array in row.items()}
        for known, members in groups:
            if all(known.get(name, shape) == shape for name, shape in shapes.items()):
                known.update(shapes)
                members.append(job)
                break
        else:
            groups.append((shapes, [job]))
    return [members for _, members in groups]


def stacked(rows: Sequence[Row]) -> dict[str, Array]:
    """The rows of a call, stacked by name; a row has zeros for what only others have."""
    like = {name: array for row in rows for name, array in row.items()}
    return {name: np.stack([row[name] if name in row else np.zeros_like(other) for row in rows]) for name, other in like.items()}
