"""What a backend is: one record for each engine library, which `backends.registry` lists.

Each folder of `sdruntime.backends` holds the same three files:

    build.py    OPTIONS, resolve_target, build_engine   ONNX -> files
    engine.py   open_engine, here                       files -> Engine
    backend.py  the record of both
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sdruntime.backends.base.building import BackendOptions, Built, EngineRequest, Library, Stage
from sdruntime.backends.base.engine import AMPERE_UP, CPU, CUDA, PLATFORM, Engine, EngineOptions, Shared
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec, Precision
from sdruntime.errors import EnvironmentFault, SettingError
from sdruntime.sampling.job import IN_FLIGHT, Job, Stepper
from sdruntime.system.cuda import Device


class DeviceLoop(Protocol):
    """Keeps the sampler's loop on a GPU."""

    def __call__(
        self, jobs: Sequence[Job], unet: Engine, step: Engine, *, whole: bool = False, ahead: int = IN_FLIGHT
    ) -> Sequence[Stepper]:
        """What advances jobs of one shape, with the engines of the UNet and of the sampler's step; empty where these jobs or
        engines do not allow it. `whole`: all steps may be launched at once. `ahead`: steps that the host may run ahead."""
        ...


def same_release(engine: EngineSpec, here: str) -> bool:
    """Whether the library's version `here` has the major and minor number of the one that built `engine`."""
    return here.split(".")[:2] == engine.version.split(".")[:2]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An engine library: what it can do, and how it is called.

    `ending`: of the file that the library opens. `options`: the settings of a build. `here()`: what this machine has of the
    library. `resolve_target(target, precision, options)` returns the target's full name, for None the best one for this machine,
    and raises whatever can be refused before the work: LibraryMissing, DeviceMissing, UnknownName, SettingError.
    `build_engine(bundle, request, folder)` writes the engine's files. `open_engine` raises BundleError, EngineError,
    DeviceMissing, OutOfSpace.

    `reads`: whether a version of the library can open an engine. `lacking`: each (target, precision) that it cannot compute, and
    the reason to report. `static`: engines are built for the requested shapes alone by default, else for every size.
    `gpu_only`: its engines need an NVIDIA GPU, and work on the caller's CUDA stream if one is given. `in_jetpack`: JetPack brings
    it. `loop`: it can keep the sampler's loop on the GPU, so it builds the component `step` too. `hidden`: for tests, and never
    chosen or listed unless it is named.
    """

    name: str
    ending: str
    options: BackendOptions
    here: Callable[[], Library]
    resolve_target: Callable[[str | None, Precision, Mapping[str, str]], str]
    build_engine: Callable[[Bundle, EngineRequest, Path], Generator[Stage, None, Built]]
    open_engine: Callable[[Bundle, EngineSpec, EngineOptions, Shared], Engine]
    reads: Callable[[EngineSpec, str], bool] = same_release
    lacking: Mapping[tuple[str, Precision], str] = field(default_factory=dict)
    static: bool = False
    gpu_only: bool = False
    in_jetpack: bool = False
    loop: DeviceLoop | None = None
    hidden: bool = False

    def misfit(self, engine: EngineSpec, library: Library, device: Device | None) -> str | None:
        """Why an engine of this backend cannot run with `library` on `device`; None where it can."""
        if told := self.lacking.get((engine.target, engine.precision)):
            return told
        if library.version is None:
            return library.missing
        if not engine.files[0].endswith(self.ending):
            return f"{engine.files[0]} is not a {self.ending} file, as engines of {self.name} are"
        if not self.reads(engine, library.version):
            return f"built with {self.name} {engine.version}, installed is {library.version}"
        if engine.platform not in ("", PLATFORM):
            return f"built on {engine.platform}, this is {PLATFORM}"
        return _wrong_device(engine, library, device)

    def cannot_build(self, library: Library, device: Device | None, precision: Precision) -> str | None:
        """Why no engine can be built here that runs here; None where one can."""
        if self.gpu_only and device is None:
            return "it needs an NVIDIA GPU, and this machine has no NVIDIA GPU"
        if library.version is None:
            return library.missing
        try:
            self.resolve_target(None, precision, {})
        except SettingError as error:  # for a precision; what is missing, the library said
            return str(error)
        except EnvironmentFault:
            pass
        return None


def _wrong_device(engine: EngineSpec, library: Library, device: Device | None) -> str | None:
    if engine.target in (CPU, CUDA):
        if engine.target not in library.targets:
            return f"built for {engine.target}, this machine has {', '.join(library.targets)}"
        return "built for cuda, but there is no CUDA device" if engine.target == CUDA and device is None else None
    if device is None:
        return f"built for {engine.target}, but there is no CUDA device"
    if engine.target == AMPERE_UP:
        major, minor = device.capability
        old = f"built for compute capability 8.0 and later, {device.name} has {major}.{minor}"
        return None if device.capability >= (8, 0) else old
    return None if engine.target == device.target else f"built for {engine.target}, {device.name} is {device.target}"
