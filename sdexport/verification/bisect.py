"""Find the first node of a failing component that leaves the tolerance, by comparison with its float32 graph."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Generator
from pathlib import Path

from sdexport.checkpoint.checkpoint import Checkpoint
from sdexport.errors import ExportError, ProcessKilled
from sdexport.trace.component import MODEL, ComponentJob
from sdexport.trace.process import run_job
from sdexport.verification.walk import Finding, WalkJob
from sdruntime.backends.base.building import Stage
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.manifest import EngineSpec
from sdruntime.system.events import finish, mapped
from sdruntime.system.process import run_apart

WALK = "sdexport.verification.walk"


def bisect(
    bundle: Bundle,
    checkpoint: Checkpoint,
    component: str,
    case: str,
    *,
    engine: EngineSpec | None = None,
    allow_pickle: bool = False,
) -> Generator[Stage, None, Finding]:
    """Return the first node of a component's ONNX, or of a TensorRT `engine`, that leaves the tolerance; yield the progress.

    Raises LibraryMissing if ONNX Runtime is not installed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        yield Stage(name=f"{component}: trace in float32")
        job = ComponentJob(
            checkpoint=str(checkpoint.path),
            component=component,
            precision="fp32",
            allow_pickle=allow_pickle,
            overrides=checkpoint.overrides,
            out=scratch,
        )
        finish(run_job(job))
        walk = WalkJob(
            bundle=str(bundle.folder),
            reference=str(Path(scratch) / MODEL),
            component=component,
            case=case,
            engine=engine.name if engine else "",
            backend=engine.backend if engine else "",
        )
        stages = run_apart(
            WALK,
            dataclasses.asdict(walk),
            what=f"{component}: --bisect",
            failed=ExportError,
            killed=ProcessKilled,
            advice="free some, or verify on a larger machine",
        )
        outcome = yield from mapped(stages, lambda stage: Stage(**stage))
    return Finding(**outcome.result)
