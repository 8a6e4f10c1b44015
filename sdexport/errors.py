"""The errors of sdexport, with their exit codes. Errors of sdruntime pass through unchanged.

SdexportError                 1   something failed
├── CheckpointError           2   the checkpoint is incomplete or not supported; carries the first 20 faults
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

from collections.abc import Iterable, Sequence
from typing import ClassVar

from sdruntime.errors import lines_of

_MOST = 20  # of the faults of a checkpoint: a config may have 50,000 unknown keys


def shortened(faults: Sequence[str]) -> tuple[str, ...]:
    """Return the first faults and, if there are more, a line with their number."""
    more = len(faults) - _MOST
    return tuple(faults) if more <= 0 else (*faults[:_MOST], f"… and {more:,} more")


class SdexportError(Exception):
    """Base of every error that sdexport raises on purpose."""

    exit_code: ClassVar[int] = 1


class CheckpointError(SdexportError):
    """A checkpoint cannot be exported. `faults` holds the first reasons, and a line with the number of the others."""

    exit_code = 2

    def __init__(self, where: object, faults: Iterable[str]) -> None:
        every = tuple(faults)
        self.faults = shortened(every)
        super().__init__(_listed(where, self.faults, len(every)))


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


def _listed(where: object, faults: tuple[str, ...], count: int = 0) -> str:
    count = count or len(faults)
    return f"{where}: {count:,} fault{'s' if count != 1 else ''}\n{lines_of(faults)}"
