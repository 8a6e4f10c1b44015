"""The conductor: a checkpoint in, a bundle out, and what happens on the way as events.

Everything is written to a staging folder that takes the bundle's place by one rename; a build that fails or is interrupted leaves
the former bundle as it was. Traces are kept, so that the next try goes on where this one ended.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sdexport.cache import digest_of, trace_key, versions
from sdexport.checkpoint import Checkpoint, read_checkpoint
from sdexport.components import Component, components
from sdexport.job import DATA, MODEL, Job, Stage
from sdexport.process import peak_memory, run_apart
from sdexport.tokenizer import write_tokenizer
from sdruntime.bundle import Bundle, sha256, staging, write_bundle
from sdruntime.errors import BundleError
from sdruntime.manifest import ComponentSpec, Precision
from sdruntime.record import json_from_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a bundle is built with, beyond the checkpoint. `size` and `batch` are of the engines, as sdruntime's build takes them."""

    precision: Precision = "fp32"
    backends: tuple[str, ...] = ()
    size: str | None = None
    batch: str | None = None
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A step of the build: `index` of `count` components, and the stage that it is in."""

    component: str
    index: int
    count: int
    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """The end of a build. `peak`: the most memory that this process and one of a component had together; sizes in bytes."""

    folder: Path
    up_to_date: bool
    written: int
    peak: int


Event = Progress | Built


def build(source: str, out: Path, options: Options) -> Iterator[Event]:
    """Build the bundle `out` from a diffusers folder or a hub id. The last event is `Built`.

    Raises SdexportError, and sdruntime's errors for the disk and the engines.
    """
    checkpoint = read_checkpoint(Path(source), source=source, precision=options.precision, allow_pickle=options.allow_pickle)
    table = components(checkpoint)
    inputs = _inputs(checkpoint, table, options)
    if _is_current(out, inputs):
        yield Built(folder=out, up_to_date=True, written=0, peak=peak_memory())
        return
    peak = 0
    with staging(out) as folder:
        for index, component in enumerate(table):
            (folder / component.name).mkdir()
            job = Job(
                checkpoint=str(checkpoint.folder),
                component=component.name,
                precision=options.precision,
                allow_pickle=options.allow_pickle,
                out=str(folder / component.name),
            )
            for stage in run_apart(job):
                if isinstance(stage, Stage):
                    yield Progress(component=component.name, index=index, count=len(table), stage=stage)
                else:
                    peak = max(peak, stage)
            shutil.copyfile(checkpoint.folder / component.part / "config.json", folder / component.name / "config.json")
        _write_rest(checkpoint, table, folder)
        write_bundle(
            folder,
            model=checkpoint.model,
            precision=options.precision,
            components=_component_specs(table),
            provenance=_provenance(checkpoint, options, inputs),
        )
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    yield Built(folder=out, up_to_date=False, written=written, peak=peak + peak_memory())


def _inputs(checkpoint: Checkpoint, table: Sequence[Component], options: Options) -> str:
    """The hash of everything that the bundle follows from."""
    names = ("model_index.json", "scheduler/scheduler_config.json", *(f"{part}/config.json" for part in checkpoint.parts))
    files = [checkpoint.folder / name for name in names]
    files += [path for name in checkpoint.tokenizers for path in sorted((checkpoint.folder / name).iterdir()) if path.is_file()]
    files += [path for part in checkpoint.parts.values() for path in part.files]
    return digest_of(
        {
            "model": json_from_record(checkpoint.model),
            "options": json_from_record(options),
            "traces": [trace_key(component) for component in table],
            "files": {path.relative_to(checkpoint.folder).as_posix(): sha256(path) for path in files},
        }
    )


def _is_current(out: Path, inputs: str) -> bool:
    """Whether `out` is a whole bundle made of the same inputs, its bytes as they were written."""
    try:
        bundle = Bundle.open(out)
    except BundleError:
        return False
    return bundle.manifest.provenance.get("inputs") == inputs and not bundle.changed_files()


def _write_rest(checkpoint: Checkpoint, table: Sequence[Component], folder: Path) -> None:
    for name in checkpoint.tokenizers:
        write_tokenizer(checkpoint.folder / name, folder / name)
    (folder / "scheduler").mkdir()
    shutil.copyfile(checkpoint.folder / "scheduler/scheduler_config.json", folder / "scheduler/scheduler_config.json")
    (folder / "model_index.json").write_text(json.dumps(_model_index(checkpoint, table), indent=1) + "\n")


def _model_index(checkpoint: Checkpoint, table: Sequence[Component]) -> Mapping[str, Any]:
    """What diffusers' OnnxStableDiffusionPipeline reads; it knows SD1 and SD2."""
    known = checkpoint.model.family != "sdxl"
    index: dict[str, Any] = {
        "_class_name": "OnnxStableDiffusionPipeline" if known else checkpoint.index["_class_name"],
        "_diffusers_version": versions()["diffusers"],
        "scheduler": ["diffusers", checkpoint.scheduler["_class_name"]],
    }
    index |= {name: ["transformers", "CLIPTokenizer"] for name in checkpoint.tokenizers}
    index |= {component.name: ["diffusers", "OnnxRuntimeModel"] for component in table}
    if known:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return index


def _component_specs(table: Sequence[Component]) -> dict[str, ComponentSpec]:
    return {
        component.name: ComponentSpec(
            files=(f"{component.name}/{MODEL}", f"{component.name}/{DATA}"),
            config=f"{component.name}/config.json",
            inputs=component.inputs,
            outputs=component.outputs,
        )
        for component in table
    }


def _provenance(checkpoint: Checkpoint, options: Options, inputs: str) -> dict[str, Any]:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    made = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    provenance = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "created": made.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "options": json_from_record(options),
        "versions": versions(),
        "inputs": inputs,
    }
    return {key: value for key, value in provenance.items() if value is not None}
