"""Merge two or three checkpoints of one architecture into a diffusers folder, one weight in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdexport.build.events import ExportProgress
from sdexport.checkpoint.checkpoint import Checkpoint, read_checkpoint
from sdexport.checkpoint.hub import locate
from sdexport.checkpoint.weights.names import spellings
from sdexport.checkpoint.weights.safetensors import Array, StoredTensor
from sdexport.checkpoint.weights.writing import Described, write_safetensors
from sdexport.errors import CheckpointError, ExportError, shortened
from sdexport.merging.methods import COMPUTE, Method
from sdexport.merging.weights import Weights
from sdexport.precision.numbers import in_precision
from sdruntime.backends.base.building import Stage
from sdruntime.bundle.bundle import disk_full_as_error
from sdruntime.bundle.manifest import Precision
from sdruntime.errors import SettingError, lines_of
from sdruntime.system.durable import make_folders, sync_tree
from sdruntime.system.owner import owned_folder, sweep

RECORD = "merge.json"
_PRECISIONS: Mapping[str, Precision] = {"F64": "fp32", "F32": "fp32", "BF16": "bf16"}  # others, such as float8, become fp16
_TYPES: Mapping[Precision, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_IDLE = ("position_ids",)  # buffers that older files store, which are no weights
_WIDER = "conv_in.weight"  # of UNets that take more than the latents


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """How to merge. `precision`: None for the stored type of each weight of the first model."""

    method: Method = "weighted"
    weights: Weights = field(default_factory=Weights)
    precision: Precision | None = None
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeResult:
    """A merged checkpoint. `written`: bytes of weights. `unused`: parts in `MergeOptions.weights` that no weight belongs to."""

    folder: Path
    written: int
    unused: tuple[str, ...]


def merge(models: Sequence[str], out: Path, options: MergeOptions) -> Generator[ExportProgress, None, MergeResult]:
    """Merge models, each a folder, a single file or a hub id, into the new folder `out`; yield its progress.

    Configs, tokenizers and scheduler are the first model's. Raises SettingError for the number of models or an existing `out`,
    CheckpointError, and ExportError for models whose weights do not fit each other.
    """
    needed = 3 if options.method == "add-difference" else 2
    if len(models) != needed:
        raise SettingError(f"method {options.method}: expected {needed} models, got {len(models)}")
    if out.exists() or out.is_symlink():
        raise SettingError(f"{out}: exists: choose another place, or remove it")
    checkpoints = [_read(model, options) for model in models]
    _check_alike(checkpoints)
    networks = {part: _matched(part, checkpoints, options) for part in checkpoints[0].parts}
    make_folders(out.parent)
    prefix = f".{out.name}.merging-"
    sweep(out.parent, prefix)
    written, known = 0, set[str]()
    with owned_folder(out.parent, prefix) as folder, disk_full_as_error(out.parent):
        _write_documents(checkpoints[0], models, options, folder)
        for index, (part, tensors) in enumerate(networks.items()):
            total, done = sum(stored[0].size for stored in tensors.values()), 0
            for size in _write(part, tensors, options, folder):
                done += size
                yield ExportProgress(
                    component=part, index=index, count=len(networks), stage=Stage(name="merge", done=done, total=total)
                )
            written += done
            known |= {f"{part}.{name}" for name in tensors}
        sync_tree(folder)
        folder.rename(out)
    unused = [part for part in options.weights.parts if not any(f"{name}.".startswith(f"{part}.") for name in known)]
    return MergeResult(folder=out, written=written, unused=tuple(unused))


def _read(model: str, options: MergeOptions) -> Checkpoint:
    located = locate(model, precision="fp32", allow_pickle=options.allow_pickle)
    return read_checkpoint(located.path, name=located.source, allow_pickle=options.allow_pickle)


def _check_alike(checkpoints: Sequence[Checkpoint]) -> None:
    first, *others = checkpoints
    for other in others:
        for what in ("family", "prediction_type"):
            mine, theirs = getattr(first.model, what), getattr(other.model, what)
            if mine != theirs:
                fault = f"{what.replace('_', ' ')} {theirs}, but that of {first.path.name} is {mine}: they cannot be merged"
                raise CheckpointError(other.path, [fault])


def _matched(part: str, checkpoints: Sequence[Checkpoint], options: MergeOptions) -> dict[str, tuple[StoredTensor, ...]]:
    """Return the weights of a network by the first model's names, with those of the other models. Raises ExportError."""
    first, *others = (checkpoint.parts[part].weights for checkpoint in checkpoints)
    matched, faults = dict[str, tuple[StoredTensor, ...]](), []
    for name, tensor in first.items():
        if name.endswith(_IDLE):
            continue
        theirs = [next((weights[other] for other in spellings(name) if other in weights), None) for weights in others]
        for checkpoint, other in zip(checkpoints[1:], theirs, strict=True):
            if other is None:
                faults.append(f"{name} is missing in {checkpoint.path.name}")
            elif not other.readable or not tensor.readable:
                faults.append(f"{name} is stored as {other.dtype if tensor.readable else tensor.dtype}: not supported")
            elif not _fits(name, tensor.shape, other.shape, options.method):
                faults.append(f"{name} is {list(tensor.shape)}, but {list(other.shape)} in {checkpoint.path.name}")
        matched[name] = (tensor, *(other for other in theirs if other is not None))
    if faults:
        raise ExportError(f"{part}: the models cannot be merged\n{lines_of(shortened(faults))}")
    return matched


