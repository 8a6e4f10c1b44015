"""The command `generate`: images from a bundle."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sdruntime.command import Failed, check_output, document, pairs
from sdruntime.errors import SdruntimeError, SettingError

if TYPE_CHECKING:
    from sdruntime.engine import EngineOptions
    from sdruntime.pipeline import Pipeline
    from sdruntime.progress import Progress
    from sdruntime.request import Request
    from sdruntime.result import Result


def sampler_options(options: argparse.Namespace) -> dict[str, Any]:
    """KEY=VALUE pairs, each VALUE read as JSON where it is, else as text."""
    found: dict[str, Any] = {}
    for key, value in pairs(options.option, "eta=0.5"):
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def generate(options: argparse.Namespace) -> None:
    from sdruntime.pipeline import Pipeline
    from sdruntime.request import requests
    from sdruntime.shapes import parse_size

    if options.output.suffix.lower() != ".png":
        raise SettingError(f"--output {options.output}: images are written as .png")
    check_output(options.output, "--output")
    if options.fit is not None and options.image is None:
        raise SettingError(f"--fit {options.fit} without --image: it says how that image is brought to the size")
    if options.strength is not None and options.image is None:
        raise SettingError(f"--strength {options.strength:g} without --image: it says how much of that image is changed")
    settings = {
        "negative": options.negative,
        "steps": options.steps,
        "sampler": options.sampler,
        "schedule": options.schedule,
        "guidance": options.guidance,
        "rescale": options.rescale,
        "size": parse_size(options.size) if options.size else None,
        "image": options.image,
        "fit": options.fit,
        "options": sampler_options(options),
    }
    if options.strength is not None:
        settings["strength"] = options.strength
    asked = requests(options.prompt, count=options.count, seed=options.seed, **settings)
    shown, written, warned = options.progress, [], []
    if options.seed is None and not (options.json or options.quiet):  # it is in the document, and in the images
        shown.note(f"seed {asked[0].seed} (random): --seed {asked[0].seed} generates the same again")
    pipe = Pipeline.open(options.bundle, backend=options.backend, options=engine_options(options))
    try:
        with contextlib.closing(pipe):
            for result in drawn(pipe, asked, shown):
                for image in result.images:
                    path = options.output
                    if len(asked) > 1:
                        path = path.with_name(f"{path.stem}-{image.seed}{path.suffix}")
                    image.save(path)
                    written.append({"file": str(path), "seed": image.seed, "prompt": image.request.prompt, "cut": image.cut})
                    if not options.json:
                        shown.print(str(path))
                for text in result.warnings:
                    shown.note(f"warning: {text}")
                    warned.append(text)
    except (SdruntimeError, OSError, MemoryError, KeyboardInterrupt) as error:
        raise Failed(error, pictures=written, warnings=warned) from error
    if options.json:
        document(pictures=written, warnings=warned)


def engine_options(options: argparse.Namespace) -> EngineOptions:
    from sdruntime.engine import EngineOptions
    from sdruntime.shapes import parse_bytes

    return EngineOptions(
        device=options.device,
        threads=options.threads,
        memory=parse_bytes(options.vram_budget) if options.vram_budget else None,
        low_memory=options.low_memory,
        measure=not options.no_measure,
        session=dict(pairs(options.session, "engine_host_code=true", "--session")),
    )


def drawn(pipe: Pipeline, asked: Sequence[Request], shown: Progress) -> Iterator[Result]:
    """The images in groups that one call of the UNet takes, so that no more are in memory, whatever the count."""
    for stage in pipe.opening():
        shown.show("load", stage.name, done=stage.done, total=stage.total, unit="B")
    room = pipe.engines.room
    groups = [asked[start : start + room] for start in range(0, len(asked), room)]
    for index, group in enumerate(groups):
        what = f"images {index * room + 1} to {index * room + len(group)} of {len(asked)}" if len(asked) > 1 else ""
        shown.show("encode prompts", what)
        stream = pipe.stream(group, on_device=True)
        shown.show("denoise", what, total=max(job.run.steps for job in stream.jobs), unit="steps")
        for state in stream:
            shown.show("denoise", what, done=state.step, total=state.steps, unit="steps")
        shown.show("decode", what)
        yield stream.result
