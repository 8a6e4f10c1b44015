"""The interface between the pipeline and an engine library: a call with named arrays."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from types import TracebackType
from typing import Any, Protocol, TypeVar

from sdruntime.arrays import Array
from sdruntime.backends.base.weights import Weights
from sdruntime.bundle.limits import MOST_THREADS
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec
from sdruntime.errors import SdruntimeError, SettingError, shown

T = TypeVar("T")
CPU = "cpu"  # the target of engines that need no GPU
CUDA = "cuda"  # the target of engines for any CUDA device
AMPERE_UP = "ampere+"  # the target of engines for every GPU of compute capability 8.0 and later
PLATFORM = f"{platform.system()}-{platform.machine()}".lower()


class Engine(Protocol):
    """One component, open on one device. `close`, or leaving its context, releases everything it holds on the device."""

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def component(self) -> ComponentSpec: ...

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """Return the component's outputs by name. Inputs are C-contiguous, with the types and shapes of its ComponentSpec.

        The caller owns the outputs: later calls do not write to them. Raises EngineError for shapes outside `spec.profiles`, and
        the error of `closed` after `close`.
        """
        ...

    def close(self) -> None:
        """Release the engine's resources. Closing twice has no effect."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


def closed(spec: EngineSpec) -> SdruntimeError:
    """Return the error for using an engine after it was closed."""
    return SdruntimeError(f"engine {spec.name} is closed: open it again")


class EngineWrapper:
    """A wrapper that forwards calls and `close` to another engine. Subclasses add behavior around a call."""

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

    def __enter__(self) -> EngineWrapper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options for opening an engine. Raises SettingError for a value of another type or out of range.

    `threads` 0: the library decides. `session`: the library's own session settings, by its own names. `stream`: the handle of the
    caller's CUDA stream to use; 0: the engines create their own. `tile`: the side in pixels of overlapping tiles, in
    which a pipeline decodes and encodes larger images; "auto": only if an image is too large for its engines; "off": never.
    """

    device: int = 0  # index of the GPU
    threads: int = 0  # within one operator
    memory: int | None = None  # bytes of GPU memory that a pipeline may use
    lora_memory: int | None = None  # bytes of engines with LoRAs that a pipeline keeps open; None: those of two sets of LoRAs
    # a pipeline keeps one component on the GPU at a time; ONNX Runtime on a CPU keeps half-precision weights as they are
    low_memory: bool = False
    whole_loop: bool = False  # without progress callbacks, a pipeline launches all steps as one CUDA graph
    stream: int = 0
    tile: int | str = "auto"
    measure: bool = True  # "auto" may benchmark CPU engines the first time it can choose between several
    session: Mapping[str, str] = field(default_factory=dict)
    weights: Weights | None = None  # set by a pipeline, for requests with LoRAs

    def __post_init__(self) -> None:
        for name in ("device", "threads", "memory", "lora_memory", "stream"):
            value = getattr(self, name)
            if value is None and name in ("memory", "lora_memory"):
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
                raise SettingError(f"{name} {shown(value)}: expected a whole number, 0 or more")
        tile = self.tile
        if tile not in ("auto", "off") and (isinstance(tile, bool) or not isinstance(tile, Integral) or tile < 1):
            raise SettingError(f'tile {shown(tile)}: expected "auto", "off" or the side of a tile in pixels, such as 1024')
        if self.threads > MOST_THREADS:  # libraries start any number without a check
            raise SettingError(f"threads {self.threads}: expected {MOST_THREADS} at most, or 0 for the library's own choice")
        settings = self.session.items() if isinstance(self.session, Mapping) else [(None, None)]
        if not all(isinstance(text, str) for setting in settings for text in setting):
            raise SettingError(f'session {shown(self.session)}: expected a mapping of text, such as {{"NUM_STREAMS": "2"}}')


class Shared:
    """Resources that the engines of a pipeline share on a device, such as a stream or an arena.

    Each is created on first use. Call `close` after closing the engines: it releases the resources in reverse order.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, Any] = {}
        self._stack = contextlib.ExitStack()

    def get(self, key: Hashable, make: Callable[[], contextlib.AbstractContextManager[T]]) -> T:
        """Return the resource of `key`, entering the context that `make` returns on first use."""
        if key not in self._held:
            self._held[key] = self._stack.enter_context(make())
        resource: T = self._held[key]
        return resource

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __len__(self) -> int:
        return len(self._held)

    def close(self) -> None:
        self._held.clear()
        self._stack.close()
