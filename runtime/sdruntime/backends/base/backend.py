"""The `Backend` record: one for each engine library, listed by `backends.registry`.

Every backend folder has the same three files:

    build.py    OPTIONS, resolve_target, build_engine   ONNX -> files
    engine.py   open_engine, check_session, here        files -> Engine
    backend.py  the record of both
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sdruntime.backends.base.building import BackendOptions, Built, EngineRequest, Library, Stage
from sdruntime.backends.base.engine import AMPERE_UP, CPU, CUDA, PLATFORM, Engine, EngineOptions, Shared
from sdruntime.backends.base.weights import MERGE
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec, Precision
from sdruntime.errors import EnvironmentFault, SettingError
from sdruntime.sampling.job import IN_FLIGHT, Job, Stepper
from sdruntime.system.cuda import Device


class DeviceLoop(Protocol):
    """Run the sampling loop on the GPU."""

    def __call__(
        self,
        jobs: Sequence[Job],
        unet: Engine,
        step: Engine,
        controlnet: Callable[[str], Engine],
        *,
        whole: bool = False,
        ahead: int = IN_FLIGHT,
    ) -> Sequence[Stepper]:
        """Return steppers for jobs of one shape, using the engines of the UNet and of the sampler step.

        `controlnet` returns the engine of a ControlNet by its component. The result is empty if these jobs or engines cannot run
        on the GPU. `whole`: all steps may be launched at once. `ahead`: how many steps the host may run ahead of the GPU.
        """
        ...


def same_release(engine: EngineSpec, installed: str) -> bool:
    """Return whether the `installed` version has the same major and minor number as the version that built `engine`."""
    return installed.split(".")[:2] == engine.version.split(".")[:2]


def _never(engine: EngineSpec) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """The capabilities and functions of an engine library.

    `ending`: suffix of the file that the library opens. `options`: the build options. `here()`: the installed version and its
    targets. `resolve_target(target, precision, options)` returns the full name of a target; None means the best one for this
    machine. It checks everything that can be checked before the build: LibraryMissing, DeviceMissing, UnknownName, SettingError.
    `build_engine(bundle, request, folder)` writes the engine's files. `open_engine` raises BundleError, EngineError,
    DeviceMissing, OutOfSpace. `check_session(settings)` checks `EngineOptions.session` before an engine is opened, as far as the
    library can: UnknownName, SettingError.

    `reads`: whether a version of the library can open an engine. `lacking`: the unsupported (target, precision) pairs, each with
    the reason to report. `static`: by default, engines are built for the requested shapes only, not for every size. `gpu_only`:
    its engines need an NVIDIA GPU, and use the caller's CUDA stream if one is passed. `in_jetpack`: included in JetPack. `loop`:
    runs the sampling loop on the GPU, which needs an engine of the component `step`. `replaces_weights`: whether an engine takes
    `EngineOptions.weights`; if not, `for_adapters` says what to do. `saves_memory`: whether an engine takes less memory on a CPU
    with `EngineOptions.low_memory`. `hidden`: for tests; never chosen or listed unless named explicitly.
    """

    name: str
    ending: str
    options: BackendOptions
    here: Callable[[], Library]
    resolve_target: Callable[[str | None, Precision, Mapping[str, str]], str]
    build_engine: Callable[[Bundle, EngineRequest, Path], Generator[Stage, None, Built]]
    open_engine: Callable[[Bundle, EngineSpec, EngineOptions, Shared], Engine]
    check_session: Callable[[Mapping[str, str]], None]
    reads: Callable[[EngineSpec, str], bool] = same_release
    lacking: Mapping[tuple[str, Precision], str] = field(default_factory=dict)
    static: bool = False
    gpu_only: bool = False
    in_jetpack: bool = False
    loop: DeviceLoop | None = None
    hidden: bool = False
    replaces_weights: Callable[[EngineSpec], bool] = _never
    for_adapters: str = MERGE
    saves_memory: Callable[[EngineSpec], bool] = _never

    def misfit(self, engine: EngineSpec, library: Library, device: Device | None) -> str | None:
        """Return why an engine of this backend cannot run with `library` on `device`, or None if it can."""
        if reason := self.lacking.get((engine.target, engine.precision)):
            return reason
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
        """Return why this machine cannot build an engine for itself, or None if it can."""
        if self.gpu_only and device is None:
            return "it needs an NVIDIA GPU, and this machine has no NVIDIA GPU"
        if library.version is None:
            return library.missing
        try:
            self.resolve_target(None, precision, {})
        except SettingError as error:  # the precision is not supported
            return str(error)
        except EnvironmentFault:  # `library.missing` covers this
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
        too_old = f"built for compute capability 8.0 and later, {device.name} has {major}.{minor}"
        return None if device.capability >= (8, 0) else too_old
    return None if engine.target == device.target else f"built for {engine.target}, {device.name} is {device.target}"