def _fits(name: str, mine: tuple[int, ...], theirs: tuple[int, ...], method: Method) -> bool:
    if mine == theirs:
        return True
    wider = method == "add-difference" and name == _WIDER and len(mine) == len(theirs) == 4
    return wider and mine[1] > theirs[1] and (mine[0], *mine[2:]) == (theirs[0], *theirs[2:])


def _write(
    part: str, tensors: Mapping[str, tuple[StoredTensor, ...]], options: MergeOptions, folder: Path
) -> Generator[int, None, None]:
    """Write the merged weights of a network; yield the bytes read of the first model for each."""
    precisions = {name: options.precision or _PRECISIONS.get(stored[0].dtype, "fp16") for name, stored in tensors.items()}
    described: dict[str, Described] = {name: (_TYPES[precisions[name]], stored[0].shape) for name, stored in tensors.items()}

    def values(name: str) -> Array:
        numbers, fault = in_precision(_merged(part, name, tensors[name], options), precisions[name])
        if fault:
            raise ExportError(f"{part}: {name}: {fault}")
        return numbers

    file = "model.safetensors" if part.startswith("text_encoder") else "diffusion_pytorch_model.safetensors"
    written = write_safetensors(folder / part / file, described, values, {"format": "pt"})
    for stored, _ in zip(tensors.values(), written, strict=True):
        yield stored[0].size


def _merged(part: str, name: str, stored: Sequence[StoredTensor], options: MergeOptions) -> Array:
    weight = options.weights.of(part, name)
    first, *others = (tensor.read().astype(np.float32) for tensor in (stored if weight else stored[:1]))
    return COMPUTE[options.method](weight, first, *others) if weight else first


def _write_documents(checkpoint: Checkpoint, models: Sequence[str], options: MergeOptions, folder: Path) -> None:
    source = checkpoint.source
    written = {*checkpoint.parts, *checkpoint.tokenizers}
    index = {
        name: [None, None] if isinstance(value, list) and name not in written and "scheduler" not in name else value
        for name, value in checkpoint.index.items()
    }
    for name, tokenizer in checkpoint.tokenizers.items():
        tokenizer.write(folder / name, length=checkpoint.text_length)
    documents = {"model_index.json": index}
    schedulers = [name for name in index if "scheduler" in name]  # an upscaler has two
    documents |= {f"{name}/scheduler_config.json": source.document(f"{name}/scheduler_config.json") for name in schedulers}
    documents |= {f"{part}/config.json": source.document(f"{part}/config.json") for part in checkpoint.parts}
    documents[RECORD] = {
        "method": options.method,
        "models": [Path(model).name for model in models],
        "weights": {"": options.weights.default, **options.weights.parts},
    }
    for path, document in documents.items():
        place = folder / path
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
