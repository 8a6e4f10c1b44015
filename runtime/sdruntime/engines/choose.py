"""Choose the engine of a bundle that fits this machine, and report why the others do not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdruntime.backends.base.building import Library
from sdruntime.backends.base.engine import CPU
from sdruntime.backends.base.feeds import split_rows
from sdruntime.backends.registry import BACKENDS, OFFERED, backend, is_hidden
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec, Manifest
from sdruntime.bundle.roles import role
from sdruntime.engines.shapes import dims_in_pixels, shapes_in_pixels
from sdruntime.errors import EngineError, quoted
from sdruntime.system.cuda import Device, check_device, devices

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The engine libraries of this machine by backend, and its GPUs. `speeds`: seconds per UNet call by `kind` of CPU engine, if
    they were measured (`sdruntime.engines.speed`)."""

    libraries: Mapping[str, Library]
    devices: tuple[Device, ...] = ()
    chosen: int = 0  # which of the devices engines run on
    speeds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def here(cls, device: int = 0, names: Iterable[str] = BACKENDS) -> Machine:
        """Inspect this machine, with device number `device`.

        `names`: the backends whose libraries are looked for, which imports them; unknown names are skipped. Raises DeviceMissing
        if `device` is not 0 and does not exist. Without any GPU, only CPU engines can be chosen.
        """
        if device:
            check_device(device)
        known = [name for name in names if name in BACKENDS]
        return cls(libraries={name: BACKENDS[name].here() for name in known}, devices=devices(), chosen=device)

    @property
    def device(self) -> Device | None:
        return self.devices[self.chosen] if self.chosen < len(self.devices) else None


def kind(engine: EngineSpec) -> str:
    """Return a name for engines of the same speed: their backend, and the settings that they were built with."""
    return " ".join([engine.backend, *(f"{key}={value}" for key, value in sorted(engine.options.items()))])


def misfit(engine: EngineSpec, machine: Machine) -> str | None:
    """Return why `engine` cannot run on this machine, or None if it can."""
    library = machine.libraries.get(engine.backend)
    if library is None or engine.backend not in BACKENDS:
        return f"this sdruntime knows no backend {engine.backend!r}"
    return BACKENDS[engine.backend].misfit(engine, library, machine.device)


def choose_engine(
    bundle: Bundle, component: str, machine: Machine, *, name: str = AUTO, rows: int = 1, **dims: int
) -> EngineSpec:
    """Return the best engine of `component` for this machine.

    GPU engines come before CPU engines, then the fastest CPU engine if `machine.speeds` are known, then backends in the order of
    BACKENDS. Among equal engines, the best is the one whose profile takes `rows`, the rows of the next call, with the least
    padding, or else the one that takes the most rows.

    `name` is a backend, or "auto" for any except the fake. `dims` are sizes that the engine must admit. Raises EngineError with
    the reason against each engine and the command that builds one that fits; UnknownName for a backend that does not exist.
    """
    if name != AUTO:
        backend(name)
    model, reasons = bundle.manifest.model, []
    fitting: list[EngineSpec] = []
    others: list[EngineSpec] = []
    for engine in bundle.manifest.engines:
        if engine.component != component or (is_hidden(engine.backend) and name != engine.backend):
            continue
        why_not = misfit(engine, machine)
        if why_not is None and not engine.admits(**dims):
            why_not = f"built for {shapes_in_pixels(engine, model)}; requested is {dims_in_pixels(component, model, dims)}"
        if why_not is not None:
            reasons += [f"{engine.name}: {why_not}"] if name in (AUTO, engine.backend) else []
        else:
            (fitting if name in (AUTO, engine.backend) else others).append(engine)
    if not fitting:
        of = "engine" if name == AUTO else f"{name} engine"
        against = "".join(f"\n  - {reason}" for reason in reasons) or f" (the bundle has no {of} of it)"
        advice = _advice(bundle, component, machine, name, dims, fitting=[engine.backend for engine in others])
        raise EngineError(f"no {of} of {component} fits this machine:{against}\n{advice}")
    return min(fitting, key=lambda engine: (*_preference(engine, machine, rows, dims), *_waste(engine, rows, dims)))


