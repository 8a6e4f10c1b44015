"""The conductor: a checkpoint in, a bundle out, and what happens on the way as events.

The ONNX and what belongs to it are written to a staging folder that takes the bundle's place by one rename; an export that fails
or is interrupted leaves the existing bundle untouched. Engines are added to the whole bundle, one by one. So the next try goes on
where this one ended: traces are kept, and engines that are there stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from sdexport.build.events import EngineProgress, ExportOptions, ExportProgress, ExportResult
from sdexport.build.files import component_specs, described, write_rest
from sdexport.build.provenance import digest_of_inputs, is_current, provenance_of
from sdexport.checkpoint.card import read_card
from sdexport.checkpoint.folder import Checkpoint, read_checkpoint
from sdexport.checkpoint.hub import Located, locate
from sdexport.families.components import Component, components
from sdexport.precision.probe import check_environment
from sdexport.trace.component import AUDIT, PROBE, ComponentJob
from sdexport.trace.process import run_job
from sdexport.trace.sampler_step import write_step
from sdexport.verification.golden import GoldenJob, run_golden
from sdexport.verification.verify import Proof, verified_apart
from sdruntime.backends.base.building import Stage
from sdruntime.bundle.audit import Audit
from sdruntime.bundle.bundle import write_bundle
from sdruntime.bundle.records import read_json, record_from_json
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.bundle.staging import check_place, staging
from sdruntime.engines.building import build_engines
from sdruntime.errors import BundleError
from sdruntime.system.events import finish, mapped
from sdruntime.system.process import peak_memory
from sdruntime.verification.verify import check_engine

REFERENCE = "reference"  # a folder that is there while half precision is audited


def build(model: str, out: Path, options: ExportOptions) -> Generator[ExportProgress | EngineProgress, None, ExportResult]:
    """Build the bundle `out` from a diffusers folder or a hub id. The last event is `ExportResult`.

    A bundle that was made of the same inputs stays, and gets the engines that it lacks. Raises SdexportError, and sdruntime's
    errors for the disk and the engines.
    """
    for asked in options.engines:  # mistakes in these are reported before the long work
        asked.resolve_library(options.precision)
    exported = yield from export(model, out, options)
    written = yield from _engines(out, options)
    return dataclasses.replace(
        exported,
        up_to_date=exported.up_to_date and written == 0,
        written=exported.written + written,
        peak=max(exported.peak, peak_memory()),
    )


def model_name(located: Located) -> str:
    """The name in a hub id; of a folder, what its card calls the model, or else the folder's name."""
    *owner, name = located.source.split("/")
    return name if owner else read_card(located.folder).name or name


def export(model: str, out: Path, options: ExportOptions) -> Generator[ExportProgress, None, ExportResult]:
    """The bundle without its engines; the last event is returned. Engines that the model cannot have are refused before the work.

    Raises as `build` does.
    """
    check_place(out)
    located = locate(model, precision=options.precision, allow_pickle=options.allow_pickle, revision=options.revision)
    _refuse_overlap(out, located.folder)
    checkpoint = read_checkpoint(
        located.folder, name=model_name(located), precision=options.precision, allow_pickle=options.allow_pickle
    )
    table = components(checkpoint)
    for asked in options.engines:
        asked.resolve_model(checkpoint.model, [*(component.name for component in table), STEP])
    inputs = digest_of_inputs(checkpoint, table, options)
    if is_current(out, inputs, verified=options.verify):
        return ExportResult(folder=out, up_to_date=True, written=0, peak=peak_memory(), changes=checkpoint.changes)
    if options.audited:
        check_environment()
    with staging(out) as folder:
        reference, peak, proof = folder / REFERENCE, 0, Proof(checks=0, peak=0)
        if options.audited:
            peak = yield from _reference(checkpoint, table, options, reference)
        peak = max(peak, (yield from _export(checkpoint, table, options, folder, reference if options.audited else None)))
        shutil.rmtree(reference, ignore_errors=True)
        audits = _audits(table, folder)
        write_rest(checkpoint, table, folder)
        step = write_step(folder)
        write_bundle(
            folder,
            model=checkpoint.model,
            precision=options.precision,
            components=component_specs(table, audits) | {STEP: step},
            provenance=provenance_of(located, checkpoint, options, inputs),
        )
        if options.verify:
            proof = yield from _proved(checkpoint, options, folder, len(table))
            peak = max(peak, proof.peak)
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ExportResult(
        folder=out, up_to_date=False, written=written, peak=peak + peak_memory(), checks=proof.checks, changes=checkpoint.changes
    )


