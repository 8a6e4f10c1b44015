"""The engines that a pipeline holds: choose them for this machine, open them, and close them to free memory."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from sdruntime.adapters.sets import AdapterSet
from sdruntime.backends.base.building import Stage
from sdruntime.backends.base.engine import CPU, Engine, EngineOptions, Shared
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.bundle.roles import role
from sdruntime.engines.adapted import AdaptedEngines, MergedWeights
from sdruntime.engines.choose import AUTO, Machine, choose_engine, warn_if_slow
from sdruntime.engines.memory import memory_plan
from sdruntime.engines.speed import cpu_speeds, to_measure
from sdruntime.errors import EngineError, SdruntimeError, Unsupported
from sdruntime.system.cuda import Cuda

KEPT_CHOICES = 256
OPENERS = 2  # CPU engines that are opened at the same time


class Engines:
    """The best engine of each component for each shape. `chosen`: the first ones, opened by `open` or at the first use.

    `caller_engine`: returns the engine of a component, called before each use; the caller opens and closes it. `busy`:
    returns whether jobs are running, in which case the UNet stays open. Raises EngineError if no engine fits this machine,
    UnknownName for an unknown backend or session setting, SettingError for the value of a session setting.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str,
        options: EngineOptions,
        caller_engine: Callable[[str], Engine] | None,
        busy: Callable[[], bool],
    ) -> None:
        self.bundle, self.options, self.caller_engine = bundle, options, caller_engine
        self.shared = Shared()
        self.opened: dict[str, Engine] | None = None
        self.closed = False
        self._backend, self._busy = backend, busy
        self._machine = Machine.here(options.device, {engine.backend for engine in bundle.manifest.engines})
        self._choices: dict[tuple[Any, ...], EngineSpec] = {}
        self._adapted = AdaptedEngines(options.lora_memory, bundle.manifest.size_of)
        # fail early if no engine of the bundle can run on this machine
        self.chosen = self._choose_all() if caller_engine is None else []
        for name in sorted({spec.backend for spec in self.chosen}):
            BACKENDS[name].check_session(options.session)

    def open(self) -> None:
        """Open the chosen engines. Raises the backends' errors, and OutOfSpace before loading if GPU memory is short."""
        for _ in self.opening():
            pass

    def ready(self) -> dict[str, Engine]:
        """Return the open engines by name, after `open` at the first use. Raises SdruntimeError after `close`."""
        if self.opened is None:
            if self.closed:
                raise SdruntimeError("the pipeline is closed: open the bundle again with Pipeline.open(...)")
            try:
                self.open()
            except BaseException:
                self.close()
                self.closed = False  # another try may find more memory
                raise
        assert self.opened is not None
        return self.opened

    def opening(self) -> Iterator[Stage]:
        """Open the engines as `open` does, and yield a Stage for each one that is loaded, with the bytes of its files."""
        self.closed = False
        if self._backend == AUTO:
            warn_if_slow(self.chosen, self._machine, self.bundle.folder)
            if self._compares_speeds():
                if to_measure(self.bundle, self._machine, self.options):
                    yield Stage(name="compare the speed of the engines for the CPU")
                self._compare_speeds()
        self.opened = {}
        self._check_memory()
        first = sorted(self.chosen, key=self.bundle.manifest.size_of, reverse=True)  # largest first, while few others use memory
        waiting = {spec.name: spec for spec in first if spec.target == CPU or not self.options.low_memory}
        total, done = sum(map(self.bundle.manifest.size_of, waiting.values())), 0

        def loading(count: int) -> Stage:
            return Stage(name=", ".join(spec.component for spec in [*waiting.values()][:count]), done=done, total=total)

        with ThreadPoolExecutor(OPENERS) as pool:  # one engine is hashed while its library loads another
            futures = {pool.submit(self._open_first, spec): spec for spec in first if spec.target == CPU}
            if futures:
                yield loading(OPENERS)
            for future in as_completed(futures):
                future.result()
                done += self.bundle.manifest.size_of(waiting.pop(futures[future].name))
                if waiting:
                    yield loading(OPENERS)
        for spec in [*waiting.values()]:
            yield loading(1)
            self._open_first(spec)
            done += self.bundle.manifest.size_of(waiting.pop(spec.name))

    def close(self) -> None:
        """Close every engine."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.shared.close)
            stack.callback(self._adapted.close)
            for engine in (self.opened or {}).values():
                stack.callback(engine.close)
            self.opened, self.closed = None, True

    def engine(self, component: str, *, rows: int = 1, adapters: AdapterSet | None = None, **dims: int) -> Engine:
        """Return the best engine of a component that admits `dims`, for a call of `rows`. Opens it if needed.

        `adapters`: it has the weights that they make. Raises EngineError, SdruntimeError.
        """
        engines = self.ready()
        changed = adapters if adapters is not None and adapters.digest_of(component) else None
        if self.caller_engine is not None:
            if changed is not None:
                raise Unsupported("loras: the engines are the caller's, whose weights cannot be replaced")
            return self.caller_engine(component)
        spec = self.choose(component, rows, **dims)
        if changed is not None:
            return self._adapted.get(changed, spec, self._open_with)
        if spec.name in engines:
            return engines[spec.name]
        if self.options.low_memory and spec.target != CPU:
            self._make_room(spec.component)
        engines[spec.name] = BACKENDS[spec.backend].open_engine(self.bundle, spec, self.options, self.shared)
        return engines[spec.name]

    def _open_with(self, spec: EngineSpec, adapters: AdapterSet) -> Engine:
        """Open an engine with the weights that adapters make."""
        self.check_adapters(spec)
        options = dataclasses.replace(self.options, weights=MergedWeights(self.bundle, spec.component, adapters))
        return BACKENDS[spec.backend].open_engine(self.bundle, spec, options, self.shared)

    @staticmethod
    def check_adapters(spec: EngineSpec) -> None:
        """Raises Unsupported if an engine takes no other weights than its own."""
        backend = BACKENDS[spec.backend]
        if not backend.replaces_weights(spec):
            raise Unsupported(
                f"loras: the {spec.backend} engine {spec.name} keeps the weights that it was built with: {backend.for_adapters}"
            )

    @property
    def room(self) -> int:
        """The largest number of images with guidance in one UNet call."""
        chosen = next(filter(self._denoises, self.chosen), None) or self.engine("unet").spec
        similar = [
            spec
            for spec in (chosen, *self.bundle.manifest.engines)
            if (spec.component, spec.backend, spec.target) == (chosen.component, chosen.backend, chosen.target)
        ]
        return max(1, max(profile["batch"][2] for spec in similar for profile in spec.profiles) // 2)

    def _choose_all(self) -> list[EngineSpec]:
        """Return an engine of each component, except those opened later: for a start image and for a loop on the GPU."""
        return [
            choose_engine(self.bundle, name, self._machine, name=self._backend, rows=self._usual_rows(name))
            for name in self.bundle.manifest.components
            if not role(name).late
        ]

    def _open_first(self, spec: EngineSpec) -> None:
        self.engine(spec.component, rows=self._usual_rows(spec.component))

    @property
    def most_sets(self) -> int:
        """How many sets of adapters can be in use at the same time."""
        kinds = ("text encoder", "denoiser")
        return self._adapted.most_sets(spec for spec in self.chosen if role(spec.component).kind in kinds)

    @staticmethod
    def _denoises(spec: EngineSpec) -> bool:
        return role(spec.component).kind == "denoiser"

    def _usual_rows(self, component: str) -> int:
        """Return the rows of a typical call: two for the UNet if speeds were measured, since guidance is typical."""
        return 2 if role(component).rows == "guided" and self._machine.speeds else 1

    def _compares_speeds(self) -> bool:
        """Return whether the CPU denoises and its engines' speeds are unknown."""
        return not self._machine.speeds and any(self._denoises(spec) and spec.target == CPU for spec in self.chosen)

    def _compare_speeds(self) -> None:
        """Measure the speeds of the CPU engines, and choose again."""
        if speeds := cpu_speeds(self.bundle, self._machine, self.options):
            self._machine = dataclasses.replace(self._machine, speeds=speeds)
            self._choices.clear()
            self.chosen = self._choose_all()

    def choose(self, component: str, rows: int = 1, **dims: int) -> EngineSpec:
        """Return the engine for a call of `rows` that admits `dims`, without opening it. Raises EngineError."""
        key = (component, rows, *dims.items())
        if key not in self._choices:
            if len(self._choices) >= KEPT_CHOICES:
                self._choices.clear()
            self._choices[key] = choose_engine(self.bundle, component, self._machine, name=self._backend, rows=rows, **dims)
        return self._choices[key]

    def _make_room(self, component: str) -> None:
        """Close the GPU engines of other stages, except a UNet with running jobs."""
        running = self._busy()
        for name, engine in list((self.opened or {}).items()):
            stage = role(engine.spec.component).stage
            if stage != role(component).stage and not (stage == "denoise" and running) and engine.spec.target != CPU:
                engine.close()
                del (self.opened or {})[name]

    def _check_memory(self) -> None:
        """Check the GPU's free memory before anything is loaded. Raises OutOfSpace."""
        plan = memory_plan(self.bundle.manifest, self.chosen)
        if plan.parts:
            with Cuda.open(self.options.device) as cuda:
                free, name = cuda.free_memory(), cuda.device.name
            options, where = self.options, f"{self.bundle.manifest.model.name} on {name}"
            plan.check(free, budget=options.memory, low_memory=options.low_memory, where=where)
            return
        saves = any(BACKENDS[spec.backend].saves_memory(spec) for spec in self.chosen)
        options_set = {
            "--vram-budget": self.options.memory is not None,
            "--low-memory": self.options.low_memory and not saves,
        }
        if unused := [name for name, is_set in options_set.items() if is_set]:
            text = f"{' and '.join(unused)}: no effect, since no chosen engine runs on a GPU"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def has(self, component: str, **dims: int) -> bool:
        """Return whether the bundle has an engine of a component for this machine that admits `dims`."""
        try:
            self.choose(component, **dims)
        except EngineError:
            return False
        return True
