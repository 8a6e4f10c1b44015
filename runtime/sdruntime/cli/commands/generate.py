"""The command `generate`: images from a bundle."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdruntime.cli.terminal import Failed, document, pairs
from sdruntime.errors import SdruntimeError, SettingError

if TYPE_CHECKING:
    from sdruntime.backends.base.engine import EngineOptions
    from sdruntime.cli.previews import Previews
    from sdruntime.cli.progress import Reporter
    from sdruntime.pipeline.pipeline import Pipeline
    from sdruntime.pipeline.requests.control import Control
    from sdruntime.pipeline.requests.image_prompt import ImagePrompt
    from sdruntime.pipeline.requests.request import Request
    from sdruntime.pipeline.result import Image, Result


def sampler_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the pairs of --option KEY=VALUE, with each VALUE read as JSON if it is valid JSON, else as text."""
    settings: dict[str, Any] = {}
    for key, value in pairs(options.option, "eta=0.5"):
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def generate(options: argparse.Namespace) -> None:
    """Run `sdruntime generate`."""
    from sdruntime.cli import outputs
    from sdruntime.pipeline.images.png import png_from_image
    from sdruntime.pipeline.jobs import SCHEDULER
    from sdruntime.pipeline.pipeline import Pipeline
    from sdruntime.pipeline.requests.ranges import NUMBERS
    from sdruntime.pipeline.requests.request import requests_from
    from sdruntime.pipeline.requests.tags import with_tagged
    from sdruntime.sampling.samplers import meaning
    from sdruntime.system.sizes import parse_size

    if options.fit is not None and options.image is None:
        raise SettingError(f"--fit {options.fit} has no effect without --image")
    if options.refiner is None and options.refiner_at != NUMBERS["refiner_at"]:
        raise SettingError(f"--refiner-at {options.refiner_at:g} has no effect without --refiner")
    if options.mask is not None and options.image is None:
        raise SettingError("--mask marks a part of an image: add --image")
    if options.depth is not None and options.image is None:
        raise SettingError("--depth is that of an image: add --image")
    if options.strength is not None and options.image is None:
        raise SettingError(f"--strength {options.strength:g} has no effect without --image")
    previews = previews_of(options)
    settings = {
        "negative": options.negative,
        "prompt_2": options.prompt_2,
        "negative_2": options.negative_2,
        "prompt_syntax": options.prompt_syntax,
        "emphasis": options.emphasis,
        "clip_skip": options.clip_skip,
        "steps": options.steps,
        "sigmas": options.sigmas,
        "sampler": options.sampler,
        "schedule": options.schedule,
        "guidance": options.guidance,
        "guidance_interval": options.guidance_interval,
        "image_guidance": options.image_guidance,
        "rescale": options.rescale,
        "cfg_pp": options.cfg_pp,
        "size": parse_size(options.size) if options.size else None,
        "rng": options.rng,
        "variation_seed": options.variation_seed,
        "variation_strength": options.variation_strength,
        "seed_resize": parse_size(options.seed_resize) if options.seed_resize else None,
        "original_size": parse_size(options.original_size) if options.original_size else None,
        "crop": options.crop,
        "target_size": parse_size(options.target_size) if options.target_size else None,
        "noise_level": options.noise_level,
        "aesthetic_score": options.aesthetic_score,
        "negative_aesthetic_score": options.negative_aesthetic_score,
        "image": options.image,
        "mask": options.mask,
        "depth": options.depth,
        "mask_blur": options.mask_blur,
        "mask_padding": options.mask_padding,
        "mask_fill": options.mask_fill,
        "overlay": options.overlay,
        "extend": options.extend,
        "refiner_at": options.refiner_at,
        "hires": options.hires,
        "hires_strength": options.hires_strength,
        "hires_steps": options.hires_steps,
        "hires_resize": options.hires_resize,
        "fit": options.fit,
        "loras": options.loras,
        "control": [control_of(text) for text in options.control],
        "guess_mode": options.guess_mode,
        "image_prompt": image_prompt_of(options.image_prompt, options.image_prompt_mask, options.image_prompt_scale),
        "options": sampler_options(options),
    }
    if options.strength is not None:
        settings["strength"] = options.strength
    all_requests = requests_from(options.prompt, count=options.count, seed=options.seed, **settings)
    all_requests = [with_tagged(request, options.lora_dir) for request in all_requests]
    if options.lora_dir is not None and not any(len(request.loras) > len(options.loras) for request in all_requests):
        raise SettingError(f"--lora-dir {options.lora_dir} has no effect: no prompt has a tag such as <lora:name:0.8>")
    if options.output == str(outputs.STDOUT) and (options.json or sys.stdout.isatty()):
        other = "--json: both write to standard output" if options.json else "a terminal: redirect it, or name a file"
        raise SettingError(f"--output - with {other}")
    outputs.check_sheet(len(all_requests) if options.grid else 1)
    places = outputs.paths(options.output, all_requests[:1] if options.grid else all_requests, overwrite=options.overwrite)
    reporter: Reporter = options.progress
    written: list[dict[str, Any]] = []
    warned: list[str] = []
    if options.seed is None and not (options.json or options.quiet):  # the document and the images have the seed
        reporter.note(f"seed {all_requests[0].seed} (random): --seed {all_requests[0].seed} generates the same image again")
    if options.variation_strength and options.variation_seed is None and not (options.json or options.quiet):
        reporter.note(f"variation seed {all_requests[0].variation_seed} (random)")

    def write(path: Path, image: Image, *parts: Image) -> None:
        """Write one file. `parts`: the images on a sheet, or `image` itself."""
        if path == outputs.STDOUT:
            sys.stdout.buffer.write(png_from_image(image.pixels, image.text()))
        else:
            image.save(path, overwrite=options.overwrite)
            if not options.json:
                reporter.print(str(path))
        written.extend({"file": str(path), "seed": part.seed, "prompt": part.request.prompt, "cut": part.cut} for part in parts)

    opened = {
        "backend": options.backend,
        "options": engine_options(options),
        "refiner": options.refiner,
        "embeddings": options.embedding,
    }
    pipe = Pipeline.open(options.bundle, **opened)
    try:
        with contextlib.closing(pipe):
            images: list[Image] = []  # for a sheet
            remaining = iter(places)
            named = {"sampler": options.sampler, "schedule": options.schedule, **settings["options"]}
            if not options.json and (line := meaning(pipe.bundle.read_json(SCHEDULER), **named)):
                reporter.note(line)
            if previews is not None:
                previews.check(pipe)
            for result in generate_groups(pipe, all_requests, reporter, previews):
                if options.grid:
                    images += result.images
                else:
                    for image in result.images:
                        write(next(remaining), image, image)
                for text in result.warnings:
                    reporter.note(f"warning: {text}")
                    warned.append(text)
            if options.grid:
                write(next(remaining), outputs.sheet(images), *images)
    except (SdruntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
        raise Failed(error, pictures=written, warnings=warned) from error
    if options.json:
        document(pictures=written, warnings=warned)


def control_of(settings: dict[str, str]) -> Control:
    """Return the Control of one --control."""
    from sdruntime.pipeline.requests.control import CONTROL_NUMBERS, Control

    read = dict.fromkeys(CONTROL_NUMBERS, float) | {"type": int}
    return Control(**{key: read.get(key, str)(text) for key, text in settings.items()})  # type: ignore[arg-type]


def image_prompt_of(files: list[str], masks: list[str], scale: float | None) -> ImagePrompt | None:
    """Return the ImagePrompt of --image-prompt, --image-prompt-mask and --image-prompt-scale. Raises SettingError."""
    from sdruntime.pipeline.requests.image_prompt import DEFAULT_SCALE, ImagePrompt

    if not files:
        if scale is not None:
            raise SettingError(f"--image-prompt-scale {scale:g} has no effect without --image-prompt")
        if masks:
            raise SettingError(f"--image-prompt-mask {masks[0]} has no effect without --image-prompt")
        return None
    return ImagePrompt(image=files, mask=masks or None, scale=DEFAULT_SCALE if scale is None else scale)


def engine_options(options: argparse.Namespace) -> EngineOptions:
    """Return the engine options of the command's options."""
    from sdruntime.backends.base.engine import EngineOptions
    from sdruntime.system.sizes import parse_bytes

    return EngineOptions(
        device=options.device,
        threads=options.threads,
        memory=parse_bytes(options.vram_budget) if options.vram_budget else None,
        low_memory=options.low_memory,
        tile=int(options.tile) if options.tile.isdecimal() and len(options.tile) < 6 else options.tile,
        measure=not options.no_measure,
        session=dict(pairs(options.session, "engine_host_code=true", "--session")),
    )


def previews_of(options: argparse.Namespace) -> Previews | None:
    """Return the previews that the options ask for. Raises SettingError."""
    from sdruntime.cli.previews import Previews

    if options.preview is None and options.preview_dir is None:
        if options.preview_every is not None:
            raise SettingError(f"--preview-every {options.preview_every} has no effect without --preview or --preview-dir")
        return None
    return Previews(
        options.preview,
        options.preview_dir,
        every=1 if options.preview_every is None else options.preview_every,
        overwrite=options.overwrite,
        shown=not (options.json or options.quiet),
    )


def generate_groups(
    pipe: Pipeline, requests: Sequence[Request], reporter: Reporter, previews: Previews | None = None
) -> Iterator[Result]:
    """Generate the images in groups of one UNet call, which limits the memory for any number of images."""
    for stage in pipe.opening():
        reporter.show("load", stage.name, done=stage.done, total=stage.total, unit="B")
    room = pipe.engines.room
    done = 0
    while group := _alike(requests[done : done + room]):
        what = f"images {done + 1} to {done + len(group)} of {len(requests)}" if len(requests) > 1 else ""
        done += len(group)
        reporter.show("encode prompts", what)
        stream = pipe.stream(group, on_device=True)
        reporter.show("denoise", what, total=max(job.steps for job in stream.jobs), unit="steps")
        for state in stream:
            if previews is not None:
                reporter.clear()
                previews.show(pipe, state, group)
            reporter.show("denoise", what, done=state.step, total=state.steps, unit="steps")
        reporter.show("decode", what)
        yield stream.result


def _alike(requests: Sequence[Request]) -> Sequence[Request]:
    """Return the first requests, as far as they have the same LoRAs."""
    count = next((k for k, request in enumerate(requests) if request.loras != requests[0].loras), len(requests))
    return requests[:count]
