"""Describe what a benchmark measures: the engines of a bundle, the options that cost speed, and this machine."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdruntime.backends.base.engine import CPU
from sdruntime.backends.registry import BACKENDS
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.changes.change import remove_engine
from sdruntime.bundle.manifest import EngineSpec, Manifest
from sdruntime.bundle.roles import role
from sdruntime.engines.choose import Machine, choose_engine
from sdruntime.errors import quoted
from sdruntime.pipeline.jobs import SCHEDULER
from sdruntime.system import processor
from sdruntime.verification.golden import build_command

FEW_STEPS = ("turbo", "lightning", "lcm", "hyper", "schnell")  # in the names of models that need no guidance


def copy_without_engines(bundle: Path, place: Path) -> Path:
    """Copy a bundle to `place`, without its engines; return the folder of the copy."""
    copy = Bundle.open(Path(shutil.copytree(bundle, place)))
    for engine in copy.manifest.engines:
        copy = remove_engine(copy, engine)
    return copy.folder


def choose_engines(bundle: Bundle, name: str, machine: Machine, size: tuple[int, int]) -> list[EngineSpec]:
    """Return the engines that a pipeline of backend `name` opens for images of `size`, (width, height) in pixels.

    Raises EngineError and UnknownName.
    """
    width, height = (side // bundle.manifest.model.vae_factor for side in size)
    return [
        choose_engine(
            bundle,
            component,
            machine,
            name=name,
            **({} if role(component).rows == "texts" else {"height": height, "width": width}),
        )
        for component in first_components(bundle.manifest)
    ]


def first_components(manifest: Manifest) -> list[str]:
    """Return the components that every image needs, without those opened on demand."""
    return [name for name in manifest.components if not role(name).late]


def costs(
    bundle: Bundle, specs: Sequence[EngineSpec], machine: Machine, *, guidance: float, batch: int, unguided: bool
) -> list[str]:
    """Return one line for each option that costs speed, with the faster alternative."""
    warnings, build = [], f"sdruntime build {quoted(bundle.folder)} --backend onnxruntime"
    on_gpu, on_cpu = [spec for spec in specs if spec.target != CPU], [spec for spec in specs if spec.target == CPU]
    if guidance > 1 and unguided:
        warnings.append(
            f"guidance {guidance:g} doubles the UNet's rows, and {bundle.manifest.model.name} needs no guidance: --guidance 1"
        )
    if on_cpu and machine.devices:
        names = ", ".join(spec.component for spec in on_cpu)
        warnings.append(f"{names} on the CPU although this machine has {machine.devices[0].name}: {build} --target cuda")
    if slow := [spec.component for spec in on_gpu if spec.precision == "fp32"]:
        warnings.append(f"{', '.join(slow)} in fp32 on a GPU: {build_command(bundle, 'fp16')} takes about half the time")
    if slow := [spec.component for spec in on_cpu if spec.precision == "fp16"]:
        warnings.append(f"{', '.join(slow)} in fp16 on a CPU, which computes in fp32 and converts: --precision fp32 is faster")
    if wide := [spec.component for spec in specs if BACKENDS[spec.backend].static and _is_dynamic(spec)]:
        warnings.append(f"{', '.join(wide)} built for a range of shapes: engines of one --size and --batch are quicker")
    rows = batch * (2 if guidance > 1 else 1)
    for spec in specs:
        most = max(profile["batch"][2] if "batch" in profile else rows for profile in spec.profiles)
        if role(spec.component).rows == "guided" and most < rows:
            warnings.append(
                f"unet takes {most} rows and a step has {rows}, so it is called {-(-rows // most)} times: {build} --batch {batch}"
            )
    return warnings


def _is_dynamic(spec: EngineSpec) -> bool:
    return all(any(low != high for low, _, high in profile.values()) for profile in spec.profiles)


def needs_no_guidance(bundle: Bundle) -> bool:
    """Return whether the checkpoint was distilled to few steps without guidance, judging by its name and scheduler."""
    name, scheduler = bundle.manifest.model.name.casefold(), str(bundle.read_json(SCHEDULER).get("_class_name"))
    return any(word in name for word in FEW_STEPS) or scheduler in ("LCMScheduler", "TCDScheduler")


def machine_of(machine: Machine) -> dict[str, Any]:
    """Return the names of the processor and the GPUs, the date, and the `load` (mean of runnable processes, last minute)."""
    return {
        "processor": processor.name(),
        "cores": processor.cores(),
        "gpus": [device.name for device in machine.devices],
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "measured": time.strftime("%Y-%m-%d", time.gmtime()),
    }
