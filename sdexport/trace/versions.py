"""The versions of the libraries that a trace depends on, and digests of documents."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from typing import Any

_LIBRARIES = ("sdexport", "sdruntime", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


DIGEST = 32


def versions() -> dict[str, str]:
    """The installed version of each library that takes part in a build."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def digest_of(document: Any) -> str:
    """The SHA-256 of a JSON document, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
