"""Return the versions of the libraries that a trace depends on, and digests of documents."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from typing import Any

_LIBRARIES = ("sdexport", "sdruntime", "torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


DIGEST = 32


def versions() -> dict[str, str]:
    """Return the installed version of each library that takes part in a build, or "missing"."""
    installed = {}
    for name in _LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "missing"
    return installed


def digest_of(document: Any) -> str:
    """Return the SHA-256 of a JSON document in hexadecimal, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
