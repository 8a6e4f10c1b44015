"""Engines with adapters (LoRA): their weights, and the pool that keeps the most recent of them within a memory bound."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping

from sdruntime.adapters.sets import AdapterSet
from sdruntime.arrays import Array
from sdruntime.backends.base.engine import Engine
from sdruntime.backends.onnx_file.stored import lending_weights
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec

KEPT_SETS = 2  # sets of adapters whose engines are kept besides those without, if no memory is named for them


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

    The engines of the most recent sets stay open: of `KEPT_SETS`, or of as many as fit into `memory` bytes by the sizes of their
    files, but always of one. Those of older ones are closed before another is opened, so that memory never holds more copies of
    the changed engines, besides those without adapters. `size_of`: the bytes of an engine.
    """

    def __init__(self, memory: int | None, size_of: Callable[[EngineSpec], int]) -> None:
        self._sets: OrderedDict[AdapterSet, dict[str, Engine]] = OrderedDict()
        self._memory, self._size_of = memory, size_of

    def most_sets(self, specs: Iterable[EngineSpec]) -> int:
        """Return how many sets can be in use at the same time, if each changes all of these engines."""
        size = sum(map(self._size_of, specs))
        return KEPT_SETS if self._memory is None or not size else max(1, self._memory // size)

    def get(self, adapters: AdapterSet, spec: EngineSpec, make: Callable[[EngineSpec, AdapterSet], Engine]) -> Engine:
        """Return the engine of a set; `make` opens it if it is not open."""
        engines = self._sets.setdefault(adapters, {})
        self._sets.move_to_end(adapters)
        if spec.name not in engines:
            while len(self._sets) > 1 and self._is_full(spec):
                _, oldest = self._sets.popitem(last=False)
                _close(oldest)
            engines[spec.name] = make(spec, adapters)
        return engines[spec.name]

    def _is_full(self, more: EngineSpec) -> bool:
        """Return whether another engine has no room beside those that are open."""
        if self._memory is None:
            return len(self._sets) > KEPT_SETS
        opened = sum(self._size_of(engine.spec) for engines in self._sets.values() for engine in engines.values())
        return opened + self._size_of(more) > self._memory

    def close(self) -> None:
        """Close every engine."""
        while self._sets:
            _, engines = self._sets.popitem()
            _close(engines)


def _close(engines: Mapping[str, Engine]) -> None:
    with contextlib.ExitStack() as stack:
        for engine in engines.values():
            stack.callback(engine.close)
