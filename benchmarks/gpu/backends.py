"""The backends that run on an NVIDIA GPU, here: which of them load, what they build for, and what is known of the GPU."""

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
    """A backend here. `missing` says why it cannot build for this GPU; empty where it can. `listed`: the library names this GPU
    among those that it is for; where it does not, a failure is news and no fault."""

    name: str
    version: str = ""
    target: str = ""
    missing: str = ""
    listed: bool = True


def look(name: str, precision: Precision = "fp16") -> Loaded:
    """TensorRT-RTX that does not list this GPU is asked for `ampere+`: what it says of that is worth a record."""
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
    """Let ONNX Runtime find the CUDA libraries that torch or NVIDIA's wheels brought, as its documentation says to."""
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401
    with contextlib.suppress(Exception):  # without them the provider says itself what it lacks
        library().preload_dlls()


def gpu(index: int = 0) -> dict[str, Any]:
    """Name, compute capability, memory in bytes, driver. Nothing that tells one machine from another of its kind."""
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
    """The driver's own version, such as 580.95.05; empty where the system does not tell."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        if found := re.search(r"\b\d{3}\.\d{2,3}(\.\d{2})?\b", text):
            return found[0]
    return ""


def versions(found: Mapping[str, Loaded]) -> dict[str, str]:
    here = {"sdruntime": __version__, "python": platform.python_version(), "numpy": np.__version__}
    return here | {"system": f"{platform.system()} {platform.machine()}"} | {n: each.version for n, each in found.items()}


def slug(text: str) -> str:
    """For a file's name: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
