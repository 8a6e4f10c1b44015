"""Build engines from a bundle's own ONNX. A build adds the engine's files and changes the manifest, and nothing else."""

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
from sdruntime.bundle.changes.change import add_engine, building, remove_engine, tidy
from sdruntime.bundle.manifest import EngineSpec, Precision
from sdruntime.bundle.model import ModelSpec
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.engines.shapes import Guidance, Shapes
from sdruntime.errors import LibraryMissing, UnknownName
from sdruntime.system.events import mapped


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """Which engines to build: for a backend and a target, in shapes as `Shapes.parse` reads them.

    `target` None: the best that the library supports on this machine. `components` empty: all except those in `without`.
    `options`: settings of the backend.
    """

    backend: str
    target: str | None = None
    size: str | None = None
    batch: str | None = None
    guidance: Guidance | None = None
    chunks: str | None = None
    components: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    def shapes(self, model: ModelSpec) -> Shapes:
        """Return the shapes to build for. Raises SettingError, and UnknownName for a backend that does not exist."""
        static = backend(self.backend).static
        return Shapes.parse(model, size=self.size, batch=self.batch, guidance=self.guidance, chunks=self.chunks, static=static)

    def resolve(self, model: ModelSpec, precision: Precision, components: Iterable[str]) -> tuple[Shapes, str, str]:
        """Return the shapes, the library's version and the target's full name, after every check that needs no build.

        Raises SettingError, UnknownName, LibraryMissing and DeviceMissing.
        """
        shapes = self.resolve_model(model, components)
        return shapes, *self.resolve_library(precision)

    def resolve_model(self, model: ModelSpec, components: Iterable[str]) -> Shapes:
        """Do the part of `resolve` that needs no library. Raises SettingError and UnknownName."""
        shapes = self.shapes(model)
        for component in (*self.components, *self.without):
            if component not in components:
                raise UnknownName("component", component, components)
        return shapes

    def resolve_library(self, precision: Precision) -> tuple[str, str]:
        """Do the part of `resolve` that needs no model: return the library's version and the target's full name."""
        library = backend(self.backend).here()
        if library.version is None:
            raise LibraryMissing(library.missing)
        return library.version, backend(self.backend).resolve_target(self.target, precision, self.options)

    def chosen(self, components: Iterable[str]) -> tuple[str, ...]:
        """Return the components of a bundle to build engines of."""
        return self.components or tuple(component for component in components if component not in self.without)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildEvent:
    """A step of `build_engines`: an engine begins, reaches a stage, is done, or was already present."""

    component: str
    engine: str
    state: Literal["begin", "stage", "done", "present"]
    stage: Stage | None = None
    size: int = 0  # bytes written
    seconds: float = 0.0
    peak: int = 0  # bytes of memory of the builder's process, if it is a separate one
    notes: tuple[str, ...] = ()


Check = Callable[[Bundle, EngineSpec], str]


def build_engines(
    folder: Path | str, requested: BuildRequest, *, check: Check | None = None
) -> Generator[BuildEvent, None, None]:
    """Build an engine of each requested component and add it to the bundle, unless an equal engine is present.

    `check` is called with the bundle and each engine before the engine is added: `sdruntime.verification.verify.check_engine`.
    The text it returns becomes a note; if it raises, the engine is not added. If the build is interrupted, the finished engines
    remain.
    Raises BundleError, SettingError, LibraryMissing, DeviceMissing, OutOfSpace, and EngineError for a graph that the library
    cannot build.
    """
    bundle = Bundle.open(folder)
    tidy(bundle.folder)
    manifest = bundle.manifest
    shapes, version, target = requested.resolve(manifest.model, manifest.precision, manifest.components)
    buildable = [name for name in manifest.components if name != STEP or backend(requested.backend).loop]
    for component in requested.chosen(buildable):
        stem = f"{component}-{requested.backend}{version}-{target}-{manifest.precision}-{shapes.label}"
        request = EngineRequest(
            component=component,
            backend=requested.backend,
            target=target,
            profiles=shapes.profiles(component, manifest),
            stem=stem,
            options=requested.options,
        )
        identity = (version, *_identity(request))
        if any((engine.version, *_identity(engine)) == identity for engine in bundle.manifest.engines):
            yield BuildEvent(component=component, engine=stem, state="present")
        else:
            bundle = yield from _add(bundle, request, check)


def stale_engines(bundle: Bundle) -> list[EngineSpec]:
    """Return the engines that need another version of their library than the installed one; `rebuild_stale` rebuilds them."""
    stale = []
    for engine in bundle.manifest.engines:
        if owner := BACKENDS.get(engine.backend):
            version = owner.here().version
            if version is not None and not owner.reads(engine, version):
                stale.append(engine)
    return stale


def rebuild_stale(folder: Path | str, *, check: Check | None = None) -> Generator[BuildEvent, None, None]:
    """Rebuild each stale engine with the installed library, with the same settings, and remove the stale one.

    Raises the errors of `build_engines`.
    """
    bundle = Bundle.open(folder)
    tidy(bundle.folder)
    for engine in stale_engines(bundle):
        version = backend(engine.backend).here().version
        target = backend(engine.backend).resolve_target(engine.target, bundle.manifest.precision, engine.options)
        request = EngineRequest(
            component=engine.component,
            backend=engine.backend,
            target=target,
            profiles=engine.profiles,
            stem=engine.name.replace(f"{engine.backend}{engine.version}", f"{engine.backend}{version}", 1),
            options=engine.options,
        )
        present = any((other.version, *_identity(other)) == (version, *_identity(request)) for other in bundle.manifest.engines)
        if not present:
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
            check=check and (lambda changed: notes.append(check(changed, engine))),
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
