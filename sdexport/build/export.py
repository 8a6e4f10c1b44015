"""Build a bundle from a checkpoint; the progress is yielded as events.

The ONNX models and their files are written to a staging folder, which replaces the bundle by one rename. An export that fails or
is interrupted leaves the existing bundle untouched. Engines are added to the finished bundle one by one. A second attempt
therefore resumes: it reuses cached traces and existing engines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from sdexport.build.events import EngineProgress, ExportOptions, ExportProgress, ExportResult
from sdexport.build.files import component_specs, read_embeddings, without_code_keys, write_embeddings, write_pipeline_files
from sdexport.build.provenance import digest_of_inputs, is_current, provenance_of, without_paths
from sdexport.checkpoint.card import read_card
from sdexport.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sdexport.checkpoint.defaults import merged
from sdexport.checkpoint.hub import Located, locate, locate_vae
from sdexport.checkpoint.overrides import Overrides
from sdexport.checkpoint.weights.loras import resolved
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
from sdruntime.bundle.changes.staging import check_place, staging
from sdruntime.bundle.records import read_json, record_from_json
from sdruntime.bundle.sampler_step import NAME as STEP
from sdruntime.engines.building import build_engines
from sdruntime.errors import BundleError, SettingError
from sdruntime.system.events import mapped
from sdruntime.system.process import peak_memory
from sdruntime.verification.verify import check_engine

REFERENCE = "reference"  # a folder that exists while half precision is audited


def build(model: str, out: Path, options: ExportOptions) -> Generator[ExportProgress | EngineProgress, None, ExportResult]:
    """Build the bundle `out` from a diffusers folder, a single file or a hub id; return the result.

    An existing bundle of the same inputs is kept, and missing engines are added. Raises SdexportError, and sdruntime's errors for
    the disk and the engines.
    """
    for request in options.engines:  # reports mistakes before the long work
        request.resolve_library(options.precision)
    exported = yield from export(model, out, options)
    written = yield from _engines(out, options)
    return dataclasses.replace(
        exported,
        up_to_date=exported.up_to_date and written == 0,
        written=exported.written + written,
        peak=max(exported.peak, peak_memory()),
    )


def model_name(located: Located) -> str:
    """Return the name in a hub id; for a folder, the name in its model card, or else the folder's name."""
    *owner, name = located.source.split("/")
    return name if owner else read_card(located.path).name or name


def export(model: str, out: Path, options: ExportOptions) -> Generator[ExportProgress, None, ExportResult]:
    """Export the bundle without its engines; return the result. Requests for engines that do not fit the model fail first.

    Raises the errors of `build`.
    """
    check_place(out)
    if options.image_encoder is not None and options.ip_adapter is None:
        raise SettingError("--image-encoder is that of an IP-Adapter: add --ip-adapter FILE")
    located = locate(model, precision=options.precision, allow_pickle=options.allow_pickle, revision=options.revision)
    locate_other = functools.partial(locate_vae, precision=options.precision, allow_pickle=options.allow_pickle)
    vae = locate_other(options.vae) if options.vae else None
    preview = locate_other(options.preview_vae, "--preview-vae") if options.preview_vae else None
    controlnets = {name: locate_other(place, "--controlnet") for name, place in options.controlnets.items()}
    config = Path(options.config) if options.config else None
    for other in (located, vae, preview, *controlnets.values()):
        if other is not None:
            _refuse_overlap(out, other.path)
    if config is not None:
        _refuse_overlap(out, config)
    checkpoint = read_checkpoint(
        located.path,
        name=model_name(located),
        precision=options.precision,
        allow_pickle=options.allow_pickle,
        overrides=Overrides(
            prediction_type=options.prediction_type,
            config=str(config or ""),
            vae="" if vae is None else str(vae.path),
            preview_vae="" if preview is None else str(preview.path),
            controlnets={name: str(other.path) for name, other in controlnets.items()},
            loras=resolved(options.loras),
            ip_adapter="" if options.ip_adapter is None else str(Path(options.ip_adapter).absolute()),
            image_encoder="" if options.image_encoder is None else str(Path(options.image_encoder).absolute()),
        ),
    )
    try:
        model_spec = dataclasses.replace(checkpoint.model, defaults=merged(checkpoint.model.defaults, options.defaults))
    except ValueError as error:
        raise SettingError(str(error)) from error
    checkpoint = dataclasses.replace(checkpoint, model=model_spec)
    table = components(checkpoint)
    for request in options.engines:
        request.resolve_model(checkpoint.model, [*(component.name for component in table), STEP])
    embeddings = read_embeddings(options.embeddings, table, allow_pickle=options.allow_pickle)
    named = dataclasses.replace(options, embeddings=tuple(embedding.name for embedding in embeddings))
    inputs = digest_of_inputs(checkpoint, table, options, embeddings)
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
        write_pipeline_files(checkpoint, table, folder)
        write_embeddings(embeddings, folder)
        step = write_step(folder)
        write_bundle(
            folder,
            model=checkpoint.model,
            precision=options.precision,
            components=component_specs(table, audits) | {STEP: step},
            provenance=provenance_of(located, checkpoint, without_paths(named, vae, preview, controlnets), inputs),
        )
        if options.verify:
            proof = yield from _verify(checkpoint, options, folder, len(table))
            peak = max(peak, proof.peak)
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ExportResult(
        folder=out, up_to_date=False, written=written, peak=peak + peak_memory(), checks=proof.checks, changes=checkpoint.changes
    )


