"""The seam between the pipeline and an engine library: a call with named arrays.

Each folder of `sdruntime.backends` holds the same two files:

    build.py    OPTIONS                                                its settings: how each is read, and what is expected
                resolve_target(name, target, precision, options)       the target's full name; refusals before the work
                build_engine(bundle, request, folder)                  ONNX -> files: yields Stages, returns Built
    engine.py   open_engine(bundle, spec, options, shared) -> Engine   files -> Engine
                here(name) -> Library                                  what this machine has of the library
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from sdruntime.errors import DeviceMissing, EngineError, SettingError, UnknownName
from sdruntime.limits import MOST_THREADS
from sdruntime.manifest import ComponentSpec, EngineSpec, Precision, Profile, TensorSpec

Array = NDArray[Any]
T = TypeVar("T")
CPU = "cpu"  # the target of engines that need no GPU
AMPERE_UP = "ampere+"  # the target of engines for every GPU of compute capability 8.0 and later
PLATFORM = f"{platform.system()}-{platform.machine()}".lower()


class Engine(Protocol):
    """One component, open on one device. Leaving it as a context, or `close`, releases everything that it holds there."""

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def component(self) -> ComponentSpec: ...

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """The component's outputs, by name, for C-contiguous inputs of the types and shapes of its ComponentSpec.

        The outputs are the caller's: no later call writes to them. Raises EngineError for shapes outside `spec.profiles`.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class AroundEngine:
    """An engine around another one, which it calls and closes: a subclass says what it does beside a call."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def spec(self) -> EngineSpec:
        return self._engine.spec

    @property
    def component(self) -> ComponentSpec:
        return self._engine.component

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        return self._engine(feeds)

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> AroundEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How an engine is opened. Raises SettingError for a negative number, or too many threads.

    `threads` 0: the library decides. `session`: the library's own settings, by its own names.

    `stream`: the handle of a CUDA stream of the caller's to work on, in place of one of its own.
    """

    device: int = 0  # which GPU
    threads: int = 0  # of one operator
    memory: int | None = None  # bytes of the GPU that a pipeline may use
    low_memory: bool = False  # a pipeline holds one component on the GPU at a time
    whole_loop: bool = False  # a pipeline that nobody watches launches all steps as one CUDA graph
    stream: int = 0
    measure: bool = True  # "auto" may time the CPU's engines, the first time that it has several to choose from
    session: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("device", "threads", "memory"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SettingError(f"{name} {value}: expected 0 or more")
        if self.threads > MOST_THREADS:  # a library starts as many as it is told to
            raise SettingError(f"threads {self.threads}: expected {MOST_THREADS} at most, or 0 for the library's own choice")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What a backend is asked to build: one component, for a target, in some profiles (those of `EngineSpec`)."""

    component: str
    backend: str
    target: str
    profiles: tuple[Profile, ...]
    stem: str  # the names of the files begin with it
    options: Mapping[str, str] = field(default_factory=dict)  # settings of the backend, by its own names


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Where a build is: `done` of `total` steps of what the library calls `name`; a total of 0 is not known."""

    name: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The files that a backend wrote, the one to open first in front, the library's version, and what the build took.

    `memory`: bytes of activations on the device, where the builder can tell. `peak`: bytes of the builder's own process.
    """

    files: tuple[Path, ...]
    version: str
    precision: Precision
    memory: int | None = None
    platform: str = ""
    seconds: float = 0.0
    peak: int = 0
    notes: tuple[str, ...] = ()  # for a person: where the engine is short of what was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """What this machine has of an engine library: its version and the targets that it builds for here, or why it has nothing."""

    version: str | None = None
    targets: tuple[str, ...] = ()
    missing: str = ""  # for a person: what is missing, and the line that installs it


# name: (how its text is read, what is expected)
BackendOptions = Mapping[str, tuple[Callable[[str], Any], str]]


def unknown_option(library: str, option: str, known: BackendOptions) -> UnknownName:
    """The error for an option of a backend that it does not have: it lists those that it has."""
    return UnknownName(f"option of {library}", option, known, forms={name: form for name, (_, form) in known.items()})


def check_names(
    library: str, target: str | None, targets: Sequence[str], options: Mapping[str, str], *, known: BackendOptions
) -> str:
    """`target`, the first of `targets` where it is None. Raises DeviceMissing for another, UnknownName for an unknown option."""
    for option in options:
        if option not in known:
            raise unknown_option(library, option, known)
    if target is not None and target not in targets:
        raise DeviceMissing(f"target {target!r}: {library} has {', '.join(targets)} on this machine")
    return target or targets[0]


class Shared:
    """What the engines of one pipeline share on a device (a stream, an arena): made by the first one that asks for it, and
    released with `close`, the last one made first, after the engines."""

    def __init__(self) -> None:
        self._held: dict[Hashable, Any] = {}
        self._stack = contextlib.ExitStack()

    def get(self, key: Hashable, make: Callable[[], contextlib.AbstractContextManager[T]]) -> T:
        if key not in self._held:
            self._held[key] = self._stack.enter_context(make())
        held: T = self._held[key]
        return held

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def close(self) -> None:
        self._held.clear()
        self._stack.close()


def check_feeds(component: ComponentSpec, spec: EngineSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
    """The size of each named dimension in `feeds`. Raises EngineError where names, types or shapes are not what the component
    and a profile of the engine take."""
    dims = dims_of(component, spec, feeds)
    if not spec.admits(**dims):
        asked = ", ".join(f"{name} {size}" for name, size in dims.items())
        raise EngineError(f"engine {spec.name}: {asked}, but it was built for {spec.shapes}")
    return dims


def check_tensors(component: ComponentSpec, spec: EngineSpec, inputs: Collection[str], outputs: Collection[str]) -> None:
    """Raise EngineError where an opened engine does not take what the component is fed, or lacks one of its outputs."""
    fed, taken = {tensor.name for tensor in component.inputs}, {tensor.name for tensor in component.outputs}
    if set(inputs) != fed or not taken <= set(outputs):
        has = f"{', '.join(sorted(inputs))} -> {', '.join(sorted(outputs))}"
        belongs = f"{', '.join(sorted(fed))} -> {', '.join(sorted(taken))}"
        raise EngineError(f"engine {spec.name}: it takes and gives {has:.300}, but the manifest says {belongs:.300}")


def dims_of(component: ComponentSpec, spec: EngineSpec, feeds: Mapping[str, Array]) -> dict[str, int]:
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
                f"{spec.component}.{name}: expected {tensor.dtype} [{shape}], got {array.dtype} {list(array.shape)}"
            )
    return dims


def shape_of(tensor: TensorSpec, dims: Mapping[str, int], factor: int) -> tuple[int, ...]:
    """A tensor's shape where `dims` are chosen; an output's `image_height` follows from `height` by the VAE's factor."""
    known = dict(dims)
    for name, size in dims.items():
        known[f"image_{name}"], known[f"latent_{name}"] = size * factor, size // factor
    return tuple(known[dim] if isinstance(dim, str) else dim for dim in tensor.shape)


def call_rows(engine: Engine, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """Call `engine` with any number of rows along `batch`, the first axis of every tensor: split to what its largest profile
    takes, padded with copies of the last row to the smallest profile that has room. The outputs have the rows of `feeds`."""
    rows = len(next(iter(feeds.values())))
    dims = dims_of(engine.component, engine.spec, feeds) if len(engine.spec.profiles) > 1 else {}
    dims.pop("batch", None)
    sizes = [engine.spec.profiles[index]["batch"] for index in engine.spec.admitting(**dims)]
    if not sizes or any(low <= rows <= high for low, _, high in sizes):
        return engine(feeds)  # which tells, where no profile takes it
    most = max(high for _, _, high in sizes)
    parts = []
    for start in range(0, rows, most):
        piece = {name: array[start : start + most] for name, array in feeds.items()}
        size = min(most, rows - start)
        low = min(max(low, size) for low, _, high in sizes if size <= high)
        if size < low:
            piece = {name: np.concatenate([array, np.repeat(array[-1:], low - size, axis=0)]) for name, array in piece.items()}
        parts.append({name: array[:size] for name, array in engine(piece).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
