"""The sampling loop on a GPU: each step is a UNet call and a call of the component `step`, without the host in between.

A step is captured once as a CUDA graph and launched for every step of every image of its shape. The inputs that change between
steps (timesteps, coefficients, noise) are computed in advance for all steps and copied on the device; guidance and the sampler's
weighted sum are computed there. The host only polls events to see how far the device has come.

The outputs of single steps are not checked for NaN: `denoise` checks the state that is fetched at the end, in which NaN persists.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.backends.base.feeds import padded
from sdruntime.backends.trt.engine import TrtEngine
from sdruntime.backends.trt.frame import FLOAT, Frame, Frames
from sdruntime.bundle.interface import CONTROL_IMAGE, CONTROL_TYPE, is_pooled
from sdruntime.bundle.sampler_step import CLEAN, COND, NOISE, SAMPLE, SOURCES, TARGETS, UNCOND
from sdruntime.errors import SdruntimeError
from sdruntime.sampling.job import IN_FLIGHT, Job, stacked
from sdruntime.system.cuda import ALIGNMENT, Event

_POLL = 50e-6  # seconds between polls of an event


class DeviceCall:
    """A `denoise.Call` that keeps the loop on the GPU, until the first of its jobs has finished its steps.

    `whole`: if the frame has run before, and no job's rows change later, all steps are launched with the first one, and no
    intermediate state can be fetched.
    """

    def __init__(self, jobs: Sequence[Job], frame: Frame, *, whole: bool = False, ahead: int = IN_FLIGHT) -> None:
        self.jobs, self._frame, self._index = jobs, frame, 0
        changing = any(step > job.run.step for job in jobs for step in job.changes)
        self._launch_all, self._launched, self._ahead = whole and not changing, False, ahead
        self._events: collections.deque[Event] = collections.deque()
        frame.busy = True
        try:
            self._load()
        except BaseException:
            frame.session.stream.settle()
            self._leave()
            raise

    def _load(self) -> None:
        jobs, frame = self.jobs, self._frame
        self.steps = min(job.run.steps - job.run.step for job in jobs)
        feeds = _conditions(jobs, frame)
        factors = _factors(jobs, frame, self.steps)
        # a step that no ControlNet acts in follows one that left residuals: with factors of 0 it leaves zeros
        acts = [bool(step.any()) for step in factors]
        self._controlled = [now or before for now, before in zip(acts, [False, *acts], strict=False)]
        frame.unet.upload(feeds)
        written = frame.residuals if self._controlled[0] else ()
        frame.unet.clear(
            tensor.name for tensor in frame.component.optional_inputs if tensor.name not in feeds and tensor.name not in written
        )
        if frame.controlnet is not None:
            frame.controlnet.upload(_control_inputs(jobs, frame))
        frame.load(_program(jobs, frame, self.steps, factors))
        frame.state.array[:] = 0
        for k, job in enumerate(jobs):
            x, m = job.run.windows()
            for slot, values in enumerate((*x, *m)):
                frame.state.array[k, slot] = values.reshape(-1)
        frame.upload_state()
        self._lend(self.fetch)

    def advance(self) -> None:
        """Queue one step. While more than `ahead` steps are in flight, poll their events."""
        self._frame.check_open()
        if self._index and any(job.run.step in job.changes for job in self.jobs):
            self._wait(0)  # steps in flight read the rows
            self._frame.unet.upload(_rows(self.jobs, self._frame))
        if self._launch_all and self._index == 0:
            self._launched = self._frame.run_all(self._controlled)
        if not self._launched:
            self._frame.run(self._index, controlled=self._controlled[self._index])
        self._index += 1
        for job in self.jobs:
            job.run.skip()
        if not self._launched:
            self._events.append(self._frame.session.stream.event())
        self._wait(self._ahead)

    def _wait(self, ahead: int) -> None:
        """Poll until at most `ahead` steps are in flight."""
        while len(self._events) > ahead:
            if self._events[0].reached():
                self._events.popleft().close()
            else:
                time.sleep(_POLL)

    def fetch(self) -> None:
        """Copy the samplers' state to the host. This is the only wait for the device."""
        self._frame.check_open()
        state = self._frame.download_state()
        for k, job in enumerate(self.jobs):
            job.run.restore(state[k], state[k, CLEAN])

    def finish(self) -> None:
        """Fetch the jobs' final state and release the frame. On an error, using the jobs' latents raises it again."""
        try:
            self.fetch()
            self._lend(None)
        except BaseException as error:
            self._frame.session.stream.settle()
            lost = error if isinstance(error, SdruntimeError) else SdruntimeError("interrupted: the latents are lost")
            self._lend(functools.partial(_raise, lost))
            raise
        finally:
            self._leave()

    def _lend(self, fetch: Callable[[], None] | None) -> None:
        for job in self.jobs:
            job.run.lend(fetch)

    def _leave(self) -> None:
        """Release the frame for other jobs."""
        self._frame.busy = False
        with contextlib.ExitStack() as stack:
            while self._events:
                stack.callback(self._events.popleft().close)


