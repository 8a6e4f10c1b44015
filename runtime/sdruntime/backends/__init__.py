"""The engine libraries. Each folder holds the same two files; the order here is the order of preference."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

from sdruntime.errors import UnknownName


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """`folder`: where its two files are. `exact`: an engine needs the very version that built it, else major and minor are
    enough. `static`: built for the asked shapes alone by default, else for every size. `loop`: it can keep the
    sampler's loop on the GPU, so it builds the component `step` too."""

    folder: str
    exact: bool = False
    static: bool = False
    loop: bool = False


BACKENDS = {
    "tensorrt": Backend(folder="trt", exact=True, static=True, loop=True),
    "tensorrt-rtx": Backend(folder="trt", exact=True, static=True, loop=True),
    "onnxruntime": Backend(folder="ort"),
    "openvino": Backend(folder="ov", static=True),
    "fake": Backend(folder="fake"),
}

OFFERED = tuple(name for name in BACKENDS if name != "fake")  # to users: the fake is for tests


def backend(name: str, part: str) -> ModuleType:
    """The module `part` ("build" or "engine") of the backend `name`. Raises UnknownName."""
    if name not in BACKENDS:
        raise UnknownName("backend", name, OFFERED)
    return importlib.import_module(f"sdruntime.backends.{BACKENDS[name].folder}.{part}")
