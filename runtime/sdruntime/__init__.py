"""Stable Diffusion inference with NumPy and an engine library.

`__all__` is the public API (docs/api.md). Each name is imported on first use. The submodules may change without notice.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdruntime.adapters.lora import Lora
    from sdruntime.backends.base.engine import EngineOptions
    from sdruntime.bundle.bundle import Bundle
    from sdruntime.errors import (
        BundleError,
        DeviceMissing,
        EngineError,
        EnvironmentFault,
        LibraryMissing,
        NotFinite,
        OutOfSpace,
        QueueFull,
        QueueTimeout,
        SdruntimeError,
        SettingError,
        UnknownName,
        Unsupported,
        VerificationFailed,
    )
    from sdruntime.pipeline.pipeline import Pipeline
    from sdruntime.pipeline.requests.control import Control
    from sdruntime.pipeline.requests.image_prompt import ImagePrompt
    from sdruntime.pipeline.requests.request import Request
    from sdruntime.pipeline.result import Image, Result
    from sdruntime.pipeline.stream import Stream
    from sdruntime.sampling.job import Job, State
    from sdruntime.serving.batcher import Batcher, Counts, ImageFuture, Progress, Timings

__version__ = "0.1.0"
__all__ = [
    "Batcher",
    "Bundle",
    "BundleError",
    "Control",
    "Counts",
    "DeviceMissing",
    "EngineError",
    "EngineOptions",
    "EnvironmentFault",
    "Image",
    "ImageFuture",
    "ImagePrompt",
    "Job",
    "LibraryMissing",
    "Lora",
    "NotFinite",
    "OutOfSpace",
    "Pipeline",
    "Progress",
    "QueueFull",
    "QueueTimeout",
    "Request",
    "Result",
    "SdruntimeError",
    "SettingError",
    "State",
    "Stream",
    "Timings",
    "UnknownName",
    "Unsupported",
    "VerificationFailed",
]
_HOMES = {
    "adapters.lora": ("Lora",),
    "backends.base.engine": ("EngineOptions",),
    "bundle.bundle": ("Bundle",),
    "pipeline.pipeline": ("Pipeline",),
    "pipeline.stream": ("Stream",),
    "pipeline.requests.control": ("Control",),
    "pipeline.requests.image_prompt": ("ImagePrompt",),
    "pipeline.requests.request": ("Request",),
    "pipeline.result": ("Image", "Result"),
    "sampling.job": ("Job", "State"),
    "serving.batcher": ("Batcher", "Counts", "ImageFuture", "Progress", "Timings"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "errors")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
