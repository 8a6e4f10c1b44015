"""The options of a build and the events that it yields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdruntime.backends.base.building import Stage
from sdruntime.bundle.manifest import Precision
from sdruntime.engines.building import BuildEvent, BuildRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What a bundle is built with. `engines`: those that are built into it here, as `sdruntime build` takes them. `revision`:
    of the checkpoint, where it comes from the hub. `audit`: half precision is measured, and what it would harm stays float32.
    `verify`: make reference outputs, and check against them what this machine can run."""

    revision: str | None = None
    precision: Precision = "fp32"
    engines: tuple[BuildRequest, ...] = ()
    allow_pickle: bool = False
    audit: bool = True
    verify: bool = True

    @property
    def audited(self) -> bool:
        return self.audit and self.precision != "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportProgress:
    """A step of the export: component `index` of `count`, and the stage that it is in."""

    component: str
    index: int
    count: int
    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProgress:
    """A step of an engine's build."""

    event: BuildEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """The end of a build. `peak`: the most memory of this process and of one of a component, together; sizes in bytes. `checks`:
    how many outputs and images were checked. `changes`: a line for each setting of the checkpoint that diffusers'
    pipeline changes when it opens it, as it is changed in the bundle."""

    folder: Path
    up_to_date: bool
    written: int
    peak: int
    checks: int = 0
    changes: tuple[str, ...] = ()
