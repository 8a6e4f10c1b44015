"""Engines with adapters (LoRA): their weights, and the pool that keeps the most recent of them within a memory bound."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

from sdruntime.adapters.sets import AdapterSet
from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.backends.onnx_file.stored import lending_weights
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec

KEPT_SETS = 2  # sets of adapters whose engines are kept besides those without


class MergedWeights:
    """The weights of a component that a set of adapters changes (sdruntime.backends.base.weights).

    They follow from the weights of the bundle's ONNX model, never from those of an engine.
    """

    def __init__(self, bundle: Bundle, component: str, adapters: AdapterSet) -> None:
        self.names = frozenset(adapters.weights(component))
        self._bundle, self._component, self._adapters = bundle, component, adapters

    @contextlib.contextmanager
    def lending(self) -> Iterator[Mapping[str, Array]]:
        with lending_weights(self._bundle, self._component) as read:
            yield _Computed(self._adapters, self._component, self.names, read)


class _Computed(Mapping[str, Array]):
    """Compute each weight when it is looked up."""

    def __init__(self, adapters: AdapterSet, component: str, names: frozenset[str], read: Callable[[str], Array]) -> None:
        self._adapters, self._component, self._names, self._read = adapters, component, names, read

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        return self._adapters.merged(self._component, name, self._read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class AdaptedEngines:
    """Open engines by what a set of adapters changes in them.

    The engines of the `KEPT_SETS` most recent sets stay open. Those of older ones are closed before another is opened, so that
    memory holds `KEPT_SETS` copies of the changed engines at most, besides those without adapters.
    """

    def __init__(self) -> None:
        self._sets: OrderedDict[AdapterSet, dict[str, Engine]] = OrderedDict()

    def get(self, adapters: AdapterSet, spec: EngineSpec, make: Callable[[EngineSpec, AdapterSet], Engine]) -> Engine:
        """Return the engine of a set; `make` opens it if it is not open."""
        engines = self._sets.setdefault(adapters, {})
        self._sets.move_to_end(adapters)
        while len(self._sets) > KEPT_SETS:
            _, oldest = self._sets.popitem(last=False)
            _close(oldest)
        if spec.name not in engines:
            engines[spec.name] = make(spec, adapters)
        return engines[spec.name]

    def close(self) -> None:
        """Close every engine."""
        while self._sets:
            _, engines = self._sets.popitem()
            _close(engines)


def _close(engines: Mapping[str, Engine]) -> None:
    with contextlib.ExitStack() as stack:
        for engine in engines.values():
            stack.callback(engine.close)