def warn_if_slow(engines: Iterable[EngineSpec], machine: Machine, folder: Path) -> None:
    """Issue a RuntimeWarning if engines run on the CPU although there is a GPU. `folder`: the bundle's."""
    slow = sorted({engine.component for engine in engines if engine.target == CPU and not is_hidden(engine.backend)})
    if slow and machine.devices:
        warnings.warn(
            f"{', '.join(slow)} will run on the CPU although this machine has {machine.devices[0].name}: no engine of the "
            f'bundle fits it; pip install "sdruntime[onnxruntime-gpu]" and sdruntime build {quoted(folder)} --backend '
            "onnxruntime --target cuda",
            RuntimeWarning,
            stacklevel=3,
        )


def _advice(
    bundle: Bundle, component: str, machine: Machine, name: str, dims: Mapping[str, int], *, fitting: Sequence[str]
) -> str:
    """Return the fix: the command that builds an engine for this machine, or another backend, one of those in `fitting`."""
    other = f"omit --backend: the bundle's {fitting[0]} engine fits" if fitting else ""
    why_not = {}
    for offered in [name] if name != AUTO else OFFERED:
        library = machine.libraries.get(offered) or BACKENDS[offered].here()
        why_not[offered] = BACKENDS[offered].cannot_build(library, machine.device, bundle.manifest.precision)
        if why_not[offered] is None:
            size = _size(bundle.manifest, component, dims)
            chunks, shorter = _chunks(bundle.manifest, dims)
            command = f"{shorter}build one: sdruntime build {quoted(bundle.folder)} --backend {offered}{size}{chunks}"
            return f"{command}, or {other}" if other else command
    if name != AUTO:
        return f"{name} cannot be used: {why_not[name]}\n" + (
            other or _advice(bundle, component, machine, AUTO, dims, fitting=())
        )
    return "no engine library is usable:" + "".join(f"\n  - {offered}: {reason}" for offered, reason in why_not.items())


def _size(manifest: Manifest, component: str, dims: Mapping[str, int]) -> str:
    """Return the --size option for these dimensions, or "" if they have no width and height."""
    if not {"width", "height"} <= dims.keys():
        return ""
    factor = role(component).factor(manifest.model.vae_factor)
    return f" --size {factor * dims['width']}x{factor * dims['height']}"


def _chunks(manifest: Manifest, dims: Mapping[str, int]) -> tuple[str, str]:
    """Return the --chunks option for a text of several chunks, and the way without a build; "" and "" for a text of one."""
    count = -(-dims.get("sequence", 0) // manifest.text_length)
    if count < 2:
        return "", ""
    return f" --chunks 1:{count}", f"the prompt takes {count} chunks of {manifest.text_length - 2} tokens: shorten it, or "


def _preference(engine: EngineSpec, machine: Machine, rows: int, dims: Mapping[str, int]) -> tuple[bool, float, int]:
    seconds = 0.0
    if engine.target == CPU:
        seconds = machine.speeds.get(kind(engine), math.inf) * _computed_rows(engine, rows, dims)
    return engine.target == CPU, seconds, list(BACKENDS).index(engine.backend)


def _waste(engine: EngineSpec, rows: int, dims: Mapping[str, int]) -> tuple[bool, int]:
    """Return (False, rows of padding), or (True, -the most rows at a time) if a call of `rows` must be split."""
    sizes = [engine.profiles[index].get("batch", (1, 1, rows)) for index in engine.admitting(**dims)]
    (first, *others) = split_rows(rows, sizes)
    return (True, -max(high for _, _, high in sizes)) if others else (False, first[1] - rows)


def _computed_rows(engine: EngineSpec, rows: int, dims: Mapping[str, int]) -> int:
    """Return how many rows a call of `rows` computes with padding, as `call_rows` splits and pads it."""
    sizes = [engine.profiles[index].get("batch", (1, 1, rows)) for index in engine.admitting(**dims)]
    return sum(count for _, count in split_rows(rows, sizes))
