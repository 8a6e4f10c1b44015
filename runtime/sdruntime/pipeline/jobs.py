"""From requests to jobs: tables, encoded texts and first latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from sdruntime.adapters.embedding import Embedding
from sdruntime.adapters.sets import AdapterSet
from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.interface import has_posterior
from sdruntime.bundle.roles import role
from sdruntime.bundle.tasks import GUIDANCE, TIME_IDS, guidance_width, task_of, time_ids_width
from sdruntime.engines.pool import Engines
from sdruntime.errors import EngineError, SettingError, Unsupported
from sdruntime.pipeline.control import component_of, control_inputs, guess_lines, stretched_lines, sums_on_host
from sdruntime.pipeline.images.pixels import to_uint8
from sdruntime.pipeline.images.resampling import resample
from sdruntime.pipeline.loras import Loras
from sdruntime.pipeline.requests.ranges import WHOLE
from sdruntime.pipeline.requests.request import DEFAULTS, Request
from sdruntime.pipeline.tasks import image_prompt, upscaling
from sdruntime.pipeline.tasks.choose import check_task, rows_of, task_start
from sdruntime.pipeline.tasks.image_prompt import ImagePrompts
from sdruntime.pipeline.tasks.micro_conditions import check_conditions, time_ids
from sdruntime.pipeline.tasks.passes import LATENT_KERNELS, PIXEL_KERNELS, Pass, Place, passes_of, placed, refined, rounded_line
from sdruntime.pipeline.tasks.sizes import Shape, cells_of, latent_shape, pixels_of
from sdruntime.pipeline.tasks.start import Setting, Start
from sdruntime.pipeline.tasks.t2i_adapter import Features, check_adapters, features_by_step
from sdruntime.pipeline.tasks.tables import Tables
from sdruntime.pipeline.text.conditioning import Condition, Conditioner, cut_lines
from sdruntime.pipeline.text.embeddings import embeddings_of
from sdruntime.pipeline.texts import Conditions, Texts
from sdruntime.pipeline.vae import latents as latent
from sdruntime.pipeline.vae import resize
from sdruntime.pipeline.vae.tile_size import cell_of, tiling
from sdruntime.sampling.executor import Run
from sdruntime.sampling.grids import FAMILY
from sdruntime.sampling.guidance import guidance_embedding, over_calls, plus_plus
from sdruntime.sampling.job import Following, Job
from sdruntime.sampling.kept import Kept
from sdruntime.sampling.noise.image import ImageNoise
from sdruntime.sampling.samplers import identified
from sdruntime.sampling.table import Table

SCHEDULER = "scheduler/scheduler_config.json"
Value = TypeVar("Value")
GetEngine = Callable[..., Engine]  # (component, rows=…, height=…, …), as `Pipeline.engine`


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """A pass with all that its job is made of."""

    factory: JobFactory
    engine: GetEngine
    step: Pass
    shape: Shape
    table: Table
    texts: Texts
    conditions: Conditions
    guidances: tuple[float, ...]
    adapters: AdapterSet | None

    @property
    def sequence(self) -> int:
        """Number of tokens of the text."""
        return len(next(iter(self.conditions.values())).hidden)

    def encoded(self, *, zero_absent: bool) -> dict[int, list[tuple[str, Condition]]]:
        return self.texts.encoded(self.conditions, zero_absent=zero_absent)


class JobFactory:
    """Make the jobs of a bundle's model. It keeps the tables and encoded texts that requests have in common.

    `engines`: to reject a size before its texts are encoded. `embeddings`: files, besides those in the bundle.
    """

    def __init__(self, bundle: Bundle, engines: Engines, embeddings: Sequence[Path | str] = ()) -> None:
        self._folder, self._model, self._engines = bundle.folder, bundle.manifest.model, engines
        self._components = bundle.manifest.components
        unet = self._components["unet"]
        self.task = task_of(unet)
        self._guidance_width, self._time_ids = guidance_width(unet), time_ids_width(unet)
        self._posterior = has_posterior(bundle.manifest.components["vae_encoder"])
        upscales = self.task == "upscaling"
        self._noise_levels = upscaling.noise_levels(bundle.read_json(upscaling.SCHEDULER)) if upscales else None
        self._conditioner = Conditioner.open(bundle, embeddings_of(bundle, embeddings))
        self.loras = Loras(bundle)
        self._image_prompts = ImagePrompts(self._components, self._folder)
        self.schedule = {**bundle.read_json(SCHEDULER), FAMILY: self._model.family}
        self._tables = Tables(self.schedule)
        self.refiner: tuple[JobFactory, GetEngine] | None = None

    @property
    def sampler(self) -> str:
        """The checkpoint's own sampler: its name, or its diffusers class if no registered sampler matches its settings."""
        row, _ = identified(self.schedule)
        return str(self.schedule["_class_name"]) if row is None else row.name

    def completed(self, request: Request) -> Request:
        """Return the request with the model's defaults in place of None."""
        return request.completed(self._model.defaults)

    def embeddings_in(self, request: Request) -> list[Embedding]:
        """Return the embeddings that a request's texts name."""
        return self._conditioner.embeddings_in([request.prompt, request.prompt_2, request.negative, request.negative_2])

    def forget(self) -> None:
        """Release the encoded texts and images."""
        self._conditioner.forget()
        self._image_prompts.forget()

    def check(self, requests: Sequence[Request]) -> None:
        """Check what needs no engine. Raises SettingError, and UnknownName for a sampler."""
        self.loras.check(requests, self._engines.most_sets)
        for request in map(self.completed, requests):
            check_task(request, self.task)
            if self.task == "upscaling":
                upscaling.check_noise(request, self._model)
            if request.inpaints and self._model.masked_decoder:
                raise Unsupported(
                    "mask: the VAE is an AsymmetricAutoencoderKL, whose decoder takes the image and the mask when inpainting, "
                    "which is not supported: export the model with another VAE (--vae)"
                )
            for control in request.controls:
                component_of(control, self._components)
            self._image_prompts.check(request)
            self._noise(request)
            chain = self._chain(request)
            for place in chain:
                factory = self._of(place.step)
                check_conditions(place.step.request, factory._time_ids)
                factory.latent_shape(place.step.request)
                factory._guidances(place)
                if not place.step.refines:
                    check_adapters(place.step.request, self._size(place.step.request), self._components)

    def jobs(self, requests: Sequence[Request], engine: GetEngine) -> list[Job]:
        """Return a job for each checked request: its texts are encoded and its first latents are made.

        Raises SettingError, EngineError for a size that no engine supports, NotFinite.
        """
        requests = [self.completed(request) for request in requests]
        chains = [self._chain(request) for request in requests]
        stages: dict[Place, _Stage] = {}
        for factory, its_engine in ((self, engine), *([self.refiner] if self.refiner is not None else [])):
            places = [place for chain in chains for place in chain if self._of(place.step) is factory]
            stages |= zip(places, factory._stages(places, its_engine), strict=True)
        return [
            self._chained(request, [stages[place] for place in chain]) for request, chain in zip(requests, chains, strict=True)
        ]

    def _chain(self, request: Request) -> list[Place]:
        """Return the passes of a completed request, each with its number of model calls and theirs."""
        steps = self._passes(request)
        return placed(steps, [self._of(step)._tables.of(step).steps for step in steps])

    def _stages(self, places: Sequence[Place], engine: GetEngine) -> list[_Stage]:
        """Return the stages of passes of this model."""
        sets = self._adapters(places)
        if self._engines.caller_engine is None:  # fail before the texts are encoded
            for place, adapters in zip(places, sets, strict=True):
                self._check_engines(place.step, adapters)
        texts = [self._texts(place, adapters) for place, adapters in zip(places, sets, strict=True)]
        conditions: dict[int, Conditions] = {}
        for adapters in dict.fromkeys(sets):
            same = [k for k, other in enumerate(sets) if other == adapters]
            wordings = [texts[k].wordings for k in same]
            conditions |= zip(same, self._conditioner.encode(wordings, _with(engine, adapters)), strict=True)
        stages = [
            _Stage(
                factory=self,
                engine=_with(engine, sets[k]),
                step=place.step,
                shape=self.latent_shape(place.step.request),
                table=self._tables.of(place.step),
                texts=text,
                conditions=conditions[k],
                guidances=self._guidances(place),
                adapters=sets[k],
            )
            for k, (place, text) in enumerate(zip(places, texts, strict=True))
        ]
        for stage in stages if self._engines.caller_engine is None else ():
            _, height, width = stage.shape
            self._engines.choose("unet", height=height, width=width, sequence=stage.sequence)
        return stages

    def _texts(self, place: Place, adapters: AdapterSet | None) -> Texts:
        """Return the texts of a pass; a refiner goes on with those of the pass before."""
        request = place.step.request
        texts = Texts.of(
            request,
            steps=place.all,
            passed=place.passed,
            conditioner=self._conditioner,
            guided=self._guided(request),
            adapters=adapters.digest_of(*self._conditioner.tokenizers) if adapters is not None else "",
        )
        return texts.after(place.before) if place.before else texts

    def _adapters(self, places: Sequence[Place]) -> list[AdapterSet | None]:
        """Return the LoRAs of each pass, read once for all that share them: a refiner has none, as they are the first model's."""
        requests = {place.step.request.loras: place.step.request for place in places if not place.step.refines}
        sets = {loras: self.loras.set_of(request) for loras, request in requests.items()}
        return [None if place.step.refines else sets[place.step.request.loras] for place in places]

    def _guidances(self, place: Place) -> tuple[float, ...]:
        """Return the guidance of each model call of a pass, () if it is constant. Raises SettingError."""
        request = place.step.request
        if self._guidance_width is not None and len(request.guidances) > 1:
            raise SettingError("guidance: this model takes one guidance as an input: pass a number, not a list")
        if request.cfg_pp and (self._guidance_width is not None or self.task == "instruct_pix2pix"):
            how = "is guided by a text and an image" if self._guidance_width is None else "takes the guidance as an input"
            raise SettingError(f"cfg_pp: this model {how}: omit it")
        if len(request.guidances) == 1 and request.guidance_interval == WHOLE and not request.cfg_pp:
            return ()
        least = 0.0 if request.cfg_pp else 1.0
        whole = over_calls(request.guidances, request.guidance_interval, place.all, least=least)
        values = whole[place.before : place.before + place.calls]
        return plus_plus(self._tables.of(place.step), values, request.sampler or self.sampler) if request.cfg_pp else values

    def _of(self, step: Pass) -> JobFactory:
        """Return the factory that makes the jobs of a pass."""
        return self.refiner[0] if step.refines and self.refiner is not None else self

    def _check_engines(self, step: Pass, adapters: AdapterSet | None) -> None:
        """Raises EngineError if no engine supports a pass."""
        _, height, width = self.latent_shape(step.request)
        encodes, controls = step.resize in PIXEL_KERNELS, () if step.refines else step.request.controls
        try:
            unet = self._engines.choose("unet", height=height, width=width)
            if adapters is not None:
                self._engines.check_adapters(unet)
            for component in [component_of(control, self._components) for control in controls]:
                cell = cell_of(component, self._model.vae_factor)
                self._engines.choose(component, height=height * cell, width=width * cell)
            for component in ("vae_decoder", *(["vae_encoder"] if encodes else [])):
                per_cell = cell_of(component, self._model.vae_factor)
                tiles = tiling(self._engines, component, self._model.vae_factor, height, width)
                self._engines.choose(
                    component, **(tiles.dims if tiles else {"height": height * per_cell, "width": width * per_cell})
                )
        except EngineError as error:
            if step.resize is None:
                raise
            raise EngineError(f"hires: {error}") from error

    def _passes(self, request: Request) -> tuple[Pass, ...]:
        steps = passes_of(request, self.task, self._size(request), self._model.step)
        if self.refiner is not None and request.refiner_at < 1:
            return refined(steps, self.task, self._size(steps[-1].request))
        return steps

    def _size(self, request: Request) -> tuple[int, int]:
        """Return (width, height) of what the first pass generates."""
        return pixels_of(self.latent_shape(request), self._model)

    def generated_size(self, request: Request) -> tuple[int, int]:
        """Return (width, height) of what the last pass generates. Raises SettingError."""
        return self._size(self._passes(request)[-1].request)

    def latent_shape(self, request: Request) -> Shape:
        """Return the shape of a request's latents in its first pass. Raises SettingError for an unsupported size."""
        return latent_shape(request, self._model, self.task)

    def _noise(self, request: Request) -> ImageNoise:
        return ImageNoise(
            request.seed,
            request.rng,
            variation_seed=request.variation_seed,
            variation_strength=request.variation_strength,
            origin=cells_of("seed_resize", request.seed_resize, self._model) if request.seed_resize else None,
        )

    def _start(
        self, stage: _Stage, size: tuple[int, int], noise: ImageNoise, before: Array | None, kept: Kept | None = None
    ) -> Start:
        """Return the start of a pass. `before`: the latents that the pass before has left, `kept`: what its mask keeps."""
        width, height = size
        request, engine = stage.step.request, stage.engine
        if before is not None and stage.step.refines:
            return Start(latents=before if kept is None else kept.over(before, stage.table.levels[0]), kept=kept)
        encoder = functools.partial(engine, "vae_encoder", height=height, width=width)

        def encode(pixels: Array, draw: Array) -> Array:
            latents: Array
            [latents] = latent.encode(pixels[None], draw[None], encoder(), self._model, self._folder)
            return latents

        def encode_mode(pixels: Array) -> Array:
            latents: Array
            [latents] = latent.encode_mode(pixels[None], encoder(), self._folder)
            return latents

        if before is not None and stage.step.resize in PIXEL_KERNELS:
            decoder = engine("vae_decoder", height=before.shape[1], width=before.shape[2])
            [decoded] = latent.decode(before[None], decoder, self._model, lambda _: "after the first pass", self._folder)
            request = replace(request, image=resample(to_uint8(decoded), size, PIXEL_KERNELS[stage.step.resize]))
        setting = Setting(
            request=request,
            table=stage.table,
            shape=stage.shape,
            size=size,
            noise=noise,
            encode=encode,
            encode_mode=encode_mode,
            posterior=self._posterior,
            noise_levels=self._noise_levels,
        )
        if before is not None and stage.step.resize in LATENT_KERNELS:
            resized = resize.resized(before, stage.shape[1:], LATENT_KERNELS[stage.step.resize])
            return Start(latents=setting.noised(resized, setting.first_noise()))
        return task_start(request, self.task)(setting)

    def _chained(self, request: Request, stages: Sequence[_Stage]) -> Job:
        """Return the job of a request's passes: that of the first one, which the others follow."""
        job = _linked(stages)
        size = self._size(request)
        lines = [rounded_line(request, size, self._size(stage.step.request)) for stage in stages[1:]]
        job.warnings = (
            *dict.fromkeys(line for stage in stages for line in stage.factory._lines(stage)),
            *dict.fromkeys(line for line in lines if line is not None),
        )
        return job

    def _job(self, stage: _Stage, noise: ImageNoise, before: Array | None, kept: Kept | None = None) -> Job:
        request, table, shape = stage.step.request, stage.table, stage.shape
        size = self._size(request)
        start = self._start(stage, size, noise, before, kept)
        encoded = stage.encoded(zero_absent=self._model.zero_empty_negative)
        more: list[dict[str, Array]] = [{}, {}]  # of the prompt, and of the negative prompt
        if self._time_ids is not None:
            more = [{TIME_IDS: ids} for ids in reversed(time_ids(request, size, self._time_ids))]
        if self._guidance_width is not None:
            more[0][GUIDANCE] = guidance_embedding(request.guidances[0], self._guidance_width)
        features: dict[int, Features] = {0: {}}
        if not stage.step.refines:
            images = self._image_prompts.rows(request, size, (shape[1], shape[2]), stage.engine)
            for own, entries in zip(more, images, strict=True):
                own.update(entries)
            features = features_by_step(request, size, table.steps, self._components, stage.engine, self._folder)
        rows = {}
        for step in sorted({*encoded, *features}):
            texts, steering = _since(encoded, step), _since(features, step)
            texts_of_rows = [{**text.row, **added, **steering} for (_, text), added in zip(texts, more, strict=False)]
            rows[step] = rows_of(self.task, texts_of_rows[::-1], start.inputs)
        return Job(
            run=Run(table, start.latents, lambda: noise.normal(shape)),
            rows=rows.pop(0),
            changes=rows,
            guidance=stage.guidances[0] if stage.guidances else request.guidances[0],
            guidances=stage.guidances,
            image_guidance=request.image_guidance,
            rescale=request.rescale,
            controls=() if stage.step.refines else control_inputs(request, size, table.steps, self._components),
            kept=start.kept,
            sampler=request.sampler or self.sampler,
            bundle=self._folder,
            adapters=stage.adapters,
            cut=encoded[0][0][1].cut,
        )

    def _lines(self, stage: _Stage) -> Iterator[str]:
        """Yield lines for the user about a pass."""
        encoded = stage.encoded(zero_absent=self._model.zero_empty_negative)
        yield from self._tile_lines(stage.shape)
        if stage.step.refines and stage.step.request.controls:
            yield "control has no effect on the steps of the refiner"
        elif stage.step.request.controls:
            yield from guess_lines(stage.step.request, self._components)
            yield from stretched_lines(stage.step.request, self._size(stage.step.request))
            if sums_on_host(stage.step.request, self._components):
                yield from self._host_lines()
        yield from image_prompt.unused_lines(stage.step.request, refines=stage.step.refines)
        yield from cut_lines(pair for pairs in encoded.values() for pair in pairs)
        yield from self._unused(stage.step.request)
        if not stage.step.refines:
            yield from self.loras.unused(stage.step.request)
        at = stage.step.request.refiner_at
        if stage.step.part is None and self.refiner is None and at != DEFAULTS["refiner_at"]:
            yield f"refiner_at {at:g} has no effect without a refiner"

    def _guided(self, request: Request) -> bool:
        """Return whether a request takes an unconditional row. A distilled model takes the guidance as an input instead."""
        return request.guided and self._guidance_width is None

    def _unused(self, request: Request) -> Iterator[str]:
        yield from upscaling.unused_lines(request, self.task)
        if request.guided and self._guidance_width is not None:
            limited = request.guidance_interval != WHOLE
            names = {"the negative prompt": request.negative, "rescale": request.rescale, "guidance_interval": limited}
            yield from (
                f"{name} has no effect: the model takes the guidance as an input" for name, value in names.items() if value
            )

    def _host_lines(self) -> Iterator[str]:
        """Yield a line if the UNet's loop would otherwise run on a GPU."""
        unet = next((spec for spec in self._engines.chosen if role(spec.component).kind == "denoiser"), None)
        if unet is not None and BACKENDS[unet.backend].loop is not None:
            yield "control: each step returns to the host, which adds up several ControlNets, and residuals that are means"

    def _tile_lines(self, shape: Shape) -> list[str]:
        """Return a line about the tiles of an image, unless the user chose their size."""
        automatic = self._engines.options.tile == "auto"
        tiles = tiling(self._engines, "vae_decoder", self._model.vae_factor, *shape[1:]) if automatic else None
        return [tiles.line] if tiles else []


def _with(engine: GetEngine, adapters: AdapterSet | None) -> GetEngine:
    return engine if adapters is None else functools.partial(engine, adapters=adapters)


def _since(values: Mapping[int, Value], step: int) -> Value:
    """Return the value of the last key that is not after `step`."""
    return values[max(start for start in values if start <= step)]


def _linked(
    stages: Sequence[_Stage], before: Array | None = None, noise: ImageNoise | None = None, kept: Kept | None = None
) -> Job:
    """Return the job of the first stage, from the latents `before`, which the other stages follow.

    `kept`: what the mask of the stage before keeps, which a refiner goes on to keep.

    A refiner goes on with the `noise` of the stage before, as diffusers does with one generator for both pipelines.
    """
    stage, *rest = stages
    noise = noise if noise is not None and stage.step.refines else stage.factory._noise(stage.step.request)
    job = stage.factory._job(stage, noise, before, kept)
    if rest:
        start_kept = job.kept  # which the job loses when it goes on
        steps = sum(stage.table.steps for stage in rest)
        job.following = Following(steps=steps, start=lambda latents: _linked(rest, latents, noise, start_kept))
    return job
