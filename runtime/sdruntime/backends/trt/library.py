"""Which TensorRT is here, what it can build for, and what it says."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdruntime.backends.base.engine import AMPERE_UP
from sdruntime.errors import LibraryMissing

CURRENT = "current"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """`ahead`: builds for GPUs that are not here, and compiles its kernels on the device when an engine is opened."""

    module: str
    install: str
    ahead: bool


FLAVOURS: Mapping[str, Flavour] = {
    "tensorrt": Flavour(
        module="tensorrt",
        install='pip install "sdruntime[tensorrt]"; on a Jetson it comes with JetPack: python3 -m venv --system-site-packages',
        ahead=False,
    ),
    "tensorrt-rtx": Flavour(module="tensorrt_rtx", install='pip install "sdruntime[tensorrt-rtx]"', ahead=True),
}


def library(name: str) -> Any:
    """The module tensorrt or tensorrt_rtx. Raises LibraryMissing with what the system's loader said."""
    flavour = FLAVOURS[name]
    try:
        return importlib.import_module(flavour.module)
    except (ImportError, OSError, RuntimeError) as error:  # the bindings are there without libnvinfer, or for another system
        raise LibraryMissing(f"{name} cannot be imported ({error}): {flavour.install}") from error


def capabilities(trt: Any) -> dict[str, Any]:
    """The compute capabilities that TensorRT-RTX builds ahead for, by their names here ("sm86")."""
    members = trt.ComputeCapability.__members__.items()
    return {name.lower(): value for name, value in members if name.startswith("SM")}


def capabilities_of(trt: Any, target: str) -> list[Any]:
    """What an engine for `target` is compiled for: one compute capability, or all from 8.0 on."""
    known = capabilities(trt)
    if target == AMPERE_UP:
        return [value for name, value in known.items() if int(name[2:]) >= 80]
    return [known[target]]


def messages(trt: Any) -> Any:
    """A logger that keeps what the library says from warnings up: `kept` holds (severity's name, text)."""

    class Messages(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.kept: list[tuple[str, str]] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.kept.append((severity.name, msg))

        def errors(self) -> list[str]:
            return [text for severity, text in self.kept if severity != "WARNING"]

        def reasons(self) -> str:
            """The errors since the last question, for a message."""
            told, self.kept = self.errors(), []
            return "; ".join(told) or "no reason was given"

    return Messages()
