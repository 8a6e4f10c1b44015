"""Locate MODEL: a folder on this machine, or a repository of the Hugging Face hub, of which only the needed files are downloaded.

HF_HOME, HF_TOKEN and HF_HUB_OFFLINE work as in huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdexport.checkpoint.weights.files import PARTS, choose_weight_file, shards_of
from sdexport.errors import CheckpointError, EnvironmentFault
from sdruntime.bundle.manifest import Precision

_SMALL = re.compile(
    r"model_index\.json|README\.md|scheduler/scheduler_config\.json|(text_encoder|text_encoder_2|unet|vae)/config\.json"
    r"|tokenizer(_2)?/(vocab\.json|merges\.txt|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json)"
)
_SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth")
_NOWHERE = "no such folder, and not a hub id (owner/name)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """A checkpoint's folder or file. `source` is its name or hub id, without paths of this machine; `revision` the commit."""

    path: Path
    source: str
    revision: str | None = None


def locate(model: str, *, precision: Precision, allow_pickle: bool, revision: str | None = None) -> Located:
    """Return the location of `model`, downloading missing files from the hub.

    `revision` is a branch, tag or commit; None means the newest. Raises CheckpointError if there is no such model, and
    EnvironmentFault if the hub cannot be reached and there is no local copy.
    """
    path = Path(model)
    if path.exists():
        return Located(path=path, source=_name_of(path.resolve()))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or path.suffix in _SINGLE_FILES:
        raise CheckpointError(model, [_NOWHERE])
    return _download(model, precision, allow_pickle, revision)


def locate_vae(model: str, option: str = "--vae", *, precision: Precision, allow_pickle: bool) -> Located:
    """Return the location of a VAE: that of a checkpoint, or one alone, whose repository has its config at the top.

    Raises as `locate` does; `option` names what gave the model.
    """
    try:
        return locate(model, precision=precision, allow_pickle=allow_pickle)
    except CheckpointError as error:
        raise CheckpointError(f"{option} {model}", error.faults) from error


def _name_of(folder: Path) -> str:
    """Return a folder's name; for a snapshot in the hub's cache, whose folder is named after its commit, the hub id."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def needed_files(names: Sequence[str], precision: Precision, *, allow_pickle: bool) -> list[str]:
    """Return the files of a repository that an export reads: configs, tokenizers, and one set of weights for each network.

    fp16 prefers the fp16 variant; the other precisions prefer the full weights.
    """
    needed = [name for name in names if _SMALL.fullmatch(name)]
    places = [(part, f"{part}/") for part in PARTS]
    if "config.json" in names and "model_index.json" not in names:  # a VAE alone
        places.append(("vae", ""))
    for part, folder in places:
        present = [name.removeprefix(folder) for name in names if name.startswith(folder)]
        file = choose_weight_file(part, present, precision, pickles=allow_pickle)
        if file is not None:
            needed += [f"{folder}{name}" for name in (file.name, *(shards_of(file, present) if file.index else ()))]
            needed += [] if folder else ["config.json"]  # _SMALL has those in folders
    return sorted(needed)


def _download(model: str, precision: Precision, allow_pickle: bool, revision: str | None) -> Located:
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        info = hub.HfApi().model_info(model, revision=revision)
    except errors.HFValidationError:  # "../x" or ".cache/x"
        raise CheckpointError(model, [_NOWHERE]) from None
    except errors.GatedRepoError:
        fault = f"you must accept its licence first, on https://huggingface.co/{model}; then set HF_TOKEN"
        raise CheckpointError(model, [fault]) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(model, [f"the model is on the hub, but has no revision {revision!r}"]) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(model, ["no such folder, and no such model on the hub (a private one needs HF_TOKEN)"]) from None
    except Exception as error:  # no network: every HTTP library raises its own errors
        return _cached(model, revision, error)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    wanted = needed_files(names, precision, allow_pickle=allow_pickle)
    folder = hub.snapshot_download(model, revision=info.sha, allow_patterns=wanted)
    return Located(path=Path(folder), source=model, revision=info.sha)


def _cached(model: str, revision: str | None, reason: Exception) -> Located:
    """Return the copy of an earlier download. Raises EnvironmentFault if there is none."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        folder = Path(hub.snapshot_download(model, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        first = re.sub(r"\[Errno -?\d+\] ", "", str(reason).strip().split("\n", 1)[0])
        raise EnvironmentFault(
            f"{model}: the hub cannot be reached ({type(reason).__name__}: {first}), and there is no local copy: "
            "download it on a machine with a network, and use its folder"
        ) from reason
    return Located(path=folder, source=model, revision=folder.name)
