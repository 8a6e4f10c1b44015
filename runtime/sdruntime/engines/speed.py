"""Time a UNet call of each kind of a bundle's CPU engines on this machine, and cache the result for the user.

A cached result does not change. Its key is the processor, the libraries' versions, the engines' files and the threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdruntime.arrays import Array
from sdruntime.backends.base.engine import CPU, EngineOptions, Shared
from sdruntime.backends.base.feeds import shape_of
from sdruntime.backends.registry import backend, is_hidden
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec, Manifest
from sdruntime.engines.choose import Machine, kind, misfit
from sdruntime.errors import SdruntimeError
from sdruntime.system import processor
from sdruntime.system.cache import read_cached, write_cached
from sdruntime.system.memory import available_memory

UNET = "unet"
ROUNDS = 3
BUDGET = 5.0  # seconds after which no further round starts
_ROWS, _TIMESTEP = 2, 500.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """One engine of each kind, the dimensions that they are all called with, and the name of the cached result."""

    engines: Mapping[str, EngineSpec]
    dims: Mapping[str, int]
    name: str

    @classmethod
    def of(cls, bundle: Bundle, machine: Machine, *, threads: int = 0) -> Race | None:
        """Return None if there is nothing to compare: fewer than two kinds fit this machine, or no size suits all of them."""
        manifest = bundle.manifest
        kinds: dict[str, list[EngineSpec]] = {}
        for engine in manifest.engines:
            fits = engine.component == UNET and engine.target == CPU and not is_hidden(engine.backend)
            if fits and misfit(engine, machine) is None:
                kinds.setdefault(kind(engine), []).append(engine)
        if len(kinds) < 2:
            return None
        for dims in _sizes(manifest, itertools.chain(*kinds.values())):
            admitting = {name: [engine for engine in group if engine.admits(**dims)] for name, group in kinds.items()}
            if all(admitting.values()):
                engines = {name: group[0] for name, group in admitting.items()}
                return cls(engines=engines, dims=dims, name=_cache_name(manifest, machine, engines, dims, threads))
        return None

    def cached(self) -> dict[str, float] | None:
        """Return the cached seconds per call by kind, or None if they were not measured yet."""
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            document = json.loads(read_cached(self.name) or b"")
            return {str(name): float(seconds) for name, seconds in document["seconds"].items()}
        return None

    def store(self, seconds: Mapping[str, float]) -> None:
        """Cache the seconds per call by kind."""
        write_cached(self.name, json.dumps({"dims": dict(self.dims), "seconds": dict(seconds)}).encode())


def to_measure(bundle: Bundle, machine: Machine, options: EngineOptions) -> bool:
    """Return whether `cpu_speeds` would time engines now."""
    race = Race.of(bundle, machine, threads=options.threads) if options.measure and not options.session else None
    return race is not None and race.cached() is None


def cpu_speeds(bundle: Bundle, machine: Machine, options: EngineOptions) -> dict[str, float]:
    """Return seconds per UNet call by kind of engine, from the cache or measured now.

    The result is empty if there is nothing to compare, if `options` disable measuring, or if memory for all engines is short.
    """
    race = Race.of(bundle, machine, threads=options.threads)
    if race is None or not options.measure or options.session:
        return {}
    seconds = race.cached()
    if seconds is None:
        weights = sum(bundle.manifest.files[path].size for engine in race.engines.values() for path in engine.files)
        if 2 * weights > available_memory() > 0:
            return {}
        seconds = measure(bundle, race, options)
        race.store(seconds)
    return seconds


def measure(bundle: Bundle, race: Race, options: EngineOptions) -> dict[str, float]:
    """Return the least seconds of a UNet call of each kind, after a warm-up call. Warns of a kind that fails and skips it."""
    component, factor = bundle.manifest.components[UNET], bundle.manifest.model.vae_factor
    random = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for tensor in component.inputs:
        shape = shape_of(tensor, race.dims, factor)
        values = np.full(shape, _TIMESTEP) if tensor.name == "timestep" else random.standard_normal(shape)
        feeds[tensor.name] = values.astype(tensor.dtype)
    shared = Shared()
    with contextlib.ExitStack() as stack:
        stack.callback(shared.close)
        calls: dict[str, Callable[[], object]] = {}
        for name, spec in race.engines.items():
            try:
                engine = backend(spec.backend).open_engine(bundle, spec, options, shared)
                stack.callback(engine.close)
                engine(feeds)
            except SdruntimeError as error:
                warnings.warn(f"{spec.name} was not timed: {error}", RuntimeWarning, stacklevel=2)
            else:
                calls[name] = lambda engine=engine: engine(feeds)  # type: ignore[misc]
        return least_seconds(calls)


def least_seconds(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least seconds of each call over ROUNDS rounds, or fewer if they take longer than BUDGET."""
    least = dict.fromkeys(calls, float("inf"))
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            before = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - before)
        if time.perf_counter() - begun > BUDGET:
            break
    return least


def _sizes(manifest: Manifest, engines: Iterable[EngineSpec]) -> Iterable[dict[str, int]]:
    """Yield dimensions to compare at, fastest first: half the model's size, its own size, and what the engines were tuned for."""
    model, dimensions = manifest.model, manifest.components[UNET].dimensions
    for part in (2, 1):
        height, width = (side // part for side in model.usual_size)
        if height % model.step == width % model.step == 0:
            cells = {"height": height // model.vae_factor, "width": width // model.vae_factor}
            known = {"batch": _ROWS, "sequence": manifest.text_length, **cells}
            yield {name: known[name] for name in dimensions if name in known}
    for engine in engines:
        for profile in engine.profiles:
            yield {name: opt for name, (_, opt, _) in profile.items()}


def _cache_name(
    manifest: Manifest, machine: Machine, engines: Mapping[str, EngineSpec], dims: Mapping[str, int], threads: int
) -> str:
    paths = [*manifest.components[UNET].files, *(path for engine in engines.values() for path in engine.files)]
    key: list[Any] = [
        processor.fingerprint(),
        sorted((engine.backend, machine.libraries[engine.backend].version) for engine in engines.values()),
        sorted(manifest.files[path].sha256 for path in paths),
        sorted(engines),
        sorted(dims.items()),
        threads,
    ]
    return f"cpu/{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"
