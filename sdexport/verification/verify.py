"""Check a bundle: in a separate process after a build, and against its checkpoint in PyTorch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from sdexport.checkpoint.checkpoint import Checkpoint
from sdexport.checkpoint.hub import locate, locate_vae
from sdexport.checkpoint.overrides import Overrides
from sdexport.checkpoint.weights.loras import resolved
from sdexport.errors import CheckpointError, ExportError, ProcessKilled
from sdexport.verification.golden import Reference, checkpoint_hash, opened
from sdruntime.arrays import Array
from sdruntime.backends.base.building import Stage
from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.model import PredictionType
from sdruntime.errors import LibraryMissing, VerificationFailed
from sdruntime.system.events import mapped
from sdruntime.system.process import run_apart
from sdruntime.verification.golden import Case, read_golden
from sdruntime.verification.report import Check, ImageCheck, Report
from sdruntime.verification.verify import ITS_ONNX, verify

_ADVICE = "free some, build on a larger machine, or build with --no-verify"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The number of outputs and images that were checked, and the peak memory in bytes."""

    checks: int
    peak: int


def verified_apart(folder: Path, *, what: str) -> Generator[Stage, None, Proof]:
    """Check the bundle's ONNX against its reference outputs in a separate process, if ONNX Runtime is installed.

    Yields its progress. Raises VerificationFailed.
    """
    events = run_apart(
        "sdruntime.verification.verify",
        {"bundle": str(folder)},
        what="verification",
        failed=ExportError,
        killed=ProcessKilled,
        advice=_ADVICE,
    )
    try:
        outcome = yield from mapped(events, lambda event: Stage(name="verify", **event))
    except LibraryMissing:
        return Proof(checks=0, peak=0)
    if faults := outcome.result["faults"]:
        raise VerificationFailed(what, faults)
    return Proof(checks=outcome.result["ran"], peak=outcome.peak)


def reference_checkpoint(
    bundle: Bundle,
    model: str,
    *,
    allow_pickle: bool = False,
    prediction_type: PredictionType | None = None,
    config: str | None = None,
    vae: str | None = None,
    preview_vae: str | None = None,
    loras: Sequence[str] = (),
    controlnets: Mapping[str, str] = MappingProxyType({}),
    ip_adapter: str | None = None,
    image_encoder: str | None = None,
) -> Checkpoint:
    """Return the checkpoint `model` if the bundle was built from it, with the same overrides: those of `Overrides`.

    Raises CheckpointError with both hashes if it is another one.
    """
    golden, _ = read_golden(bundle)
    precision = bundle.manifest.precision
    located = locate(model, precision=precision, allow_pickle=allow_pickle)
    locate_other = functools.partial(locate_vae, precision=precision, allow_pickle=allow_pickle)
    overrides = Overrides(
        prediction_type=prediction_type,
        config=config or "",
        vae=str(locate_other(vae).path) if vae else "",
        preview_vae=str(locate_other(preview_vae, "--preview-vae").path) if preview_vae else "",
        loras=resolved(loras),
        controlnets={name: str(locate_other(place, "--controlnet").path) for name, place in controlnets.items()},
        ip_adapter=ip_adapter or "",
        image_encoder=image_encoder or "",
    )
    checkpoint = opened(located.path, precision, allow_pickle=allow_pickle, overrides=overrides)
    digest = checkpoint_hash(checkpoint)
    if digest != golden.checkpoint:
        source = bundle.manifest.provenance.get("source", "unknown")
        hashes = f"its weights are {digest[:16]}…, the bundle's {golden.checkpoint[:16]}… ({source})"
        raise CheckpointError(model, [f"not the checkpoint of this bundle: {hashes}"])
    return checkpoint


def first_nodes(
    bundle: Bundle, checkpoint: Checkpoint, report: Report, *, allow_pickle: bool = False
) -> Generator[Stage, None, Report]:
    """Return the report with a note on the first node that leaves the tolerance, for each ONNX that fails.

    A TensorRT engine that fails gets a note if its ONNX passes.
    """
    from sdexport.verification.bisect import bisect
    from sdexport.verification.walk import has_layers

    failed: dict[tuple[str, str], str] = {}  # (component, engine) -> its first failing case
    for check in report.checks:
        if check.status == "fail" and check.case:
            failed.setdefault((check.component, check.engine), check.case)
    layered = {engine.name: engine for engine in bundle.manifest.engines if has_layers(engine)}
    notes = []
    for (component, name), case in failed.items():
        if name == ITS_ONNX or (name in layered and (component, ITS_ONNX) not in failed):
            engine = layered.get(name)
            finding = yield from bisect(bundle, checkpoint, component, case, engine=engine, allow_pickle=allow_pickle)
            notes.append(finding.line())
    if not report.passed and not notes:
        notes = ["no component's ONNX fails: the fault is in an engine whose layers cannot be compared, or in the pipeline"]
    return dataclasses.replace(report, notes=(*report.notes, *notes))


def verify_against(bundle: Bundle, checkpoint: Checkpoint) -> Iterator[Check | ImageCheck]:
    """Check a bundle as `sdruntime.verification.verify.verify` does, but compare whole outputs of PyTorch, not stored samples."""
    reference = Reference(checkpoint, bundle.manifest)
    cached: dict[str, Mapping[str, Array]] = {}
    component = ""

    def outputs(case: Case) -> Mapping[str, Array]:
        nonlocal component
        if case.component != component:  # the outputs of one component in memory at a time
            cached.clear()
            component = case.component
        if case.name not in cached:
            cached[case.name] = reference.outputs(case)
        return cached[case.name]

    yield from verify(bundle, against=outputs)
