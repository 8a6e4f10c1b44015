"""The command `generate`: images from a bundle."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sdruntime.command import clear_progress, document, note, pairs, progress
from sdruntime.errors import SettingError


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
    from sdruntime.engine import EngineOptions
    from sdruntime.image import read_png, write_png
    from sdruntime.pipeline import Pipeline
    from sdruntime.shapes import parse_bytes, parse_size

    if options.output.suffix.lower() != ".png":
        raise SettingError(f"--output {options.output}: pictures are written as .png")
    if not options.output.parent.is_dir():
        raise SettingError(
            f"--output {options.output}: there is no folder {options.output.parent}: mkdir -p {options.output.parent}"
        )
    settings = {
        "count": options.count,
        "seed": options.seed,
        "negative": options.negative,
        "steps": options.steps,
        "sampler": options.sampler,
        "schedule": options.schedule,
        "guidance": options.guidance,
        "rescale": options.rescale,
        "size": parse_size(options.size) if options.size else None,
        "image": read_png(options.image) if options.image else None,
        "strength": options.strength,
        "options": sampler_options(options),
    }
    engine_options = EngineOptions(
        device=options.device,
        threads=options.threads,
        memory=parse_bytes(options.vram_budget) if options.vram_budget else None,
        low_memory=options.low_memory,
        measure=not options.no_measure,
        session=dict(pairs(options.session, "engine_host_code=true")),
    )
    with Pipeline.open(options.bundle, backend=options.backend, options=engine_options) as pipe:
        stream = pipe.stream(options.prompt, on_device=True, **settings)
        for state in stream:
            progress("step", state.step, state.steps)
        clear_progress()
        result = stream.result
    written = []
    for picture in result.pictures:
        path = options.output
        if len(result.pictures) > 1:
            path = path.with_name(f"{path.stem}-{picture.request.seed}{path.suffix}")
        write_png(path, picture.image, text=picture.text())
        written.append({"file": str(path), "seed": picture.request.seed, "prompt": picture.request.prompt, "cut": picture.cut})
        if not options.json:
            print(path)
    for text in result.warnings:
        note(f"warning: {text}")
    if options.json:
        document(pictures=written, warnings=list(result.warnings))
