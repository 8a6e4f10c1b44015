"""Describe a machine and a bundle, as a JSON document and as lines of text."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sdruntime import __version__
from sdruntime.backends.base.engine import CPU
from sdruntime.backends.registry import BACKENDS, is_hidden
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec, Manifest
from sdruntime.bundle.records import json_from_record
from sdruntime.engines.choose import Machine, misfit
from sdruntime.engines.memory import MemoryPlan, memory_plan
from sdruntime.engines.shapes import dims_in_pixels, shapes_in_pixels
from sdruntime.engines.speed import Race
from sdruntime.errors import SdruntimeError, quoted
from sdruntime.system.cuda import Cuda
from sdruntime.system.jetson import jetson
from sdruntime.system.memory import available_memory


def machine_document(machine: Machine) -> dict[str, Any]:
    """Return the description of a machine. `free`: free bytes of each GPU, or null if its driver does not report them."""
    board = jetson()
    return {
        "sdruntime": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "memory": available_memory(),
        "libraries": {
            name: {"version": library.version, "targets": list(library.targets), "missing": library.missing}
            for name, library in machine.libraries.items()
            if not is_hidden(name)
        },
        "devices": [
            {**json_from_record(device), "target": device.target, "free": _free(index)}
            for index, device in enumerate(machine.devices)
        ],
        "jetson": None if board is None else {**json_from_record(board), "hint": board.hint},
    }


def _free(index: int) -> int | None:
    try:
        with Cuda.open(index) as cuda:
            return cuda.free_memory()
    except SdruntimeError:
        return None


def machine_lines(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of text for a `machine_document`."""
    yield (
        f"sdruntime {document['sdruntime']}, Python {document['python']}, NumPy {document['numpy']}, {document['machine']}, "
        f"{document['memory'] >> 20:,} MiB available"
    )
    if board := document["jetson"]:
        mode = f", power mode {board['power_mode']}" if board["power_mode"] else ""
        yield f"Jetson: {board['model'] or 'unknown board'}, L4T {board['release'] or 'of unknown release'}{mode}"
    for index, device in enumerate(document["devices"]):
        free = "free memory unknown" if device["free"] is None else f"{device['free'] >> 20:,} MiB free"
        shared = ", shared with the system" if device["integrated"] else ""
        yield (
            f"GPU {index}: {device['name']}, {device['target']}, {device['memory'] >> 20:,} MiB{shared}, {free}, "
            f"driver for CUDA {device['driver']}"
        )
    if not document["devices"]:
        yield "GPU: none (no NVIDIA driver, or it sees no device)"
    for name, library in document["libraries"].items():
        if library["version"]:
            targets = ", ".join(library["targets"]) or "not on this machine: it needs a GPU"
            yield f"{name} {library['version']}: builds for {targets}"
        else:
            yield f"{name}: {library['missing']}"
            if board and BACKENDS[name].in_jetpack and board["hint"]:
                yield f"  {board['hint']}"


def bundle_document(bundle: Bundle, machine: Machine) -> dict[str, Any]:
    """Return the description of a bundle.

    `memory`: the bytes that a pipeline needs, for each backend and target of the bundle's GPU engines. `cpu_seconds`: seconds per
    UNet call by kind of CPU engine, or null if they were not measured on this machine.
    """
    manifest = bundle.manifest
    plans = {}
    for name, plan in _plans(manifest).items():
        parts = [{**json_from_record(part), "activations": part.activations} for part in plan.parts]
        plans[name] = {"parts": parts, "total": plan.total, "lowest": plan.lowest, "complete": plan.complete}
    return {
        "manifest": json_from_record(manifest),
        "misfits": {engine.name: misfit(engine, machine) for engine in manifest.engines},
        "memory": plans,
        "cpu_seconds": None if (timed := _timed(bundle, machine)) is None else timed[1],
    }


def bundle_lines(bundle: Bundle, machine: Machine) -> Iterator[str]:
    """Yield the lines of text about a bundle and about which of its engines fit the machine."""
    manifest, model = bundle.manifest, bundle.manifest.model
    yield f"{model.name}: {model.family}, {model.prediction_type}, {manifest.precision}, license {model.license}"
    if str(model.defaults):
        yield f"defaults: {model.defaults}"
    yield f"images of {model.usual_size[1]}x{model.usual_size[0]} by default, in multiples of {model.step}"
    yield f"{len(manifest.files)} files, {sum(spec.size for spec in manifest.files.values()):,} bytes"
    for name, component in manifest.components.items():
        yield f"{name:<16}{sum(manifest.files[path].size for path in component.files):>16,} bytes of ONNX"
        for engine in manifest.engines:
            if engine.component == name:
                yield f"  {engine.name}: {misfit(engine, machine) or 'fits this machine'}"
                yield f"    {shapes_in_pixels(engine, model)}"
    if not manifest.engines:
        yield f"no engines yet: sdruntime build {quoted(bundle.folder)} --backend onnxruntime"
    if timed := _timed(bundle, machine):
        dims, seconds = timed
        ranked = ", ".join(f"{name} {time:.3g} s" for name, time in sorted(seconds.items(), key=lambda pair: pair[1]))
        yield f"a UNet call on this CPU ({dims_in_pixels('unet', model, dims)}): {ranked}"
    for name, plan in _plans(manifest).items():
        yield f"memory on the GPU, {name}:"
        yield from (f"  {line}" for line in plan.lines())


def _timed(bundle: Bundle, machine: Machine) -> tuple[Mapping[str, int], Mapping[str, float]] | None:
    """Return the dimensions of the call and the seconds by kind, or None if no pipeline measured them on this machine."""
    race = Race.of(bundle, machine)
    seconds = race and race.cached()
    return (race.dims, seconds) if race and seconds else None


def _plans(manifest: Manifest) -> dict[str, MemoryPlan]:
    """Return the memory plan of the GPU engines of each backend, version and target."""
    groups: dict[str, list[EngineSpec]] = {}
    for engine in manifest.engines:
        if engine.target != CPU and not is_hidden(engine.backend):
            groups.setdefault(f"{engine.backend} {engine.version} for {engine.target}", []).append(engine)
    return {name: memory_plan(manifest, engines) for name, engines in groups.items()}
