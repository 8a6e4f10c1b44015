"""File -> Engine, for the fake backend: outputs of the right types and shapes, all of one value, at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.building import Library
from sdruntime.backends.base.engine import EngineOptions, Shared, closed
from sdruntime.backends.base.feeds import check_feeds, shape_of
from sdruntime.backends.fake.build import TARGETS, VERSION
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import ComponentSpec, EngineSpec

KEPT_CALLS = 1000


class FakeEngine:
    """Remembers its newest calls; the outputs are views of one array for each shape, and read-only."""

    def __init__(self, spec: EngineSpec, component: ComponentSpec, *, fill: float, factor: int) -> None:
        self.spec, self.component = spec, component
        self.calls: deque[dict[str, int]] = deque(maxlen=KEPT_CALLS)
        self._fill, self._factor = fill, factor
        self._made: dict[tuple[int, ...], dict[str, Array]] = {}
        self._closed = False

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._closed:
            raise closed(self.spec)
        dims = check_feeds(self.component, self.spec, feeds)
        self.calls.append(dims)
        key = tuple(dims.values())
        if key not in self._made:
            self._made[key] = {
                tensor.name: np.broadcast_to(np.asarray(self._fill, tensor.dtype), shape_of(tensor, dims, self._factor))
                for tensor in self.component.outputs
            }
        return self._made[key]

    def close(self) -> None:
        self._closed = True
        self._made.clear()

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def here() -> Library:
    return Library(version=VERSION, targets=TARGETS)


def open_engine(bundle: Bundle, spec: EngineSpec, options: EngineOptions, shared: Shared) -> FakeEngine:
    fill = bundle.read_json(spec.files[0])["fill"]
    return FakeEngine(spec, bundle.manifest.components[spec.component], fill=fill, factor=bundle.manifest.model.vae_factor)
