"""The seam between the pipeline and an engine library: a call with named arrays.

Each folder of `sdruntime.backends` holds the same two files:

    build.py    build_engine(bundle, request, folder) -> Built      ONNX -> files
    engine.py   open_engine(bundle, spec, options) -> Engine        files -> Engine
                here() -> Library                                   what this machine has of the library
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import EngineError
from sdruntime.manifest import ComponentSpec, EngineSpec, Precision

Array = NDArray[Any]
Ranges = Mapping[str, tuple[int, int, int]]


class Engine(Protocol):
    """One component, open on one device. Leaving it as a context, or `close`, releases everything that it holds there."""

    @property
    def spec(self) -> EngineSpec: ...

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """The component's outputs, by name, for C-contiguous inputs of the types and shapes of its ComponentSpec.

        The outputs are the caller's: no later call writes to them. Raises EngineError for shapes outside `spec.ranges`.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is opened. `threads` 0: the library decides. `session`: the library's own settings, by its own names."""

    device: int = 0  # which GPU
    threads: int = 0  # of one operator
    session: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What a backend is asked to build: one component, for a target, in a set of ranges (of `EngineSpec.ranges`)."""

    component: str
    target: str
    ranges: Ranges
    stem: str  # the names of the files begin with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The files that a backend wrote, the one to open first in front, and the library's version."""

    files: tuple[Path, ...]
    version: str
    precision: Precision
    memory: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """What this machine has of an engine library: its version and the targets that it can run here, or why it has nothing."""

    version: str | None = None
    targets: tuple[str, ...] = ()
    missing: str = ""  # for a person: what is missing, and the line that installs it


def check_feeds(component: ComponentSpec, spec: EngineSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
    """The size of each named dimension in `feeds`. Raises EngineError where names, types or shapes are not the component's."""
    expected = {tensor.name: tensor for tensor in component.inputs}
    if feeds.keys() != expected.keys():
        raise EngineError(f"{spec.component}: fed {', '.join(feeds)}, but it takes {', '.join(expected)}")
    dims: dict[str, int] = {}
    for name, array in feeds.items():
        tensor = expected[name]
        fits = array.dtype == np.dtype(tensor.dtype) and array.ndim == len(tensor.shape)
        for size, dim in zip(array.shape, tensor.shape, strict=False):
            fits = fits and size == (dims.setdefault(dim, size) if isinstance(dim, str) else dim)
        if not fits:
            shape = ", ".join(map(str, tensor.shape))
            raise EngineError(
                f"{spec.component}.{name}: {array.dtype} {list(array.shape)}, but {tensor.dtype} [{shape}] belongs here"
            )
    if not spec.admits(**dims):
        asked = ", ".join(f"{name} {size}" for name, size in dims.items())
        takes = ", ".join(f"{name} {low} to {high}" for name, (low, _, high) in spec.ranges.items())
        raise EngineError(f"engine {spec.name}: {asked}, but it was built for {takes}")
    return dims


def call_rows(engine: Engine, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Call `engine` with any number of rows along `batch`, the first axis of every tensor: split to what it takes at most, padded
    with copies of the last row to what it takes at least. The outputs have the rows of `feeds`."""
    low, _, high = engine.spec.ranges["batch"]
    rows = len(next(iter(feeds.values())))
    if low <= rows <= high:
        return engine(feeds)
    parts = []
    for start in range(0, rows, high):
        piece = {name: array[start : start + high] for name, array in feeds.items()}
        size = min(high, rows - start)
        if size < low:
            piece = {name: np.concatenate([array, np.repeat(array[-1:], low - size, axis=0)]) for name, array in piece.items()}
        parts.append({name: array[:size] for name, array in engine(piece).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
