"""The backends by name, in order of preference."""

from __future__ import annotations

from sdruntime.backends.base.backend import Backend
from sdruntime.backends.fake.backend import FAKE
from sdruntime.backends.ort.backend import ONNXRUNTIME
from sdruntime.backends.ov.backend import OPENVINO
from sdruntime.backends.trt.backend import TENSORRT, TENSORRT_RTX
from sdruntime.errors import UnknownName

BACKENDS = {backend.name: backend for backend in (TENSORRT, TENSORRT_RTX, ONNXRUNTIME, OPENVINO, FAKE)}
OFFERED = tuple(name for name, entry in BACKENDS.items() if not entry.hidden)  # to users


def backend(name: str) -> Backend:
    """Return the backend named `name`. Raises UnknownName."""
    if name not in BACKENDS:
        raise UnknownName("backend", name, OFFERED)
    return BACKENDS[name]


def is_hidden(name: str) -> bool:
    """Return whether `name` is a backend for tests only. An unknown name is not hidden, so that reports can list it."""
    return name in BACKENDS and BACKENDS[name].hidden
