"""ONNX -> file, for the fake backend: the value that every output of the engine is filled with."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from pathlib import Path

from sdruntime.backends.base.building import BackendOptions, Built, EngineRequest, Stage, check_names
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import Precision

NAME, VERSION = "fake", "1"
ENDING = ".json"
TARGETS = ("cpu",)
OPTIONS: BackendOptions = {}


def resolve_target(target: str | None, precision: Precision, options: Mapping[str, str]) -> str:
    return check_names(f"{NAME} {VERSION}", target, TARGETS, options, known=OPTIONS)


def build_engine(bundle: Bundle, request: EngineRequest, folder: Path) -> Generator[Stage, None, Built]:
    path = folder / f"{request.stem}{ENDING}"
    yield Stage(name="fill", done=1, total=1)
    path.write_text(json.dumps({"fill": 0.0}) + "\n")
    return Built(files=(path,), version=VERSION, precision=bundle.manifest.precision)
