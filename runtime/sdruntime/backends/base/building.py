"""The request, progress and result of an engine build, the same for all backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdruntime.bundle.manifest import Precision, Profile
from sdruntime.errors import DeviceMissing, UnknownName


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """A request to build an engine: a component, a target, and profiles as in `EngineSpec`."""

    component: str
    backend: str
    target: str
    profiles: tuple[Profile, ...]
    stem: str  # prefix of the file names
    options: Mapping[str, str] = field(default_factory=dict)  # the backend's build options, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The progress of a build: `done` of `total` steps of the phase that the library calls `name`. A total of 0 means unknown."""

    name: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The result of a build.

    `files`: the written files, starting with the one to open. `memory`: bytes of activations on the device, if known. `peak`:
    peak memory of the builder process, in bytes.
    """

    files: tuple[Path, ...]
    version: str
    precision: Precision
    memory: int | None = None
    platform: str = ""
    seconds: float = 0.0
    peak: int = 0
    notes: tuple[str, ...] = ()  # human-readable: where the engine falls short of the request


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """An engine library on this machine: its version and the targets it can build for, or why it is not available."""

    version: str | None = None
    targets: tuple[str, ...] = ()
    missing: str = ""  # human-readable: what is missing, and the command that installs it


# name: (parser of the value, description of valid values)
BackendOptions = Mapping[str, tuple[Callable[[str], Any], str]]


def unknown_option(library: str, option: str, known: BackendOptions) -> UnknownName:
    """Return the error for an unknown build option, which lists the known ones."""
    return UnknownName(f"option of {library}", option, known, forms={name: form for name, (_, form) in known.items()})


def check_names(
    library: str, target: str | None, targets: Sequence[str], options: Mapping[str, str], *, known: BackendOptions
) -> str:
    """Return `target`, or the first of `targets` if it is None.

    Raises UnknownName for an unknown option, DeviceMissing for a target that is not in `targets`.
    """
    for option in options:
        if option not in known:
            raise unknown_option(library, option, known)
    if target is not None and target not in targets:
        raise DeviceMissing(f"target {target!r}: {library} has {', '.join(targets)} on this machine")
    return target or targets[0]
