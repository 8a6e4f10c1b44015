"""Which of a bundle's engines fits this machine, and why the others do not."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sdruntime.backends import BACKENDS, backend
from sdruntime.cuda import Device, devices
from sdruntime.engine import Library
from sdruntime.errors import EngineError
from sdruntime.manifest import EngineSpec, Manifest

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this machine has: the engine libraries by backend, and its GPUs."""

    libraries: Mapping[str, Library]
    devices: tuple[Device, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        return cls(libraries={name: backend(name, "engine").here() for name in BACKENDS}, devices=devices())


def misfit(engine: EngineSpec, machine: Machine, **dims: int) -> str | None:
    """Why `engine` cannot run here, or at these dimensions; None where it can."""
    library = machine.libraries.get(engine.backend)
    if library is None:
        return f"this sdruntime knows no backend {engine.backend!r}"
    if library.version is None:
        return library.missing
    if _release(library.version) != _release(engine.version):
        return f"built with {engine.backend} {engine.version}, here is {library.version}"
    if engine.target not in library.targets:
        return f"built for {engine.target}, here is {', '.join(library.targets)}"
    if engine.target == "cuda" and not machine.devices:
        return "built for cuda, here is no CUDA device"
    if not engine.admits(**dims):
        wrong = [name for name, size in dims.items() if not engine.admits(**{name: size})]
        return "; ".join(f"{name} {dims[name]} is outside {_range(engine, name)}" for name in wrong)
    return None


def choose_engine(manifest: Manifest, component: str, machine: Machine, *, name: str = AUTO, **dims: int) -> EngineSpec:
    """The best engine of `component` for this machine: by backend in the order of BACKENDS, then CUDA before the CPU.

    `name` is a backend, or "auto" for any but the fake. `dims` are sizes that the engine must admit. Raises EngineError with the
    reason against each engine and the command that builds one that fits; UnknownName for a backend that does not exist.
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
        command = f"sdruntime build BUNDLE --backend {'onnxruntime' if name == AUTO else name}{_size(manifest, component, dims)}"
        raise EngineError(f"no engine of {component} fits this machine:{against}\nbuild one: {command}")
    return min(found, key=_preference)


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


def _size(manifest: Manifest, component: str, dims: Mapping[str, int]) -> str:
    """The option that asks for engines of these dimensions, where they are a picture's."""
    if not {"width", "height"} <= dims.keys():
        return ""
    factor = 1 if component == "vae_encoder" else manifest.model.vae_factor
    return f" --size {factor * dims['width']}x{factor * dims['height']}"


def _preference(engine: EngineSpec) -> tuple[int, bool]:
    return list(BACKENDS).index(engine.backend), engine.target == "cpu"


def _release(version: str) -> tuple[str, ...]:
    """Major and minor: within them, ONNX Runtime reads its own optimised graphs."""
    return tuple(version.split(".")[:2])


def _range(engine: EngineSpec, name: str) -> str:
    low, _, high = engine.ranges[name]
    return f"{low} to {high}" if low < high else f"the {low} that it was built for"
