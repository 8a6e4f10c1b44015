"""The backends for NVIDIA GPUs on this machine: which load, which target they build for, and properties of the GPU."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.gate import BACKENDS
from sdruntime import __version__
from sdruntime.backends.base.engine import AMPERE_UP
from sdruntime.backends.ort.build import library
from sdruntime.backends.registry import backend
from sdruntime.bundle.manifest import Precision
from sdruntime.errors import SdruntimeError
from sdruntime.system.cuda import Cuda, devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A backend on this machine. `missing`: why it cannot build for this GPU, "" if it can. `listed`: the library lists this GPU
    as supported; if not, a failure is recorded but does not fail the run."""

    name: str
    version: str = ""
    target: str = ""
    missing: str = ""
    listed: bool = True


def look(name: str, precision: Precision = "fp16") -> Loaded:
    """Load a backend and resolve its target. If TensorRT-RTX does not list this GPU, use `ampere+`, to record the result."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: known are {', '.join(BACKENDS)}")
    if name == "onnxruntime":
        preload()
    library = backend(name).here()
    if library.version is None:
        return Loaded(name=name, missing=library.missing)
    wanted = "cuda" if name == "onnxruntime" else None
    try:
        target = backend(name).resolve_target(wanted, precision, {})
    except SdruntimeError as error:
        return Loaded(name=name, version=library.version, missing=str(error))
    return Loaded(name=name, version=library.version, target=target, listed=target != AMPERE_UP)


def preload() -> None:
    """Let ONNX Runtime find the CUDA libraries of torch or NVIDIA's wheels, as its documentation recommends."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401
    with contextlib.suppress(Exception):  # without them, the provider reports what is missing
        library().preload_dlls()


def gpu(index: int = 0) -> dict[str, Any]:
    """Return name, compute capability, memory in bytes and driver of a GPU; nothing that identifies the machine."""
    device = devices()[index]
    with Cuda.open(index) as cuda:
        free = cuda.free_memory()
    return {
        "name": device.name,
        "capability": f"{device.capability[0]}.{device.capability[1]}",
        "memory": device.memory,
        "free": free,
        "cuda": device.driver,
        "driver": driver(),
    }


def driver() -> str:
    """Return the driver's version, such as 580.95.05; "" if the system does not report it."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        if match := re.search(r"\b\d{3}\.\d{2,3}(\.\d{2})?\b", text):
            return match[0]
    return ""


def versions(backends: Mapping[str, Loaded]) -> dict[str, str]:
    own = {"sdruntime": __version__, "python": platform.python_version(), "numpy": np.__version__}
    return (
        own
        | {"system": f"{platform.system()} {platform.machine()}"}
        | {name: loaded.version for name, loaded in backends.items()}
    )


def slug(text: str) -> str:
    """Return a text for use in a file name: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
