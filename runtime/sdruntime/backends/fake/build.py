"""ONNX -> file, for the fake backend: the value that every output of the engine is filled with."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from sdruntime.backends.base.building import Built, EngineRequest, Stage, check_names
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import Precision

VERSION = "1"
TARGETS = ("cpu",)
OPTIONS: Mapping[str, tuple[Callable[[str], Any], str]] = {}  # as in backends/trt


def resolve_target(name: str, target: str | None, precision: Precision, options: Mapping[str, str]) -> str:
    return check_names(f"{name} {VERSION}", target, TARGETS, options, known=OPTIONS)


def build_engine(bundle: Bundle, request: EngineRequest, folder: Path) -> Generator[Stage, None, Built]:
    path = folder / f"{request.stem}.json"
    yield Stage(name="fill", done=1, total=1)
    path.write_text(json.dumps({"fill": 0.0}) + "\n")
    return Built(files=(path,), version=VERSION, precision=bundle.manifest.precision)
