"""The errors of sdexport, with their exit codes. Errors of sdruntime pass through unchanged.

SdexportError                 1   something failed
├── CheckpointError           2   the checkpoint is incomplete or not supported; carries every fault
├── RecipeError               2   a recipe cannot be used; carries every fault with its field
├── EnvironmentFault          3   this machine lacks something: a library, a newer version, the network
│   └── ProcessKilled         3   a signal ended the process of a component, as when the system runs out of memory
├── BenchError                1   a contestant of a benchmark failed
└── ExportError               1   a component's graph could not be exported, or is not valid
    ├── PrecisionError        1   the requested precision cannot represent some values; carries every fault
    └── AuditError            1   a graph in half precision is too far from its float32 graph

A message says what is wrong, where, the values, and the command or change that fixes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from sdruntime.errors import lines_of


class SdexportError(Exception):
    """Base of every error that sdexport raises on purpose."""

    exit_code: ClassVar[int] = 1


class CheckpointError(SdexportError):
    """A checkpoint cannot be exported. `faults` holds every reason."""

    exit_code = 2

    def __init__(self, where: object, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(_listed(where, self.faults))


class RecipeError(SdexportError):
    """A recipe cannot be used. `faults` holds every reason, each with the path of its field."""

    exit_code = 2

    def __init__(self, where: object, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(_listed(where, self.faults))


class EnvironmentFault(SdexportError):
    """This machine lacks what the call needs."""

    exit_code = 3


class ProcessKilled(EnvironmentFault):
    """A signal ended the process that exported a component."""


class BenchError(SdexportError):
    """A contestant of a benchmark failed; the message has its name and its error."""


class ExportError(SdexportError):
    """A component could not be exported to a valid ONNX graph."""


class PrecisionError(ExportError):
    """The requested precision cannot represent some values. `faults` holds one line for each tensor."""

    def __init__(self, where: object, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(_listed(where, self.faults))


class AuditError(ExportError):
    """A component in half precision is too far from its float32 graph."""


def _listed(where: object, faults: tuple[str, ...]) -> str:
    count = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}"
    return f"{where}: {count}\n{lines_of(faults)}"
