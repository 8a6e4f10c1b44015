"""ONNX -> file, for the fake backend: the value that every output of the engine is filled with."""

from __future__ import annotations

import json
from pathlib import Path

from sdruntime.bundle import Bundle
from sdruntime.engine import Built, EngineRequest

VERSION = "1"
TARGETS = ("cpu",)


def build_engine(bundle: Bundle, request: EngineRequest, folder: Path) -> Built:
    path = folder / f"{request.stem}.json"
    path.write_text(json.dumps({"fill": 0.0}) + "\n")
    return Built(files=(path,), version=VERSION, precision=bundle.manifest.precision)
