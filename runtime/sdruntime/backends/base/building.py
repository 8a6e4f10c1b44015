"""What a build of an engine is given, tells on its way and returns, whatever the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdruntime.bundle.manifest import Precision, Profile
from sdruntime.errors import DeviceMissing, UnknownName


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What a backend is asked to build: one component, for a target, in some profiles (those of `EngineSpec`)."""

    component: str
    backend: str
    target: str
    profiles: tuple[Profile, ...]
    stem: str  # the names of the files begin with it
    options: Mapping[str, str] = field(default_factory=dict)  # settings of the backend, by its own names


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Where a build is: `done` of `total` steps of what the library calls `name`; a total of 0 is not known."""

    name: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The files that a backend wrote, the one to open first in front, the library's version, and what the build took.

    `memory`: bytes of activations on the device, where the builder can tell. `peak`: bytes of the builder's own process.
    """

    files: tuple[Path, ...]
    version: str
    precision: Precision
    memory: int | None = None
    platform: str = ""
    seconds: float = 0.0
    peak: int = 0
    notes: tuple[str, ...] = ()  # for a person: where the engine is short of what was requested


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """What this machine has of an engine library: its version and the targets that it builds for here, or why it has nothing."""

    version: str | None = None
    targets: tuple[str, ...] = ()
    missing: str = ""  # for a person: what is missing, and the line that installs it


# name: (how its text is read, what is expected)
BackendOptions = Mapping[str, tuple[Callable[[str], Any], str]]


def unknown_option(library: str, option: str, known: BackendOptions) -> UnknownName:
    """The error for an option of a backend that it does not have: it lists those that it has."""
    return UnknownName(f"option of {library}", option, known, forms={name: form for name, (_, form) in known.items()})


def check_names(
    library: str, target: str | None, targets: Sequence[str], options: Mapping[str, str], *, known: BackendOptions
) -> str:
    """`target`, the first of `targets` where it is None. Raises DeviceMissing for another, UnknownName for an unknown option."""
    for option in options:
        if option not in known:
            raise unknown_option(library, option, known)
    if target is not None and target not in targets:
        raise DeviceMissing(f"target {target!r}: {library} has {', '.join(targets)} on this machine")
    return target or targets[0]
