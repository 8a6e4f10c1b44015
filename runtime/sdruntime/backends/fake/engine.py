"""File -> Engine, for the fake backend: outputs of the right types and shapes, filled with one value."""

from __future__ import annotations

import time
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
from sdruntime.errors import BundleError

KEPT_CALLS = 1000


class FakeEngine:
    """An engine that records its last KEPT_CALLS calls. Outputs are read-only views of one value, cached by shape.

    The session's setting `seconds` is the time of a call.
    """

    def __init__(self, spec: EngineSpec, component: ComponentSpec, *, fill: float, factor: int, seconds: float = 0.0) -> None:
        self.spec, self.component = spec, component
        self.calls: deque[dict[str, int]] = deque(maxlen=KEPT_CALLS)
        self._fill, self._factor, self._seconds = fill, factor, seconds
        self._outputs: dict[tuple[int, ...], dict[str, Array]] = {}
        self._closed = False

    def __call__(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        if self._closed:
            raise closed(self.spec)
        dims = check_feeds(self.component, self.spec, feeds)
        self.calls.append(dims)
        if self._seconds:
            time.sleep(self._seconds)
        key = tuple(dims.values())
        if key not in self._outputs:
            self._outputs[key] = {
                tensor.name: np.broadcast_to(np.asarray(self._fill, tensor.dtype), shape_of(tensor, dims, self._factor))
                for tensor in self.component.outputs
            }
        return self._outputs[key]

    def close(self) -> None:
        self._closed = True
        self._outputs.clear()

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def here() -> Library:
    """Return the version and targets of the fake backend, which is always available."""
    return Library(version=VERSION, targets=TARGETS)


def check_session(settings: Mapping[str, str]) -> None:
    """Accept any setting."""


def open_engine(bundle: Bundle, spec: EngineSpec, options: EngineOptions, shared: Shared) -> FakeEngine:
    """Open a fake engine. Raises BundleError if its file is damaged."""
    document = bundle.read_json(spec.files[0])
    fill = document.get("fill") if isinstance(document, dict) else None
    if isinstance(fill, bool) or not isinstance(fill, (int, float)):
        raise BundleError(bundle.folder, [f"{spec.files[0]}: not the file of a fake engine: it has no number `fill`"])
    seconds = float(options.session.get("seconds", 0))
    component, factor = bundle.manifest.components[spec.component], bundle.manifest.model.vae_factor
    return FakeEngine(spec, component, fill=fill, factor=factor, seconds=seconds)
