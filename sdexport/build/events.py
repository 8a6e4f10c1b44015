"""The options of a build and the events that it yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdruntime.backends.base.building import Stage
from sdruntime.bundle.manifest import Precision
from sdruntime.bundle.model import NO_DEFAULTS, Defaults, PredictionType
from sdruntime.engines.building import BuildEvent, BuildRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The options of a build.

    `revision` is the hub's, for a hub id. `prediction_type`, `config` and `vae` replace parts of the checkpoint, as
    sdexport.checkpoint.overrides.Overrides has them, and `preview_vae` adds one; both VAEs may be hub ids. `controlnets` adds
    ControlNets, folders or hub ids by component; `ip_adapter` the IP-Adapter of a file, with the image encoder in the folder
    `image_encoder`, None for the one beside the file. `loras` are merged, each a text that `lora_from` takes. `embeddings`
    become part of the bundle: FILE or NAME=FILE each. `defaults` replace those that follow from the checkpoint. `engines` are
    built into the bundle, with the options of `sdruntime build`. `audit` measures half precision and keeps in float32 what it
    would harm. `verify` stores reference outputs and checks what this machine can run against them.
    """

    revision: str | None = None
    precision: Precision = "fp32"
    engines: tuple[BuildRequest, ...] = ()
    allow_pickle: bool = False
    prediction_type: PredictionType | None = None
    config: str | None = None
    vae: str | None = None
    loras: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    defaults: Defaults = NO_DEFAULTS
    preview_vae: str | None = None
    controlnets: Mapping[str, str] = field(default_factory=dict)
    ip_adapter: str | None = None
    image_encoder: str | None = None
    audit: bool = True
    verify: bool = True

    @property
    def audited(self) -> bool:
        return self.audit and self.precision != "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportProgress:
    """A step of the export: the current component, `index` of `count`, and its stage."""

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
    """The end of a build; sizes are in bytes.

    `peak` is the peak memory of this process plus that of the largest component's process. `checks` counts the outputs and images
    that were checked. `changes` has a line for each setting that diffusers' pipeline changes when it opens the checkpoint; the
    bundle has the changed value.
    """

    folder: Path
    up_to_date: bool
    written: int
    peak: int
    checks: int = 0
    changes: tuple[str, ...] = ()