def _raise(error: SdruntimeError) -> NoReturn:
    raise error.with_traceback(None)


def device_calls(
    jobs: Sequence[Job],
    unet: Engine,
    step: Engine,
    controlnet: Callable[[str], Engine],
    *,
    whole: bool = False,
    ahead: int = IN_FLIGHT,
) -> list[DeviceCall]:
    """Return the calls that run these jobs, all of one shape, as few as the UNet's profiles allow.

    The list is empty if the loop cannot run on the GPU: rescaled guidance is not linear, guidance by an image takes three rows,
    inpainting may put a part of an image back after each step, the residuals of several ControlNets are added up on the host, a
    table may need all SLOTS rows of state, rows must be aligned, and streamed weights cannot be captured in a graph.
    """
    if not isinstance(unet, TrtEngine) or not isinstance(step, TrtEngine) or not all(map(_fits, jobs)):
        return []
    names = {job.controls[0].component if job.controls else None: None for job in jobs}
    nets: dict[str, TrtEngine] = {}
    for name in names:
        if name is not None:
            net = controlnet(name)
            if not isinstance(net, TrtEngine) or is_pooled(net.component):
                return []
            nets[name] = net
    if any(engine.spec.options.get("weight_streaming") == "true" for engine in (unet, *nets.values())):
        return []
    channels, height, width = jobs[0].run.x.shape
    dims, cells = {"height": height, "width": width, "sequence": jobs[0].sequence}, channels * height * width
    per_job = 2 if any(job.guided for job in jobs) else 1
    sizes = [unet.spec.profiles[index]["batch"] for index in unet.spec.admitting(**dims)]
    most = min(max(high for _, _, high in sizes) // per_job, *(profile["jobs"][2] for profile in step.spec.profiles))
    if len(nets) > 1:  # a call for each ControlNet, and one for the jobs without
        groups = [
            [job for job in jobs if [control.component for control in job.controls] == [name] * (name is not None)]
            for name in names
        ]
    else:
        groups = [list(jobs)]
    parts = [group[start : start + most] for group in groups for start in range(0, len(group), most)] if most else []
    if any(len(part) * cells * FLOAT % ALIGNMENT for part in parts):
        return []
    frames, calls = unet.held.get(Frames, Frames), []
    with contextlib.ExitStack() as stack:
        for part in parts:
            rows = per_job * len(part)
            batch = min(max(low, rows) for low, _, high in sizes if rows <= high)
            shape = {"batch": batch, **dims}
            steering = next((nets[control.component] for job in part for control in job.controls), None)
            if steering is not None and not steering.spec.admits(**shape):
                return []
            make = functools.partial(Frame, unet, step, steering, shape, capacity=len(part), guided=per_job == 2, cells=cells)
            frame = frames.get((steering, per_job, len(part), *shape.values()), make)
            calls.append(DeviceCall(part, frame, whole=whole, ahead=ahead))
            stack.callback(calls[-1].finish)
        stack.pop_all()
    return calls


def _fits(job: Job) -> bool:
    x, m = job.run.windows()
    return job.rescale == 0 and job.kept is None and len(job.controls) <= 1 and len(job.rows) <= 2 and len(x) + len(m) <= CLEAN


def _conditions(jobs: Sequence[Job], frame: Frame) -> Mapping[str, Array]:
    """Return the UNet's inputs before the first step: unconditional rows first, then conditional ones, then padding."""
    return {"sample": padded(_samples(jobs, frame), frame.rows), **_rows(jobs, frame)}


def _factors(jobs: Sequence[Job], frame: Frame, steps: int) -> Array:
    """Return how much each residual of the ControlNet counts, float32 [steps, rows, residuals]."""
    factors = np.zeros((steps, frame.rows, len(frame.residuals)), np.float32)
    for k, job in enumerate(jobs):
        for control in job.controls:
            own = control.factors[job.run.step : job.run.step + steps]
            conditional = k + len(jobs) if frame.guided else k
            factors[:, conditional] = own
            if frame.guided and not control.conditional_only:
                factors[:, k] = own
    return factors


def _control_inputs(jobs: Sequence[Job], frame: Frame) -> dict[str, Array]:
    """Return the images that the ControlNet reads, float32 [rows, 3, H, W], and their types; zeros for jobs without one."""
    first = next(control for job in jobs for control in job.controls)
    inputs = {CONTROL_IMAGE: np.zeros((frame.rows, *first.image.shape), np.float32)}
    if first.type is not None:
        inputs[CONTROL_TYPE] = np.zeros((frame.rows, *first.type.shape), np.float32)
    for k, job in enumerate(jobs):
        for control in job.controls:
            rows = [k, k + len(jobs)] if frame.guided else [k]
            inputs[CONTROL_IMAGE][rows] = control.image
            if control.type is not None:
                inputs[CONTROL_TYPE][rows] = control.type
    return inputs


def _rows(jobs: Sequence[Job], frame: Frame) -> dict[str, Array]:
    """Return the inputs that stay until the prompt of a job changes."""
    rows = [job.current_rows[-1] for job in jobs]
    if frame.guided:
        rows = [job.current_rows[0] for job in jobs] + rows
    return {name: padded(array, frame.rows) for name, array in stacked(rows).items()}


def _samples(jobs: Sequence[Job], frame: Frame) -> Array:
    samples = np.empty((len(jobs), *jobs[0].run.x.shape), np.float32)
    for k, job in enumerate(jobs):
        job.run.model_input(out=samples[k])
    return np.concatenate([samples, samples]) if frame.guided else samples


def _program(jobs: Sequence[Job], frame: Frame, steps: int, factors: Array) -> Array:
    """Return the blocks of all steps, uint8 [steps, block]: timesteps, weights, noise and factors, each at its offset."""
    program = np.zeros((steps, frame.block), np.uint8)
    timesteps = np.zeros((steps, frame.rows), np.float32)
    weights = np.zeros((steps, frame.capacity, TARGETS, SOURCES), np.float32)
    noise = np.zeros((steps, frame.capacity, frame.cells), np.float32)
    for k, job in enumerate(jobs):
        rows = slice(job.run.step, job.run.step + steps)
        timesteps[:, k :: len(jobs)] = job.run.table.t[rows, None]
        weights[:, k] = _weights(job)[rows]
        for index, term in enumerate(job.run.draw_ahead(steps)):
            if term is not None:
                noise[index, k] = term.reshape(-1)
    inputs = (timesteps, weights, noise, factors)
    for offset, part in zip(frame.offsets, inputs if frame.residuals else inputs[:-1], strict=True):
        flat = part.reshape(steps, -1).view(np.uint8)
        program[:, offset : offset + flat.shape[1]] = flat
    return program


def _weights(job: Job) -> Array:
    """Return the `weights` input of `step` for each row of a job's table, float32 [steps, TARGETS, SOURCES]."""
    table = job.run.table
    x, m = table.X.shape[1], max(table.M.shape[1] - 1, 0)  # slots: the last x, then the model outputs before the newest
    weights = np.zeros((table.steps, TARGETS, SOURCES))
    guidance = np.array(job.guidances) if job.guidances else np.full(table.steps, job.guidance)
    output = {UNCOND: 1 - guidance, COND: guidance} if job.guided else {COND: np.ones(table.steps)}
    weights[:, 0, :x] = table.X
    weights[:, 0, x : x + m] = table.M[:, 1:]
    weights[:, 0, NOISE] = 1
    for source, share in output.items():
        if table.M.shape[1]:
            weights[:, 0, source] = share * table.M[:, 0]
        if m:
            weights[:, x, source] = share
    weights[:, CLEAN, 0] = table.clean[:, 0]
    for source, share in output.items():
        weights[:, CLEAN, source] = share * table.clean[:, 1]
    for slot in (*range(1, x), *range(x + 1, x + m)):
        weights[:, slot, slot - 1] = 1
    weights[:-1, SAMPLE] = table.scale[1:, None] * weights[:-1, 0]
    return weights.astype(np.float32)
