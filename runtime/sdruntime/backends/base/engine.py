"""The seam between the pipeline and an engine library: a call with named arrays."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, TypeVar

from sdruntime.arrays import Array
from sdruntime.bundle.limits import MOST_THREADS
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec
from sdruntime.errors import SdruntimeError, SettingError

T = TypeVar("T")
CPU = "cpu"  # the target of engines that need no GPU
CUDA = "cuda"  # the target of engines for any CUDA device
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

        The outputs are the caller's: no later call writes to them. Raises EngineError for shapes outside `spec.profiles`, and
        the error of `closed` after `close`.
        """
        ...

    def close(self) -> None:
        """Release what the engine holds. Closing it again does nothing."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def closed(spec: EngineSpec) -> SdruntimeError:
    """Return the error for a use of an engine after it was closed."""
    return SdruntimeError(f"engine {spec.name} is closed: open it again")


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
