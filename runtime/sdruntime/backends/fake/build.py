"""ONNX -> file, for the fake backend. The file holds the value that fills every output."""

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
    """Return "cpu". Raises DeviceMissing for another target, UnknownName for any option."""
    return check_names(f"{NAME} {VERSION}", target, TARGETS, options, known=OPTIONS)


def build_engine(bundle: Bundle, request: EngineRequest, folder: Path) -> Generator[Stage, None, Built]:
    """Write `stem`.json into `folder`."""
    path = folder / f"{request.stem}{ENDING}"
    yield Stage(name="fill", done=1, total=1)
    path.write_text(json.dumps({"fill": 0.0}) + "\n")
    return Built(files=(path,), version=VERSION, precision=bundle.manifest.precision)
