"""The backends by name, in the order of preference."""

from __future__ import annotations

from sdruntime.backends.base.backend import Backend
from sdruntime.backends.fake.backend import FAKE
from sdruntime.backends.ort.backend import ONNXRUNTIME
from sdruntime.backends.ov.backend import OPENVINO
from sdruntime.backends.trt.backend import TENSORRT, TENSORRT_RTX
from sdruntime.errors import UnknownName

BACKENDS = {each.name: each for each in (TENSORRT, TENSORRT_RTX, ONNXRUNTIME, OPENVINO, FAKE)}
OFFERED = tuple(name for name, each in BACKENDS.items() if not each.hidden)  # to users


def backend(name: str) -> Backend:
    """The backend of this name. Raises UnknownName."""
    if name not in BACKENDS:
        raise UnknownName("backend", name, OFFERED)
    return BACKENDS[name]


def is_hidden(name: str) -> bool:
    """Whether engines of this backend are for tests; a name of no backend is not hidden, so that a report can say so."""
    return name in BACKENDS and BACKENDS[name].hidden
