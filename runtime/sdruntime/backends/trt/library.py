"""Import TensorRT or TensorRT-RTX, list its targets, and collect its messages."""

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
    """A TensorRT package. `ahead`: it builds for GPUs that are not present, and compiles its kernels when an engine is opened."""

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
    """Return the module tensorrt or tensorrt_rtx. Raises LibraryMissing with the loader's message."""
    flavour = FLAVOURS[name]
    try:
        return importlib.import_module(flavour.module)
    except (ImportError, OSError, RuntimeError) as error:  # bindings without libnvinfer, or for another system
        raise LibraryMissing(f"{name} cannot be imported ({error}): {flavour.install}") from error


def capabilities(trt: Any) -> dict[str, Any]:
    """Return the compute capabilities that TensorRT-RTX can build for, by target name ("sm86")."""
    members = trt.ComputeCapability.__members__.items()
    return {name.lower(): value for name, value in members if name.startswith("SM")}


def capabilities_of(trt: Any, target: str) -> list[Any]:
    """Return the compute capabilities of an engine for `target`: one, or all from 8.0 on."""
    known = capabilities(trt)
    if target == AMPERE_UP:
        return [value for name, value in known.items() if int(name[2:]) >= 80]
    return [known[target]]


def messages(trt: Any) -> Any:
    """Return a logger that keeps warnings and errors: `kept` holds (name of the severity, text)."""

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
            """Return the errors since the last call as one text, and clear all messages."""
            errors, self.kept = self.errors(), []
            return "; ".join(errors) or "no reason was given"

    return Messages()