def _refuse_overlap(out: Path, checkpoint: Path) -> None:
    """Raise BundleError if the bundle would be the checkpoint, or one would lie in the other."""
    ours, theirs = out.resolve(), checkpoint.resolve()
    if _lies_in(ours, theirs) or _lies_in(theirs, ours):
        raise BundleError(out, [f"this place and the checkpoint ({checkpoint}) overlap: choose another place"])


def _lies_in(place: Path, folder: Path) -> bool:
    """Whether a place is `folder` or in it, whatever the names: a bind mount gives a folder a second one."""
    return any(
        each == folder or (each.exists() and folder.exists() and each.samefile(folder)) for each in (place, *place.parents)
    )


def _reference(
    checkpoint: Checkpoint, table: Sequence[Component], options: ExportOptions, folder: Path
) -> Generator[ExportProgress, None, int]:
    """The same in float32, probed: what half precision is measured by. Returns the peak memory."""
    folder.mkdir()
    peak = yield from _export(checkpoint, table, options, folder, None, full=True)
    write_rest(checkpoint, table, folder)
    specs = component_specs(table, {})
    write_bundle(folder, model=checkpoint.model, precision="fp32", components=specs, provenance={})
    job = ComponentJob(checkpoint="", component=PROBE, precision="fp32", allow_pickle=False, out=str(folder))
    progress = functools.partial(ExportProgress, component=PROBE, index=0, count=1)
    return max(peak, (yield from mapped(run_job(job), functools.partial(_staged, progress))))


def _export(
    checkpoint: Checkpoint,
    table: Sequence[Component],
    options: ExportOptions,
    folder: Path,
    reference: Path | None,
    *,
    full: bool = False,
) -> Generator[ExportProgress, None, int]:
    """Each component in its own process; returns the peak memory of the largest."""
    peak = 0
    for index, component in enumerate(table):
        (folder / component.name).mkdir()
        job = ComponentJob(
            checkpoint=str(checkpoint.folder),
            component=component.name,
            precision=options.precision,
            allow_pickle=options.allow_pickle,
            out=str(folder / component.name),
            full=full,
            first=index == 0,
            reference=str(reference or ""),
        )
        progress = functools.partial(ExportProgress, component=component.name, index=index, count=len(table))
        peak = max(peak, (yield from mapped(run_job(job), functools.partial(_staged, progress))))
        (folder / component.name / "config.json").write_text(json.dumps(described(component.config), indent=2) + "\n")
        if reference is not None:
            shutil.rmtree(reference / component.name)  # half of a large model's disk, before the next one is written
    return peak


def _staged(progress: Callable[..., ExportProgress], stage: Stage) -> ExportProgress:
    return progress(stage=stage)


def _audits(table: Sequence[Component], folder: Path) -> dict[str, Audit]:
    """What the jobs found; their notes go."""
    found: dict[str, Audit] = {}
    for component in table:
        path = folder / component.name / AUDIT
        if path.exists():
            faults: list[str] = []
            found[component.name] = record_from_json(Audit, read_json(path), where=AUDIT, faults=faults)
            assert not faults, faults
            path.unlink()
    return found


def _proved(checkpoint: Checkpoint, options: ExportOptions, folder: Path, count: int) -> Generator[ExportProgress, None, Proof]:
    """Golden numbers, and the ONNX held to them where ONNX Runtime is here; the peak is of both processes.

    Raises VerificationFailed.
    """
    progress = functools.partial(ExportProgress, component="golden", index=count, count=count)
    yield progress(stage=Stage(name="reference"))
    job = GoldenJob(checkpoint=str(checkpoint.folder), bundle=str(folder), allow_pickle=options.allow_pickle)
    peak = finish(run_golden(job))
    yield progress(stage=Stage(name="verify"))
    proof = verified_apart(folder, what=checkpoint.model.name)
    return dataclasses.replace(proof, peak=max(peak, proof.peak))


def _engines(folder: Path, options: ExportOptions) -> Generator[EngineProgress, None, int]:
    """The engines that were requested; returns the bytes written."""
    written = 0
    for asked in options.engines:
        with contextlib.closing(build_engines(folder, asked, check=check_engine if options.verify else None)) as events:
            for event in events:
                written += event.size
                yield EngineProgress(event=event)
    return written
