"""The engine libraries. Each folder holds the same two files; the order here is the order of preference."""

from __future__ import annotations

import importlib
from types import ModuleType

from sdruntime.errors import UnknownName

BACKENDS = {"onnxruntime": "ort", "fake": "fake"}


def backend(name: str, part: str) -> ModuleType:
    """The module `part` ("build" or "engine") of the backend `name`. Raises UnknownName."""
    if name not in BACKENDS:
        raise UnknownName("backend", name, BACKENDS)
    return importlib.import_module(f"sdruntime.backends.{BACKENDS[name]}.{part}")
