"""From requests to jobs: tables, encoded texts and first latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.tasks import GUIDANCE, TIME_IDS, guidance_width, task_of, time_ids_width
from sdruntime.engines.pool import Engines
from sdruntime.errors import SettingError
from sdruntime.pipeline.micro_conditions import check_conditions, time_ids
from sdruntime.pipeline.ranges import steps_beside
from sdruntime.pipeline.request import Request
from sdruntime.pipeline.tasks.choose import check_task, rows_of, start_strength, task_start
from sdruntime.pipeline.tasks.start import Setting, Start
from sdruntime.pipeline.text.conditioning import Conditioner, cut_lines
from sdruntime.pipeline.texts import Conditions, Texts
from sdruntime.pipeline.vae import latents as latent
from sdruntime.pipeline.vae.tile_size import tiling
from sdruntime.sampling.compile import compile_table
from sdruntime.sampling.executor import Run
from sdruntime.sampling.grids import FAMILY
from sdruntime.sampling.guidance import guidance_embedding
from sdruntime.sampling.job import Job
from sdruntime.sampling.noise.image import ImageNoise
from sdruntime.sampling.samplers import identified
from sdruntime.sampling.table import Table

SCHEDULER = "scheduler/scheduler_config.json"
KEPT_TABLES = 64
HOW_TO_FIT = 'resize it, or pass fit "resize" or "crop" (--fit)'
Shape = tuple[int, int, int]  # (channels, height, width) of latents
GetEngine = Callable[..., Engine]  # (component, rows=…, height=…, …), as `Pipeline.engine`


class JobFactory:
    """Make the jobs of a bundle's model. It keeps the tables and encoded texts that requests have in common.

    `engines`: to reject a size before its texts are encoded.
    """

    def __init__(self, bundle: Bundle, engines: Engines) -> None:
        self._folder, self._model, self._engines = bundle.folder, bundle.manifest.model, engines
        unet = bundle.manifest.components["unet"]
        self.task = task_of(unet)
        self._guidance_width, self._time_ids = guidance_width(unet), time_ids_width(unet)
        self._conditioner = Conditioner.open(bundle)
        self.schedule = {**bundle.read_json(SCHEDULER), FAMILY: self._model.family}
        self._tables: dict[tuple[Any, ...], Table] = {}

    @property
    def sampler(self) -> str:
        """The checkpoint's own sampler: its name, or its diffusers class if no registered sampler matches its settings."""
        row, _ = identified(self.schedule)
        return str(self.schedule["_class_name"]) if row is None else row.name

    def forget(self) -> None:
        """Release the encoded texts."""
        self._conditioner.forget()

    def check(self, requests: Iterable[Request]) -> None:
        """Check what needs no engine. Raises SettingError, and UnknownName for a sampler."""
        for request in requests:
            check_task(request, self.task)
            check_conditions(request, self._time_ids)
            self.latent_shape(request)
            self._noise(request)
            self._table(request)

    def jobs(self, requests: Sequence[Request], engine: GetEngine) -> list[Job]:
        """Return a job for each checked request: its texts are encoded and its first latents are made.

        Raises SettingError, EngineError for a size that no engine supports, NotFinite.
        """
        shapes = [self.latent_shape(request) for request in requests]
        tables = [self._table(request) for request in requests]
        for _, height, width in set(shapes) if self._engines.given is None else ():  # fail before the texts are encoded
            self._engines.choose("unet", height=height, width=width)
            tiles = tiling(self._engines, "vae_decoder", self._model.vae_factor, height, width)
            self._engines.choose("vae_decoder", **(tiles.dims if tiles else {"height": height, "width": width}))
        texts = [
            Texts.of(request, steps=table.steps, conditioner=self._conditioner, guided=self._guided(request))
            for request, table in zip(requests, tables, strict=True)
        ]
        conditions = self._conditioner.encode([text.wordings for text in texts], engine)
        for (_, height, width), encoded in zip(shapes, conditions, strict=True) if self._engines.given is None else ():
            sequence = len(next(iter(encoded.values())).hidden)
            self._engines.choose("unet", height=height, width=width, sequence=sequence)
        return [self._job(*parts, engine) for parts in zip(requests, shapes, tables, texts, conditions, strict=True)]

    def latent_shape(self, request: Request) -> Shape:
        """Return the shape of a request's latents. Raises SettingError for a size the model does not support."""
        width, height = request.size or self._model.default_size[::-1]
        part = request.inpaints and request.mask_padding is not None  # the image may have any size
        image = f"the {'extended ' if any(request.extend) else ''}image is"
        if request.image_size is not None and request.fit is None and not part:
            width, height = request.image_size
            if request.size not in (None, (width, height)):
                raise SettingError(f"{image} {width}x{height}, the size {request.size[0]}x{request.size[1]}: {HOW_TO_FIT}")
        multiple, factor = self._model.size_multiple, self._model.vae_factor
        if width < 1 or height < 1 or width % multiple or height % multiple:
            near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
            given = request.pixels is not None and not part
            size = f"{image} {width}x{height}" if given else f"size {width}x{height}"
            fix = f"; {HOW_TO_FIT}" if given else ""
            raise SettingError(f"{size}: both sides must be multiples of {multiple}, such as {near[0]}x{near[1]}{fix}")
        return self._model.latent_channels, height // factor, width // factor

    def _noise(self, request: Request) -> ImageNoise:
        width, height = request.seed_resize or (0, 0)
        factor = self._model.vae_factor
        if width % factor or height % factor:
            near = "x".join(str(max(factor, round(side / factor) * factor)) for side in (width, height))
            raise SettingError(f"seed_resize {width}x{height}: both sides must be multiples of {factor}, such as {near}")
        return ImageNoise(
            request.seed,
            request.rng,
            variation_seed=request.variation_seed,
            variation_strength=request.variation_strength,
            origin=(height // factor, width // factor) if request.seed_resize else None,
        )

    def _table(self, request: Request) -> Table:
        strength = start_strength(request, self.task)
        options = repr(sorted(request.options.items()))
        key = (request.steps, request.sigmas, request.sampler, request.schedule, strength, options)
        if key not in self._tables:
            if len(self._tables) >= KEPT_TABLES:
                self._tables.clear()
            self._tables[key] = compile_table(
                self.schedule,
                steps=steps_beside(request.sigmas, request.steps),
                sigmas=request.sigmas,
                sampler=request.sampler,
                schedule=request.schedule,
                strength=strength,
                **request.options,
            )
        return self._tables[key]

    def _start(
        self, request: Request, shape: Shape, size: tuple[int, int], table: Table, noise: ImageNoise, engine: GetEngine
    ) -> Start:
        width, height = size
        encoder = functools.partial(engine, "vae_encoder", height=height, width=width)

        def encode(pixels: Array, draw: Array) -> Array:
            latents: Array
            [latents] = latent.encode(pixels[None], draw[None], encoder(), self._model, self._folder)
            return latents

        def encode_mode(pixels: Array) -> Array:
            latents: Array
            [latents] = latent.encode_mode(pixels[None], encoder(), self._folder)
            return latents

        setting = Setting(
            request=request,
            table=table,
            shape=shape,
            size=size,
            noise=noise,
            encode=encode,
            encode_mode=encode_mode,
        )
        return task_start(request, self.task)(setting)

    def _job(self, request: Request, shape: Shape, table: Table, texts: Texts, conditions: Conditions, engine: GetEngine) -> Job:
        noise = self._noise(request)
        size = shape[2] * self._model.vae_factor, shape[1] * self._model.vae_factor
        start = self._start(request, shape, size, table, noise, engine)
        encoded = texts.encoded(conditions, zero_absent=self._model.zero_empty_negative)
        more: list[dict[str, Array]] = [{}, {}]  # of the prompt, and of the negative prompt
        if self._time_ids is not None:
            more = [{TIME_IDS: ids} for ids in reversed(time_ids(request, size, self._time_ids))]
        if self._guidance_width is not None:
            more[0][GUIDANCE] = guidance_embedding(request.guidance, self._guidance_width)
        rows = {}
        for step, pairs in encoded.items():
            texts_of_rows = [{**text.row, **added} for (_, text), added in zip(pairs, more, strict=False)]
            rows[step] = rows_of(self.task, texts_of_rows[::-1], start.inputs)
        return Job(
            run=Run(table, start.latents, lambda: noise.normal(shape)),
            rows=rows.pop(0),
            changes=rows,
            guidance=request.guidance,
            image_guidance=request.image_guidance,
            rescale=request.rescale,
            kept=start.kept,
            sampler=request.sampler or self.sampler,
            bundle=self._folder,
            cut=encoded[0][0][1].cut,
            warnings=(
                *self._tile_lines(shape),
                *cut_lines(pair for pairs in encoded.values() for pair in pairs),
                *self._unused(request),
            ),
        )

    def _guided(self, request: Request) -> bool:
        """Return whether a request takes an unconditional row. A distilled model takes the guidance as an input instead."""
        return request.guided and self._guidance_width is None

    def _unused(self, request: Request) -> Iterator[str]:
        if request.guided and self._guidance_width is not None:
            names = {"the negative prompt": request.negative, "rescale": request.rescale}
            yield from (
                f"{name} has no effect: the model takes the guidance as an input" for name, value in names.items() if value
            )

    def _tile_lines(self, shape: Shape) -> list[str]:
        """Return a line about the tiles of an image, unless the user chose their size."""
        automatic = self._engines.options.tile == "auto"
        tiles = tiling(self._engines, "vae_decoder", self._model.vae_factor, *shape[1:]) if automatic else None
        return [tiles.line] if tiles else []
