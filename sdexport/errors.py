"""The errors of sdexport, and the exit code that each gives the command line. Those of sdruntime pass through as they are.

SdexportError                 1   something failed
├── CheckpointError           2   the checkpoint is not whole, or not one that this exporter knows; carries every fault
├── RecipeError               2   a recipe cannot be used; carries every fault with its field
├── EnvironmentFault          3   this machine lacks something: a library, a newer version, the network
│   └── ProcessKilled         3   the process of a component was ended from outside, as a system out of memory does
├── BenchError                1   a contestant of a benchmark failed
└── ExportError               1   a component's graph could not be made, or is not sound
    ├── PrecisionError        1   values that the requested precision cannot represent; lists every fault
    └── AuditError            1   a graph in half precision that is too far from its float32 one

A message says what was wrong, where, the numbers, and the command or the change that mends it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from sdruntime.errors import lines_of


class SdexportError(Exception):
    """Base of every error that sdexport raises on purpose."""

    exit_code: ClassVar[int] = 1


class CheckpointError(SdexportError):
    """A checkpoint cannot be exported. `faults` holds every reason that was found."""

    exit_code = 2

    def __init__(self, where: object, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(_listed(where, self.faults))


class RecipeError(SdexportError):
    """A recipe cannot be used. `faults` holds every reason that was found, each with the path of its field."""

    exit_code = 2

    def __init__(self, where: object, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(_listed(where, self.faults))


class EnvironmentFault(SdexportError):
    """This machine lacks what the call needs."""

    exit_code = 3


class ProcessKilled(EnvironmentFault):
    """The process that exported a component was ended by a signal."""


class BenchError(SdexportError):
    """A contestant of a benchmark failed; the message names it and what it said."""


class ExportError(SdexportError):
    """A component could not be turned into a sound ONNX graph."""


class PrecisionError(ExportError):
    """Values that the requested precision cannot represent. `faults` holds one line for each tensor."""

    def __init__(self, where: object, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__(_listed(where, self.faults))


class AuditError(ExportError):
    """A component in half precision is too far from its float32 graph."""


def _listed(where: object, faults: tuple[str, ...]) -> str:
    count = f"{len(faults)} fault{'s' if len(faults) != 1 else ''}"
    return f"{where}: {count}\n{lines_of(faults)}"
