"""Prompt -> tokens -> text encoder -> denoise -> VAE -> image."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.building import Stage
from sdruntime.backends.base.engine import Engine, EngineOptions
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle, opening
from sdruntime.bundle.interface import interface_faults
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.engines.choose import AUTO
from sdruntime.engines.pool import Engines
from sdruntime.errors import BundleError, SdruntimeError, SettingError
from sdruntime.pipeline import latents as latent
from sdruntime.pipeline.denoise import Call, denoise
from sdruntime.pipeline.images.imagefile import fitted
from sdruntime.pipeline.images.pixels import from_uint8, to_uint8
from sdruntime.pipeline.metadata import Origin
from sdruntime.pipeline.ranges import steps_beside
from sdruntime.pipeline.request import Request, requests, unused_lines
from sdruntime.pipeline.result import Image, Result
from sdruntime.pipeline.text.conditioning import Condition, Conditioner, cut_lines
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.executor import Run
from sdruntime.sampling.job import IN_FLIGHT, Job, State, Stepper, after
from sdruntime.sampling.noise import NoiseStream
from sdruntime.sampling.samplers import identified
from sdruntime.sampling.table import Table

SCHEDULER = "scheduler/scheduler_config.json"
KEPT_TABLES = 64
FITTING = 'resize it, or pass fit "resize" or "crop" (--fit)'
_REOPENED = 100  # times that engines are opened again because the bundle changed meanwhile
Loop = Generator[None, None, None]  # of `denoise`


class Stream:
    """The images being generated: iterate for a State after each model call, then read `result`.

    Leaving the loop early is a way to stop: `result` is then made of the latents as they are.
    """

    def __init__(
        self,
        pipe: Pipeline,
        asked: Sequence[Request],
        jobs: Sequence[Job],
        *,
        on_device: bool,
    ) -> None:
        self.jobs = tuple(jobs)
        self._pipe, self._asked, self._on_device = pipe, asked, on_device
        self._states, self.watched = self._walk(), True

    def __iter__(self) -> Iterator[State]:
        return self._states

    def close(self) -> None:
        """End the loop where it is: nothing is left on a device."""
        self._states.close()

    def _walk(self) -> Generator[State, None, None]:
        steps = max(job.run.steps for job in self.jobs)
        steppers = self._device_steppers if self._on_device else self._pipe.steppers
        with contextlib.closing(self._pipe.loop(self.jobs, steppers)) as loop:
            for step, _ in enumerate(loop, start=1):
                yield State(step=step, steps=steps, jobs=self.jobs)

    def _device_steppers(self, jobs: Sequence[Job]) -> Sequence[Stepper]:
        """Run all steps at once only if nobody watches and all jobs end together; when one ends, they are grouped again."""
        together = len({job.run.steps - job.run.step for job in self.jobs if not job.done}) == 1
        return self._pipe.device_steppers(jobs, whole=together and not self.watched)

    @functools.cached_property
    def result(self) -> Result:
        self.close()
        return Result(images=tuple(self._pipe.images(self._asked, self.jobs)), folder=self._pipe.bundle.folder)


class Pipeline:
    """A bundle, ready to generate images.

    `open` reads it and chooses engines; the first use, or entering the context, opens them; `close` or leaving it releases them.

        with Pipeline.open("bundle") as pipe:
            pipe("a small red circle on the left on a blue background", seed=7).images[0].save("circle.png")

    `options` say how engines are opened (device, threads, the library's own settings).
    """

    def __init__(
        self, bundle: Bundle, *, backend: str, options: EngineOptions, given: Callable[[str], Engine] | None = None
    ) -> None:
        self._loops: weakref.WeakSet[Loop] = weakref.WeakSet()
        busy = functools.partial(_under_way, self._loops)  # not a method: no cycle keeps a pipeline that nobody holds
        self._engines_of = functools.partial(Engines, backend=backend, options=options, given=given, busy=busy)
        self._follows = False
        self._take(bundle)

    def _take(self, bundle: Bundle) -> None:
        if faults := list(interface_faults(bundle.manifest)):
            raise BundleError(bundle.folder, faults)
        self.bundle, self.model = bundle, bundle.manifest.model
        self.engines = self._engines_of(bundle)
        self._conditioner = Conditioner.open(bundle)
        self._schedule = bundle.read_json(SCHEDULER)
        self._tables: dict[tuple[Any, ...], Table] = {}

    @classmethod
    def open(cls, bundle: Path | str | Bundle, *, backend: str = AUTO, options: EngineOptions | None = None) -> Pipeline:
        """Raises BundleError for a damaged bundle, EngineError where no engine fits this machine, UnknownName for a backend.

        A bundle that is given by its path may be changed by others until its engines are open: it is opened again then.
        """
        make = functools.partial(cls, backend=backend, options=options or EngineOptions())
        if isinstance(bundle, Bundle):
            return make(bundle)
        pipe = opening(bundle, make)
        pipe._follows = True
        return pipe

    @classmethod
    def over(cls, bundle: Bundle, given: Callable[[str], Engine]) -> Pipeline:
        """A pipeline over engines that the caller opens and closes: `given` returns a component's before each use."""
        return cls(bundle, backend=AUTO, options=EngineOptions(), given=given)

    def __repr__(self) -> str:
        backends = ", ".join(sorted({f"{spec.backend} {spec.target}" for spec in self.engines.chosen}))
        state = "closed" if self.engines.closed else "not opened yet" if self.engines.opened is None else "open"
        return f"<Pipeline of {self.bundle!r}, {backends or 'engines of the caller'}, {state}>"

    def __enter__(self) -> Pipeline:
        for _ in self.opening():
            pass
        return self

    def opening(self) -> Iterator[Stage]:
        """Open the engines, as a loop that the caller owns: what is being loaded, in bytes. Leave it to its end, then `close`."""
        try:
            for tries in range(_REOPENED, -1, -1):
                try:
                    yield from self.engines.opening()
                    return
                except Exception:  # libraries raise their own where an engine's file is gone
                    if not tries or not self._follow():
                        raise
        except BaseException:
            self.close()
            raise

    def _open_at_first_use(self) -> None:
        for tries in range(_REOPENED, -1, -1):
            try:
                self.engines.ready()
                return
            except Exception:
                if not tries or self.engines.closed or not self._follow():
                    raise

    def _follow(self) -> bool:
        """Take the bundle as it is now, if it was given by its path and has changed since."""
        if not self._follows or not self.bundle.superseded():
            return False
        self.engines.close()
        opening(self.bundle.folder, self._take)
        return True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self.engines.close)
            for loop in list(self._loops):
                stack.callback(_abandon, loop)
        self._conditioner.forget()

    @property
    def sampler(self) -> str:
        """The checkpoint's own sampler: its name in the registry, or its diffusers class if no name says what the file sets."""
        row, _ = identified(self._schedule)
        return str(self._schedule["_class_name"]) if row is None else row.name

    def __call__(self, prompt: str | Request | Sequence[str | Request], **settings: Any) -> Result:
        """Generate images. `settings` are those of `Request`, and `count`: images per prompt. Image k has the seed `seed` + k.

        Raises SettingError for a setting out of range, EngineError for a size that no engine takes, NotFinite for an engine whose
        numbers are no image.
        """
        stream = self.stream(prompt, on_device=True, **settings)
        stream.watched = False
        for _ in stream:
            pass
        return stream.result

    def stream(self, prompt: str | Request | Sequence[str | Request], *, on_device: bool = False, **settings: Any) -> Stream:
        """The same as a loop that the caller owns: a State after each model call, to show, to edit, to stop.

        `on_device`: where the engines can, the loop stays on the GPU and the states run ahead of it by two steps at most. Then
        latents may be looked at, which waits for the device, but edits of them are lost.
        """
        asked = requests(prompt, **settings)
        jobs = self.jobs(asked)
        for line in (*unused_lines(asked), *dict.fromkeys(line for job in jobs for line in job.warnings)):
            warnings.warn(line, UserWarning, stacklevel=3)
        return Stream(self, asked, jobs, on_device=on_device)

    def jobs(self, asked: Sequence[Request]) -> list[Job]:
        """What `loop` advances, one for each request: its texts encoded, its latents begun.

        Raises SettingError, EngineError for a size that no engine takes, NotFinite.
        """
        shapes = [self.latent_shape(request) for request in asked]
        tables = [self._table(request) for request in asked]
        self.engines.ready()
        for _, height, width in set(shapes):
            for component in ("unet", "vae_decoder") if self.engines.given is None else ():
                self.engines.choose(component, height=height, width=width)
        texts = [request.prompt for request in asked]
        texts += [request.negative or "" for request in asked if request.guided]
        conditions = self._conditioner.encode(texts, self.engine)
        return [self._job(request, shape, table, conditions) for request, shape, table in zip(asked, shapes, tables, strict=True)]

    def loop(self, jobs: Collection[Job], steppers: Callable[[Sequence[Job]], Sequence[Stepper]]) -> Loop:
        """`denoise`, closed with the pipeline. `steppers` is one of the pipeline's own, or chooses between them."""
        loop = denoise(jobs, steppers)
        self._loops.add(loop)
        return loop

    def images(self, asked: Sequence[Request], jobs: Sequence[Job]) -> list[Image]:
        """The images of jobs as they are now, decoded in as few calls as their shapes allow. Raises NotFinite."""
        decoded = self.decode([job.run.x for job in jobs], lambda k: after(jobs[k]))
        return [
            Image(
                pixels=to_uint8(decoded_image),
                request=request,
                sampler=request.sampler or self.sampler,
                origin=self._origin(request, job),
                cut=job.cut,
            )
            for decoded_image, request, job in zip(decoded, asked, jobs, strict=True)
        ]

    def _origin(self, request: Request, job: Job) -> Origin:
        unet = self.engines.choose("unet", **self._unet_dims([job])) if self.engines.given is None else None
        return Origin.of(request, self._schedule, self.model.name, unet)

    def engine(self, component: str, *, rows: int = 1, **dims: int) -> Engine:
        """The best engine of a component for a call of `rows` that admits `dims`, opened now if need be.

        Raises EngineError, SdruntimeError.
        """
        self._open_at_first_use()
        return self.engines.engine(component, rows=rows, **dims)

    def steppers(self, jobs: Sequence[Job]) -> Sequence[Stepper]:
        """What advances jobs of one shape, on the host: one call of the UNet for all of them."""
        return [Call(jobs, lambda: self._unet_for(jobs))]

    def device_steppers(self, jobs: Sequence[Job], *, whole: bool = False, ahead: int = IN_FLIGHT) -> Sequence[Stepper]:
        """What advances them with the loop on the GPU, where the engines and the jobs are such; else as `steppers`.

        `whole`: all of their steps may be launched at once, if the options say so too. `ahead`: by how many steps the host may
        run ahead of the device.
        """
        unet, cells = self._unet_for(jobs), jobs[0].run.x.size
        loop = BACKENDS[unet.spec.backend].loop if self.engines.given is None else None
        if loop is not None and self.engines.has(STEP, cells=cells):
            whole = whole and self.engines.options.whole_loop
            if calls := loop(jobs, unet, self.engine(STEP, cells=cells), whole=whole, ahead=ahead):
                return calls
        return self.steppers(jobs)

    def _unet_for(self, jobs: Sequence[Job]) -> Engine:
        return self.engine("unet", **self._unet_dims(jobs))

    def _unet_dims(self, jobs: Sequence[Job]) -> dict[str, int]:
        _, height, width = jobs[0].run.x.shape
        rows = sum(len(job.rows) for job in jobs)
        return {"rows": rows, "height": height, "width": width, "sequence": jobs[0].sequence}

    def decode(self, latents: Sequence[Array], during: Callable[[int], str] = "image {}".format) -> list[Array]:
        """Each of the latents float32 [C, h, w] as an image float32 [3, f·h, f·w] in about [-1, 1]; equal shapes go together.

        `during` names an image by its number, for the error NotFinite.
        """
        decoded: dict[int, Array] = {}
        for shape in dict.fromkeys(x.shape for x in latents):
            where = [k for k, x in enumerate(latents) if x.shape == shape]
            engine = self.engine("vae_decoder", rows=len(where), height=shape[1], width=shape[2])
            cells = np.stack([latents[k] for k in where])
            whose = lambda row, where=where: during(where[row])  # noqa: E731
            pictures = latent.decode(cells, engine, self.model, whose, self.bundle.folder)
            decoded |= zip(where, pictures, strict=True)
        return [decoded[k] for k in range(len(latents))]

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a request. Raises SettingError for a size that the model cannot have."""
        width, height = request.size or self.model.default_size[::-1]
        if request.pixels is not None and request.fit is None:
            height, width = request.pixels.shape[:2]
            if request.size not in (None, (width, height)):
                raise SettingError(f"the image is {width}x{height}, the size {request.size[0]}x{request.size[1]}: {FITTING}")
        multiple, factor = self.model.size_multiple, self.model.vae_factor
        if width < 1 or height < 1 or width % multiple or height % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
            what = f"the image is {width}x{height}" if request.pixels is not None else f"size {width}x{height}"
            way = f"; {FITTING}" if request.pixels is not None else ""
            raise SettingError(f"{what}: both sides must be multiples of {multiple}, such as {near[0]}x{near[1]}{way}")
        return self.model.latent_channels, height // factor, width // factor

    def _table(self, request: Request) -> Table:
        strength = request.strength if request.pixels is not None else None
        options = repr(sorted(request.options.items()))
        key = (request.steps, request.sigmas, request.sampler, request.schedule, strength, options)
        if key not in self._tables:
            if len(self._tables) >= KEPT_TABLES:
                self._tables.clear()
            self._tables[key] = compile_table(
                self._schedule,
                steps=steps_beside(request.sigmas, request.steps),
                sigmas=request.sigmas,
                sampler=request.sampler,
                schedule=request.schedule,
                strength=strength,
                **request.options,
            )
        return self._tables[key]

    def _job(self, request: Request, shape: tuple[int, int, int], table: Table, conditions: Mapping[str, Condition]) -> Job:
        noise = NoiseStream(request.seed)
        if request.pixels is None:
            first = table.start[1] * noise.normal(shape)
        else:
            height, width = (side * self.model.vae_factor for side in shape[1:])
            start = fitted(request.pixels, (width, height), request.fit) if request.fit else request.pixels
            pixels = from_uint8(start)[None]
            encoder = self.engine("vae_encoder", height=height, width=width)
            clean = latent.encode(pixels, noise.normal((1, *shape)), encoder, self.model, self.bundle.folder)[0]
            first = table.start[0] * clean + table.start[1] * noise.normal(shape)
        condition = conditions[request.prompt]
        encoded = [(request.prompt, condition)]
        if request.guided:
            absent = request.negative is None and self.model.zero_empty_negative
            encoded += [(request.negative or "", condition.zeros() if absent else conditions[request.negative or ""])]
        sizes = {} if condition.pooled is None else {"time_ids": latent.time_ids(shape, self.model)}
        return Job(
            run=Run(table, first.astype(np.float32), lambda: noise.normal(shape)),
            rows=tuple({**each.row, **sizes} for _, each in reversed(encoded)),
            guidance=request.guidance,
            rescale=request.rescale,
            sampler=request.sampler or self.sampler,
            bundle=self.bundle.folder,
            cut=condition.cut,
            warnings=tuple(cut_lines(encoded)),
        )


def _under_way(loops: Iterable[Loop]) -> bool:
    return any(inspect.getgeneratorstate(loop) != inspect.GEN_CLOSED for loop in loops)


def _abandon(loop: Loop) -> None:
    """Close it. An error is raised to readers of its latents, and does not hide why the pipeline is closed."""
    with contextlib.suppress(SdruntimeError):
        loop.close()
