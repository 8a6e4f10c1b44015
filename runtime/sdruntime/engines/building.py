"""Engines into a bundle, from its own ONNX. Adds the engine's files and changes the manifest; nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sdruntime.backends.base.building import EngineRequest, Stage
from sdruntime.backends.registry import BACKENDS, backend
from sdruntime.bundle.bundle import ENGINES, Bundle, disk_full_as_error
from sdruntime.bundle.change import add_engine, building, remove_engine, tidy
from sdruntime.bundle.manifest import EngineSpec, ModelSpec, Precision
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.engines.shapes import Guidance, Shapes
from sdruntime.errors import LibraryMissing, UnknownName
from sdruntime.system.events import mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """Which engines are wanted: those of a backend, for a target, in shapes as `Shapes.parse` reads them.

    `target` None: the best that the library has here. `components` empty: all but those in `without`. `options`: the backend's
    own settings.
    """

    backend: str
    target: str | None = None
    size: str | None = None
    batch: str | None = None
    guidance: Guidance | None = None
    components: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    def shapes(self, model: ModelSpec) -> Shapes:
        """Raises SettingError; UnknownName for a backend that does not exist."""
        static = backend(self.backend).static
        return Shapes.parse(model, size=self.size, batch=self.batch, guidance=self.guidance, static=static)

    def resolve(self, model: ModelSpec, precision: Precision, components: Iterable[str]) -> tuple[Shapes, str, str]:
        """The shapes, the library's version and the target's full name: everything that can be refused before the work is.

        Raises SettingError, UnknownName, LibraryMissing and DeviceMissing.
        """
        shapes = self.resolve_model(model, components)
        return shapes, *self.resolve_library(precision)

    def resolve_model(self, model: ModelSpec, components: Iterable[str]) -> Shapes:
        """The part of `resolve` that needs no library. Raises SettingError and UnknownName."""
        shapes = self.shapes(model)
        for component in (*self.components, *self.without):
            if component not in components:
                raise UnknownName("component", component, components)
        return shapes

    def resolve_library(self, precision: Precision) -> tuple[str, str]:
        """The part of `resolve` that needs no model: the library's version and the target's full name. Raises as it does."""
        library = backend(self.backend).here()
        if library.version is None:
            raise LibraryMissing(library.missing)
        return library.version, backend(self.backend).resolve_target(self.target, precision, self.options)

    def chosen(self, components: Iterable[str]) -> tuple[str, ...]:
        """Which of a bundle's components engines are wanted of."""
        return self.components or tuple(component for component in components if component not in self.without)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEvent:
    """A step of `build_engines`: an engine begins, is at a stage, is done, or was there already."""

    component: str
    engine: str
    state: Literal["begin", "stage", "done", "present"]
    stage: Stage | None = None
    size: int = 0  # bytes written
    seconds: float = 0.0
    peak: int = 0  # bytes of the builder's process, where it has one of its own
    notes: tuple[str, ...] = ()


Check = Callable[[Bundle, EngineSpec], str]


def build_engines(folder: Path | str, asked: BuildRequest, *, check: Check | None = None) -> Generator[BuildEvent, None, None]:
    """Build an engine of each component and add it to the bundle; one that is there already is left alone.

    `check` is given each engine in its bundle before it is added (`sdruntime.verification.verify.held`): what it returns is a
    note, and where it raises, the bundle stays as it was. Stopped at any point, the bundle holds the engines that were
    done. Raises BundleError, SettingError, LibraryMissing, DeviceMissing, OutOfSpace, and EngineError for a graph that the
    library cannot build.
    """
    bundle = Bundle.open(folder)
    tidy(bundle.folder)
    manifest = bundle.manifest
    shapes, version, target = asked.resolve(manifest.model, manifest.precision, manifest.components)
    wanted_here = [name for name in manifest.components if name != STEP or backend(asked.backend).loop]
    for component in asked.chosen(wanted_here):
        stem = f"{component}-{asked.backend}{version}-{target}-{manifest.precision}-{shapes.label}"
        request = EngineRequest(
            component=component,
            backend=asked.backend,
            target=target,
            profiles=shapes.profiles(component, manifest),
            stem=stem,
            options=asked.options,
        )
        wanted = (version, *_identity(request))
        if any((engine.version, *_identity(engine)) == wanted for engine in bundle.manifest.engines):
            yield BuildEvent(component=component, engine=stem, state="present")
        else:
            bundle = yield from _add(bundle, request, check)


def stale_engines(bundle: Bundle) -> list[EngineSpec]:
    """Return the engines that need another version of their library than the installed one; `rebuild_stale` rebuilds them."""
    found = []
    for engine in bundle.manifest.engines:
        if known := BACKENDS.get(engine.backend):
            version = known.here().version
            if version is not None and not known.reads(engine, version):
                found.append(engine)
    return found


def rebuild_stale(folder: Path | str, *, check: Check | None = None) -> Generator[BuildEvent, None, None]:
    """Rebuild each stale engine with this library, with the same request, and remove the stale one. Raises as above."""
    bundle = Bundle.open(folder)
    tidy(bundle.folder)
    for engine in stale_engines(bundle):
        here = backend(engine.backend).here().version
        target = backend(engine.backend).resolve_target(engine.target, bundle.manifest.precision, engine.options)
        request = EngineRequest(
            component=engine.component,
            backend=engine.backend,
            target=target,
            profiles=engine.profiles,
            stem=engine.name.replace(f"{engine.backend}{engine.version}", f"{engine.backend}{here}", 1),
            options=engine.options,
        )
        twin = any((each.version, *_identity(each)) == (here, *_identity(request)) for each in bundle.manifest.engines)
        if not twin:
            bundle = yield from _add(bundle, request, check)
        bundle = remove_engine(bundle, engine)


def _add(bundle: Bundle, request: EngineRequest, check: Check | None) -> Generator[BuildEvent, None, Bundle]:
    with disk_full_as_error(bundle.folder), building(bundle, request.stem) as (name, scratch):
        event = functools.partial(BuildEvent, component=request.component, engine=name)
        yield event(state="begin")
        work = backend(request.backend).build_engine(bundle, dataclasses.replace(request, stem=name), scratch)
        built = yield from mapped(work, lambda stage: event(state="stage", stage=stage))
        paths = {f"{ENGINES}/{path.name}": path for path in built.files}
        written = sum(path.stat().st_size for path in built.files)
        engine = EngineSpec(
            component=request.component,
            backend=request.backend,
            version=built.version,
            target=request.target,
            precision=built.precision,
            files=tuple(paths),
            profiles=request.profiles,
            memory=built.memory,
            platform=built.platform,
            options=request.options,
        )
        notes = list(built.notes)
        if check is not None:
            yield event(state="stage", stage=Stage(name="verify"))
        bundle, added = add_engine(
            bundle,
            engine,
            paths,
            check=check and (lambda made: notes.append(check(made, engine))),
            present=lambda other: (other.version, *_identity(other)) == (engine.version, *_identity(engine)),
        )
    if added:
        yield event(state="done", size=written, seconds=built.seconds, peak=built.peak, notes=tuple(filter(None, notes)))
    else:
        yield event(state="present", notes=("another build added it meanwhile",))
    return bundle


def _identity(engine: EngineSpec | EngineRequest) -> tuple[Any, ...]:
    profiles = [dict(profile) for profile in engine.profiles]
    return engine.component, engine.backend, engine.target, profiles, dict(engine.options)
