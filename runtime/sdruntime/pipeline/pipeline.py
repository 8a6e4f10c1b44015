"""Generate images: prompt -> tokens -> text encoder -> denoising loop -> VAE -> image."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from sdruntime.adapters.sets import AdapterSet
from sdruntime.arrays import Array
from sdruntime.backends.base.building import Stage
from sdruntime.backends.base.engine import Engine, EngineOptions
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle, opening
from sdruntime.bundle.interface import interface_faults
from sdruntime.bundle.roles import role
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.bundle.tasks import Task
from sdruntime.engines.choose import AUTO
from sdruntime.engines.pool import Engines
from sdruntime.errors import BundleError, SdruntimeError, SettingError, shown
from sdruntime.pipeline.denoise import Call, denoise
from sdruntime.pipeline.images.pixels import Pixels, to_uint8
from sdruntime.pipeline.jobs import JobFactory
from sdruntime.pipeline.metadata.write import Origin
from sdruntime.pipeline.requests.request import Request, requests_from
from sdruntime.pipeline.requests.unused import unused_lines
from sdruntime.pipeline.result import Image, Result
from sdruntime.pipeline.stream import Loop, Stream
from sdruntime.pipeline.tasks.canvas import finished, result_size
from sdruntime.pipeline.tasks.passes import check_refiner
from sdruntime.pipeline.vae import latents as latent
from sdruntime.pipeline.vae.preview import Kind, check_preview, linear_colours, tiny_image
from sdruntime.pipeline.vae.tile_size import Tiling, cell_of, check_tile, tiling
from sdruntime.sampling.job import IN_FLIGHT, Job, Stepper, after

_MOST_RELOADS = 100  # how often a bundle that changes while its engines open is read again


class Pipeline:
    """Generate images with a bundle's engines.

    `open` reads the bundle and chooses engines. The first use, or entering the context, opens them; `close`, or leaving the
    context, releases them.

        with Pipeline.open("bundle") as pipe:
            pipe("a small red circle on the left on a blue background", seed=7).images[0].save("circle.png")

    `options`: how to open the engines (device, threads, settings of the backend's library). `refiner`: a pipeline that goes on
    with each request from its `refiner_at` on and decodes the result; it opens and closes with this one. `embeddings`: files of
    textual inversion, FILE or NAME=FILE, whose names then mean their vectors in prompts.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str = AUTO,
        options: EngineOptions | None = None,
        caller_engine: Callable[[str], Engine] | None = None,
        refiner: Pipeline | None = None,
        embeddings: Sequence[Path | str] = (),
    ) -> None:
        if not isinstance(bundle, Bundle):
            path = shown(os.fspath(bundle)) if isinstance(bundle, str | os.PathLike) else "the path of a bundle"
            raise SettingError(f"Pipeline({shown(bundle)}): to open a bundle, write Pipeline.open({path})")
        if not isinstance(backend, str):
            raise SettingError(f"backend {shown(backend)}: expected a name, such as {AUTO!r}")
        options = EngineOptions() if options is None else options
        if not isinstance(options, EngineOptions):
            raise SettingError(f"options {shown(options)}: expected EngineOptions(...), such as EngineOptions(threads=4)")
        self._loops: weakref.WeakSet[Loop] = weakref.WeakSet()
        busy = functools.partial(_running, self._loops)  # not a bound method: a reference cycle would keep the pipeline alive
        self._make_engines = functools.partial(Engines, backend=backend, options=options, caller_engine=caller_engine, busy=busy)
        self._by_path, self.refiner, self._embeddings = False, refiner, tuple(embeddings)
        self._load(bundle)

    def _load(self, bundle: Bundle) -> None:
        if faults := list(interface_faults(bundle.manifest)):
            raise BundleError(bundle.folder, faults)
        self.bundle, self.model = bundle, bundle.manifest.model
        check_tile(self._make_engines.keywords["options"].tile, self.model)
        self.engines = self._make_engines(bundle)
        self._factory = JobFactory(bundle, self.engines, self._embeddings)
        if self.refiner is not None:
            check_refiner(self.model, self.refiner.model)

    @classmethod
    def open(
        cls,
        bundle: Path | str | Bundle,
        *,
        backend: str = AUTO,
        options: EngineOptions | None = None,
        refiner: Path | str | Bundle | None = None,
        embeddings: Sequence[Path | str] = (),
    ) -> Pipeline:
        """Read a bundle and choose its engines. `refiner`: a second bundle, such as SDXL's refiner; see `Request.refiner_at`.
        It gets the same `embeddings`.

        Other processes may replace a bundle that is passed by path: if that happens before its engines are open, it is read
        again. Raises BundleError for a damaged bundle, EngineError if no engine fits this machine, UnknownName for a backend.
        """
        second = None if refiner is None else cls.open(refiner, backend=backend, options=options, embeddings=embeddings)
        make = functools.partial(cls, backend=backend, options=options, refiner=second, embeddings=embeddings)
        if isinstance(bundle, Bundle):
            return make(bundle)
        pipe = opening(bundle, make)
        pipe._by_path = True
        return pipe

    @classmethod
    def over(cls, bundle: Bundle, caller_engine: Callable[[str], Engine]) -> Pipeline:
        """Return a pipeline over engines that the caller opens and closes; `caller_engine` returns one before each use."""
        return cls(bundle, caller_engine=caller_engine)

    def __repr__(self) -> str:
        backends = ", ".join(sorted({f"{spec.backend} {spec.target}" for spec in self.engines.chosen}))
        state = "closed" if self.engines.closed else "not opened yet" if self.engines.opened is None else "open"
        return f"<Pipeline of {self.bundle!r}, {backends or 'engines of the caller'}, {state}>"

    def __enter__(self) -> Pipeline:
        for _ in self.opening():
            pass
        return self

    def opening(self) -> Iterator[Stage]:
        """Open the engines; yield the progress of loading, in bytes. Exhaust the iterator; `close` releases the engines."""
        try:
            for tries in range(_MOST_RELOADS, -1, -1):
                try:
                    yield from self.engines.opening()
                    break
                except Exception:  # if an engine's file is gone, each library raises an error of its own
                    if not tries or not self._reload():
                        raise
            if self.refiner is not None:
                yield from self.refiner.opening()
        except BaseException:
            self.close()
            raise

    def _open_at_first_use(self) -> None:
        for tries in range(_MOST_RELOADS, -1, -1):
            try:
                self.engines.ready()
                return
            except Exception:
                if not tries or self.engines.closed or not self._reload():
                    raise

    def _reload(self) -> bool:
        """Read the bundle again if it was passed by path and has been replaced. Return whether it was."""
        if not self._by_path or not self.bundle.superseded():
            return False
        self.engines.close()
        opening(self.bundle.folder, self._load)
        return True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the running loops and release the engines. The next use raises an error."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.engines.close)
            if self.refiner is not None:
                stack.callback(self.refiner.close)
            for loop in list(self._loops):
                stack.callback(_close_quietly, loop)
        self._factory.forget()

    @property
    def task(self) -> Task | None:
        """What the UNet is made for besides text to image, or None."""
        return self._factory.task

    @property
    def sampler(self) -> str:
        """The checkpoint's own sampler: its name, or its diffusers class if no registered sampler matches its settings."""
        return self._factory.sampler

    def __call__(self, prompt: str | Request | Sequence[str | Request], **settings: Any) -> Result:
        """Generate images. `settings`: those of `Request`, and `count`, the images per prompt. Image k has the seed `seed` + k.

        Raises SettingError for a setting out of range, EngineError for a size that no engine supports, NotFinite if an engine
        returns NaN or infinity.
        """
        stream = self.stream(prompt, on_device=True, **settings)
        stream.watched = False
        for _ in stream:
            pass
        return stream.result

    def stream(self, prompt: str | Request | Sequence[str | Request], *, on_device: bool = False, **settings: Any) -> Stream:
        """Generate images step by step: the Stream yields a State after each model call, to show, edit or stop.

        `on_device`: run the loop on the GPU if the engines support it. The states are then up to two steps ahead of the GPU.
        Reading latents waits for the GPU, and edits of them are lost.
        """
        requests = [self.completed(request) for request in requests_from(prompt, **settings)]
        jobs = self.jobs(requests)
        for line in (*unused_lines(requests), *dict.fromkeys(line for job in jobs for line in job.warnings)):
            warnings.warn(line, UserWarning, stacklevel=3)

        def loop(stream: Stream) -> Loop:
            on_host = self.steppers
            return self.loop(jobs, (lambda jobs: self.device_steppers(jobs, whole=stream.whole)) if on_device else on_host)

        return Stream(jobs, loop, lambda: Result(images=tuple(self.images(requests, jobs)), folder=self.bundle.folder))

    def jobs(self, requests: Sequence[Request]) -> list[Job]:
        """Return a job for each request, ready for `loop`: its texts are encoded and its first latents are made.

        Raises SettingError, EngineError for a size that no engine supports, NotFinite.
        """
        self._with_refiner().check(requests)
        self._open_at_first_use()  # which may read the bundle again, and make another factory
        return self._with_refiner().jobs(requests, self.engine)

    def _with_refiner(self) -> JobFactory:
        """Return the factory of jobs, with that of the refiner as it is now."""
        if self.refiner is not None:
            self._factory.refiner = (self.refiner._factory, self.refiner.engine)
        return self._factory

    def _of(self, job: Job) -> Pipeline:
        """Return the pipeline that runs the current pass of a job."""
        return self.refiner if self.refiner is not None and job.bundle == self.refiner.bundle.folder else self

    def completed(self, request: Request) -> Request:
        """Return the request with the model's defaults in place of None: steps, guidance and sampler."""
        return self._factory.completed(request)

    def latent_shape(self, request: Request) -> tuple[int, int, int]:
        """Return (channels, height, width) of a request's latents in its first pass.

        Raises SettingError for a size the model does not support.
        """
        return self._factory.latent_shape(request)

    def image_size(self, request: Request) -> tuple[int, int]:
        """Return (width, height) of a request's image. Raises SettingError for a size the model does not support."""
        return result_size(request, self._factory.generated_size(request))

    def loop(self, jobs: Collection[Job], steppers: Callable[[Sequence[Job]], Sequence[Stepper]]) -> Loop:
        """Return the loop `denoise`, which the pipeline closes with itself. `steppers`: `self.steppers` or `device_steppers`."""
        loop = denoise(jobs, steppers)
        for pipe in (self, *([self.refiner] if self.refiner is not None else [])):
            pipe._loops.add(loop)
        return loop

    def images(self, requests: Sequence[Request], jobs: Sequence[Job]) -> list[Image]:
        """Decode the latents of jobs as they are now, in as few calls as their shapes allow. Raises NotFinite."""
        requests = [self.completed(request) for request in requests]
        decoded: dict[int, Array] = {}
        for pipe in {id(pipe): pipe for pipe in map(self._of, jobs)}.values():
            places = [k for k, job in enumerate(jobs) if self._of(job) is pipe]
            describe = lambda k, places=places: after(jobs[places[k]])  # noqa: E731
            decoded |= zip(places, pipe.decode([jobs[k].run.x for k in places], describe), strict=True)
        return [
            Image(
                pixels=finished(request, to_uint8(decoded[k])),
                request=request,
                sampler=request.sampler or self.sampler,
                origin=self._origin(request, job),
                cut=job.cut,
            )
            for k, (request, job) in enumerate(zip(requests, jobs, strict=True))
        ]

    def preview(self, jobs: Sequence[Job], kind: Kind = "linear") -> list[Pixels]:
        """Return how jobs in progress are coming along: their estimates of the finished images, uint8, or noise before step 1.

        `kind`: "linear", [h, w, 3], one pixel for each cell of the latents, almost free; "tiny" and "full", [H, W, 3], decoded by
        the bundle's tiny VAE or by its VAE. Raises UnknownName, Unsupported for a bundle that lacks what it needs, NotFinite.
        """
        check_preview(kind, self.bundle.manifest)
        latents = [job.run.x if job.run.clean is None else job.run.clean for job in jobs]
        if kind == "linear":
            return [linear_colours(clean, self.model) for clean in latents]
        during = [f"the preview {after(job)}" for job in jobs]
        if kind == "tiny":
            return [tiny_image(clean, self.engine, at) for clean, at in zip(latents, during, strict=True)]
        return [to_uint8(image) for image in self.decode(latents, during.__getitem__)]

    def _origin(self, request: Request, job: Job) -> Origin:
        unet = self.engines.choose("unet", **self._unet_dims([job])) if self.engines.caller_engine is None else None
        tiles = self._tiling("vae_decoder", *job.run.x.shape[1:])
        _, height, width = self.latent_shape(request)
        size = width * self.model.vae_factor, height * self.model.vae_factor
        tile = tiles.text if tiles else ""
        refiner = self.refiner.model.name if self.refiner is not None and request.refiner_at < 1 else ""
        return Origin.of(
            request,
            self._factory.schedule,
            self.model.name,
            unet,
            self.task,
            tile=tile,
            size=size,
            refiner=refiner,
            embeddings={embedding.name: embedding.sha256[:12] for embedding in self._factory.embeddings_in(request)},
            loras=self._factory.loras.hashes(request),
        )

    def engine(self, component: str, *, rows: int = 1, adapters: AdapterSet | None = None, **dims: int) -> Engine:
        """Return the best engine of a component for a call with `rows` and `dims`; open it if necessary.

        `adapters`: what changes its weights. For a size that needs tiles, the engine runs another one on them. Raises
        EngineError, SdruntimeError.
        """
        self._open_at_first_use()
        if role(component).stage == "vae" and dims.keys() == {"height", "width"}:
            per_cell = cell_of(component, self.model.vae_factor)
            if tiles := self._tiling(component, dims["height"] // per_cell, dims["width"] // per_cell):
                return tiles.engine(functools.partial(self.engines.engine, component))
        return self.engines.engine(component, rows=rows, adapters=adapters, **dims)

    def _tiling(self, component: str, height: int, width: int) -> Tiling | None:
        """Return the tiles of a VAE component for an image of this size in latent cells, or None if it runs on the whole."""
        return tiling(self.engines, component, self.model.vae_factor, height, width)

    def steppers(self, jobs: Sequence[Job]) -> Sequence[Stepper]:
        """Return the stepper that advances jobs of one shape on the host, in one call of the UNet."""
        pipe = self._of(jobs[0])
        controlled = any(job.controls for job in jobs)
        return [Call(jobs, lambda: pipe._unet_for(jobs), pipe._controlnets_for(jobs) if controlled else None)]

    def device_steppers(self, jobs: Sequence[Job], *, whole: bool = False, ahead: int = IN_FLIGHT) -> Sequence[Stepper]:
        """Return the steppers that run the loop on the GPU, or those of `steppers` if the engines or the jobs do not allow it.

        `whole`: all steps may be launched at once, if the engine options also allow it. `ahead`: how many steps the host may
        queue before it waits for the device.
        """
        if self._of(jobs[0]) is not self:
            return self._of(jobs[0]).device_steppers(jobs, whole=whole, ahead=ahead)
        unet, cells = self._unet_for(jobs), jobs[0].run.x.size
        loop = BACKENDS[unet.spec.backend].loop if self.engines.caller_engine is None else None
        if loop is not None and self.engines.has(STEP, cells=cells):
            whole = whole and self.engines.options.whole_loop
            step = self.engine(STEP, cells=cells)
            if calls := loop(jobs, unet, step, self._controlnets_for(jobs), whole=whole, ahead=ahead):
                return calls
        return self.steppers(jobs)

    def _unet_for(self, jobs: Sequence[Job]) -> Engine:
        adapters = jobs[0].adapters
        return self.engine("unet", adapters=adapters if isinstance(adapters, AdapterSet) else None, **self._unet_dims(jobs))

    def _controlnets_for(self, jobs: Sequence[Job]) -> Callable[[str], Engine]:
        return lambda name: self.engine(name, adapters=None, **self._unet_dims(jobs))

    def _unet_dims(self, jobs: Sequence[Job]) -> dict[str, int]:
        _, height, width = jobs[0].run.x.shape
        rows = sum(len(job.rows) for job in jobs)
        return {"rows": rows, "height": height, "width": width, "sequence": jobs[0].sequence}

    def decode(self, latents: Sequence[Array], during: Callable[[int], str] = "image {}".format) -> list[Array]:
        """Decode latents float32 [C, h, w] to images float32 [3, f·h, f·w] in about [-1, 1], equal shapes in one call.

        Raises NotFinite; `during` describes an image by its index for the message.
        """
        decoded: dict[int, Array] = {}
        for shape in dict.fromkeys(x.shape for x in latents):
            indices = [k for k, x in enumerate(latents) if x.shape == shape]
            engine = self.engine("vae_decoder", rows=len(indices), height=shape[1], width=shape[2])
            batch = np.stack([latents[k] for k in indices])
            describe = lambda row, indices=indices: during(indices[row])  # noqa: E731
            images = latent.decode(batch, engine, self.model, describe, self.bundle.folder)
            decoded |= zip(indices, images, strict=True)
        return [decoded[k] for k in range(len(latents))]


def _running(loops: Iterable[Loop]) -> bool:
    return any(inspect.getgeneratorstate(loop) != inspect.GEN_CLOSED for loop in loops)


def _close_quietly(loop: Loop) -> None:
    """Close a loop. Its error is suppressed, so as not to hide why the pipeline closes; readers of the latents get it."""
    with contextlib.suppress(SdruntimeError):
        loop.close()
