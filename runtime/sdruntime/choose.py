"""Which of a bundle's engines fits this machine, and why the others do not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sdruntime.backends import BACKENDS, backend
from sdruntime.cuda import Device, check_device, devices
from sdruntime.engine import AMPERE_UP, CPU, PLATFORM, Library
from sdruntime.errors import EngineError
from sdruntime.manifest import EngineSpec, Manifest

AUTO = "auto"
CPU_OR_CUDA = ("cpu", "cuda")  # targets that are no compute capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this machine has: the engine libraries by backend, and its GPUs. `speeds`: seconds of a UNet call by `kind` of CPU
    engine, where that was measured (`sdruntime.speed`)."""

    libraries: Mapping[str, Library]
    devices: tuple[Device, ...] = ()
    chosen: int = 0  # which of the devices engines run on
    speeds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def here(cls, device: int = 0, names: Iterable[str] = BACKENDS) -> Machine:
        """`names`: the backends to look for, since looking imports their libraries; a name of none is passed over.

        Raises DeviceMissing for a device beyond the first one that is not there; without any GPU engines for the CPU remain.
        """
        if device:
            check_device(device)
        known = [name for name in names if name in BACKENDS]
        return cls(libraries={name: backend(name, "engine").here(name) for name in known}, devices=devices(), chosen=device)

    @property
    def device(self) -> Device | None:
        return self.devices[self.chosen] if self.chosen < len(self.devices) else None


def kind(engine: EngineSpec) -> str:
    """What engines are alike in speed: their backend, and the settings that they were built with."""
    return " ".join([engine.backend, *(f"{key}={value}" for key, value in sorted(engine.options.items()))])


def misfit(engine: EngineSpec, machine: Machine, **dims: int) -> str | None:
    """Why `engine` cannot run here, or at these dimensions; None where it can."""
    library = machine.libraries.get(engine.backend)
    if library is None:
        return f"this sdruntime knows no backend {engine.backend!r}"
    if library.version is None:
        return library.missing
    if not fits_version(engine, library.version):
        return f"built with {engine.backend} {engine.version}, here is {library.version}"
    if engine.platform not in ("", PLATFORM):
        return f"built on {engine.platform}, here is {PLATFORM}"
    if why_not := _wrong_device(engine, machine, library):
        return why_not
    if not engine.admits(**dims):
        asked = ", ".join(f"{name} {size}" for name, size in dims.items())
        return f"built for {engine.shapes}; asked is {asked}"
    return None


def _wrong_device(engine: EngineSpec, machine: Machine, library: Library) -> str | None:
    if engine.target in CPU_OR_CUDA:
        if engine.target not in library.targets:
            return f"built for {engine.target}, here is {', '.join(library.targets)}"
        return "built for cuda, here is no CUDA device" if engine.target == "cuda" and not machine.devices else None
    if machine.device is None:
        return f"built for {engine.target}, here is no CUDA device"
    here = machine.device.capability
    if engine.target == AMPERE_UP:
        return (
            None if here >= (8, 0) else f"built for compute capability 8.0 and later, {machine.device.name} has {_dotted(here)}"
        )
    if engine.target != f"sm{here[0]}{here[1]}":
        return f"built for {engine.target}, {machine.device.name} is sm{here[0]}{here[1]}"
    return None


def fits_version(engine: EngineSpec, here: str) -> bool:
    """Whether the library in version `here` reads `engine`: the same version where the backend is exact (or a later one of the
    same major, for a version-compatible engine), else the same major and minor release."""
    if not BACKENDS[engine.backend].exact:
        return here.split(".")[:2] == engine.version.split(".")[:2]
    if engine.options.get("version_compatible") == "true":
        return _numbers(here)[:1] == _numbers(engine.version)[:1] and _numbers(here) >= _numbers(engine.version)
    return here == engine.version


