"""The descriptions that services send: of the pipeline, and of a finished image."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np

from sdruntime import __version__
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.bundle.records import json_from_record
from sdruntime.pipeline.pipeline import Pipeline
from sdruntime.sampling.samplers import SAMPLERS
from sdruntime.serving.batcher import ImageFuture


def pipeline_document(pipe: Pipeline) -> dict[str, Any]:
    """Return the description of an open pipeline.

    Sizes are in pixels, (width, height). The ranges of `engines` include both ends. A component that is opened at its first use
    is null.
    """
    manifest, model = pipe.bundle.manifest, pipe.model
    chosen = {spec.component: spec for spec in pipe.engines.chosen}
    factor = model.vae_factor
    return {
        "model": json_from_record(model),
        "precision": manifest.precision,
        "components": {name: _engine_document(chosen.get(name)) for name in manifest.components},
        "sizes": {
            "default": list(model.usual_size[::-1]),
            "multiple": model.step,
            "engines": [
                {side: [factor * low, factor * high] for side in ("width", "height") for low, _, high in [profile[side]]}
                for profile in chosen["unet"].profiles
            ],
        },
        "samplers": list(SAMPLERS),
        "sampler": pipe.sampler,
        "versions": {
            "sdruntime": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            **{spec.backend: spec.version for spec in pipe.engines.chosen},
        },
    }


def _engine_document(spec: EngineSpec | None) -> dict[str, Any] | None:
    if spec is None:
        return None
    return {name: getattr(spec, name) for name in ("name", "backend", "version", "target", "precision", "shapes")}


def finished(future: ImageFuture, text: Mapping[str, str]) -> dict[str, Any]:
    """Return the description of a finished image; `text`: its metadata."""
    image = future.result()
    width, height = image.size
    return {
        "width": width,
        "height": height,
        "seed": image.seed,
        "sampler": image.sampler,
        "parameters": text["parameters"],
        "timings": dataclasses.asdict(future.timings),
        "warnings": future.warnings,
    }