def _refuse_overlap(out: Path, checkpoint: Path) -> None:
    """Raise BundleError if the bundle and the checkpoint are one folder, or one contains the other."""
    ours, theirs = out.resolve(), checkpoint.resolve()
    if _lies_in(ours, theirs) or _lies_in(theirs, ours):
        raise BundleError(out, [f"this place and the checkpoint ({checkpoint}) overlap: choose another place"])


def _lies_in(place: Path, folder: Path) -> bool:
    """Return whether `place` is `folder` or in it. Also compares inodes, as a bind mount gives a folder a second name."""
    return any(
        path == folder or (path.exists() and folder.exists() and path.samefile(folder)) for path in (place, *place.parents)
    )


def _reference(
    checkpoint: Checkpoint, table: Sequence[Component], options: ExportOptions, folder: Path
) -> Generator[ExportProgress, None, int]:
    """Export a float32 bundle as the reference for the audit, and probe it; return the peak memory in bytes."""
    folder.mkdir()
    peak = yield from _export(checkpoint, table, options, folder, None, full=True)
    write_pipeline_files(checkpoint, table, folder)
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
    """Export each component in its own process; return the peak memory of the largest in bytes."""
    peak = 0
    for index, component in enumerate(table):
        (folder / component.name).mkdir()
        job = ComponentJob(
            checkpoint=str(checkpoint.path),
            component=component.name,
            precision=options.precision,
            allow_pickle=options.allow_pickle,
            out=str(folder / component.name),
            full=full,
            overrides=checkpoint.overrides,
            first=index == 0,
            reference=str(reference or ""),
        )
        progress = functools.partial(ExportProgress, component=component.name, index=index, count=len(table))
        peak = max(peak, (yield from mapped(run_job(job), functools.partial(_staged, progress))))
        (folder / component.name / "config.json").write_text(json.dumps(without_code_keys(component.config), indent=2) + "\n")
        if reference is not None:
            shutil.rmtree(reference / component.name)  # limits the disk space that a large model needs
    return peak


def _staged(progress: Callable[..., ExportProgress], stage: Stage) -> ExportProgress:
    return progress(stage=stage)


def _audits(table: Sequence[Component], folder: Path) -> dict[str, Audit]:
    """Return the audits that the jobs wrote, and delete their files."""
    audits: dict[str, Audit] = {}
    for component in table:
        path = folder / component.name / AUDIT
        if path.exists():
            faults: list[str] = []
            audits[component.name] = record_from_json(Audit, read_json(path), where=AUDIT, faults=faults)
            assert not faults, faults
            path.unlink()
    return audits


def _verify(checkpoint: Checkpoint, options: ExportOptions, folder: Path, count: int) -> Generator[ExportProgress, None, Proof]:
    """Store reference outputs and check the ONNX models against them if ONNX Runtime is installed.

    The peak memory is the larger of both processes.

    Raises VerificationFailed.
    """
    progress = functools.partial(ExportProgress, component="golden", index=count, count=count)
    yield progress(stage=Stage(name="reference"))
    job = GoldenJob(
        checkpoint=str(checkpoint.path),
        bundle=str(folder),
        allow_pickle=options.allow_pickle,
        overrides=checkpoint.overrides,
    )
    calls: Counter[str] = Counter()

    def called(name: str) -> ExportProgress:
        calls[name] += 1
        return progress(stage=Stage(name=f"reference of {name}", done=calls[name]))

    peak = yield from mapped(run_golden(job), called)
    yield progress(stage=Stage(name="verify"))
    proof = yield from mapped(verified_apart(folder, what=checkpoint.model.name), lambda stage: progress(stage=stage))
    return dataclasses.replace(proof, peak=max(peak, proof.peak))


def _engines(folder: Path, options: ExportOptions) -> Generator[EngineProgress, None, int]:
    """Build the requested engines; return the number of bytes written."""
    written = 0
    for request in options.engines:
        with contextlib.closing(build_engines(folder, request, check=check_engine if options.verify else None)) as events:
            for event in events:
                written += event.size
                yield EngineProgress(event=event)
    return written