def choose_engine(
    manifest: Manifest, component: str, machine: Machine, *, name: str = AUTO, rows: int = 1, **dims: int
) -> EngineSpec:
    """The best engine of `component` for this machine: a GPU's before the CPU's, then, on the CPU, the quickest where
    `machine.speeds` tell, then by backend in the order of BACKENDS.

    `name` is a backend, or "auto" for any but the fake. `dims` are sizes that the engine must admit. `rows` are those of the call
    to come: among engines that are alike, the one whose profile has room for them with the least to spare, else the one that
    takes the most. Raises EngineError with the reason against each engine and the command that builds one that fits; UnknownName
    for a backend that does not exist.
    """
    if name != AUTO:
        backend(name, "engine")
    found, reasons = [], []
    for engine in manifest.engines:
        if engine.component == component and (engine.backend == name or (name == AUTO and engine.backend != "fake")):
            why_not = misfit(engine, machine, **dims)
            if why_not is None:
                found.append(engine)
            else:
                reasons.append(f"{engine.name}: {why_not}")
    if not found:
        against = "".join(f"\n  - {reason}" for reason in reasons) or " (the bundle has none)"
        command = f"sdruntime build BUNDLE --backend {_advised(name, machine)}{_size(manifest, component, dims)}"
        raise EngineError(f"no engine of {component} fits this machine:{against}\nbuild one: {command}")
    return min(found, key=lambda engine: (*_preference(engine, machine, rows, dims), *_waste(engine, rows, dims)))


def warn_if_slow(engines: Iterable[EngineSpec], machine: Machine) -> None:
    """A RuntimeWarning where a CUDA device stands by while the CPU does the work."""
    slow = sorted({engine.component for engine in engines if engine.target == "cpu" and engine.backend != "fake"})
    if slow and machine.devices:
        warnings.warn(
            f"{', '.join(slow)} will run on the CPU although {machine.devices[0].name} is here: no engine of the bundle fits "
            'that; pip install "sdruntime[onnxruntime-gpu]" and sdruntime build BUNDLE --backend onnxruntime --target cuda',
            RuntimeWarning,
            stacklevel=3,
        )


def _advised(name: str, machine: Machine) -> str:
    """A backend whose engines this machine can run: the one that was asked for, or the best whose library is here."""
    if name != AUTO and (machine.devices or not BACKENDS[name].loop):
        return name
    here = [each for each, library in machine.libraries.items() if library.version is not None and BACKENDS[each].loop]
    return here[0] if here and machine.devices else "onnxruntime"


def _size(manifest: Manifest, component: str, dims: Mapping[str, int]) -> str:
    """The option that asks for engines of these dimensions, where they are a picture's."""
    if not {"width", "height"} <= dims.keys():
        return ""
    factor = 1 if component == "vae_encoder" else manifest.model.vae_factor
    return f" --size {factor * dims['width']}x{factor * dims['height']}"


def _preference(engine: EngineSpec, machine: Machine, rows: int, dims: Mapping[str, int]) -> tuple[bool, float, int]:
    seconds = 0.0
    if engine.target == CPU:
        seconds = machine.speeds.get(kind(engine), math.inf) * _computed(engine, rows, dims)
    return engine.target == CPU, seconds, list(BACKENDS).index(engine.backend)


def _waste(engine: EngineSpec, rows: int, dims: Mapping[str, int]) -> tuple[bool, int]:
    """Whether a call of `rows` must be split, and then how little at a time, else by how many rows it is padded."""
    sizes = [engine.profiles[index].get("batch", (1, 1, rows)) for index in engine.admitting(**dims)]
    room = [max(low - rows, 0) for low, _, high in sizes if rows <= high]
    return (False, min(room)) if room else (True, -max(high for _, _, high in sizes))


def _computed(engine: EngineSpec, rows: int, dims: Mapping[str, int]) -> int:
    """How many rows a call of `rows` computes, the padding included, as `engine.call_rows` splits and pads it."""
    sizes = [engine.profiles[index].get("batch", (1, 1, rows)) for index in engine.admitting(**dims)]
    if any(low <= rows <= high for low, _, high in sizes):
        return rows
    most = max(high for _, _, high in sizes)
    left = rows % most
    return rows - left + (min(max(low, left) for low, _, high in sizes if left <= high) if left else 0)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
