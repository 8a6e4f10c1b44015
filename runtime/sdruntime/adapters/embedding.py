"""Read an embedding: vectors that stand for a word in prompts, the result of textual inversion (arXiv 2208.01618).

Formats, all safetensors: one tensor named like its token (diffusers), `emb_params` (AUTOMATIC1111's web UI), and `clip_l` with
`clip_g` for the two text encoders of SDXL. A tensor is [D] or [n, D], D the width of the text encoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sdruntime.adapters.file import AdapterFile
from sdruntime.arrays import Array
from sdruntime.bundle.roles import role
from sdruntime.errors import SettingError, shown

MOST_VECTORS = 256  # of one embedding
OF_FILE = "emb_params"  # its token is the file's name, or
NAME = "sdexport.embedding"  # in the metadata
_FIRST, _SECOND = "clip_l", "clip_g"
_NAME = re.compile(r"\S{1,190}")
_NAMED = re.compile(r"([^\s=/\\]+)=(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """An embedding. `vectors`: by text encoder, float32 [n, D], n the same for all. `sha256`: of the file."""

    name: str
    vectors: Mapping[str, Array]
    sha256: str

    @property
    def tensors(self) -> dict[str, Array]:
        """The tensors of a file of this embedding, which has its name in the metadata as NAME."""
        if len(self.vectors) == 1 and not any(role(encoder).takes_second_texts for encoder in self.vectors):
            return {OF_FILE: next(iter(self.vectors.values()))}
        return {_key(encoder): vectors for encoder, vectors in self.vectors.items()}

    @property
    def count(self) -> int:
        return len(next(iter(self.vectors.values())))


class TensorFile(Protocol):
    """A file of tensors, as AdapterFile is one."""

    @property
    def path(self) -> Path: ...
    @property
    def name(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, object]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def sha256(self) -> str: ...
    def read(self, keys: Iterable[str]) -> dict[str, Array]: ...


def open_embedding(path: Path | str) -> TensorFile:
    """Open the safetensors file of an embedding. Raises SettingError."""
    return AdapterFile.open(path, what="embedding")


def read_embedding(
    source: Path | str, widths: Mapping[str, int], opened: Callable[[Path | str], TensorFile] = open_embedding
) -> Embedding:
    """Return the embedding of a file, or of NAME=FILE. `widths`: the width of each text encoder of the model.

    `opened`: opens the file. Raises SettingError for another kind of file and for an embedding of another model.
    """
    named = None if Path(source).is_file() else _NAMED.fullmatch(str(source))
    file = opened(named[2] if named else source)
    keys, token = _keys(file, widths)
    vectors = {}
    for encoder, values in zip(keys, file.read(keys.values()).values(), strict=True):
        rows = values.reshape(1, -1) if values.ndim == 1 else values
        if rows.ndim != 2 or not 1 <= len(rows) <= MOST_VECTORS:
            raise SettingError(
                f"embedding {file.path}: {keys[encoder]:.80} is {list(values.shape)}, not 1 to {MOST_VECTORS} vectors [n, width]"
            )
        if rows.shape[1] != widths[encoder]:
            raise SettingError(
                f"embedding {file.path}: its vectors have {rows.shape[1]} numbers, but the model's {encoder} takes "
                f"{widths[encoder]}: it was made for {_MADE_FOR.get(rows.shape[1], 'another model')}"
            )
        vectors[encoder] = np.ascontiguousarray(rows, np.float32)
    if len({len(rows) for rows in vectors.values()}) > 1:
        counts = ", ".join(f"{keys[encoder]} has {len(rows)}" for encoder, rows in vectors.items())
        raise SettingError(f"embedding {file.path}: {counts} vectors: expected as many for each text encoder")
    name = named[1] if named else token
    if not _NAME.fullmatch(name):
        raise SettingError(f"embedding {file.path}: its name is {shown(name)}: give one without spaces, as NAME=FILE")
    return Embedding(name=name, vectors=vectors, sha256=file.sha256)


_MADE_FOR = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}


def _keys(file: TensorFile, widths: Mapping[str, int]) -> tuple[dict[str, str], str]:
    """Return the tensor for each text encoder, and the name of the embedding."""
    names = set(file.tensors)
    of_xl = names & {_FIRST, _SECOND}
    xl = any(role(encoder).takes_second_texts for encoder in widths)
    if xl != bool(of_xl):
        has = f"{_FIRST} and {_SECOND}, for SDXL" if of_xl else f"vectors for one text encoder ({shown(min(names))})"
        needed = f"SDXL and needs {_FIRST} and {_SECOND}" if xl else "not SDXL"
        raise SettingError(f"embedding {file.path}: it has {has}, but the model is {needed}: use an embedding made for it")
    own = file.metadata.get(NAME, file.name)
    if xl:
        keys = {encoder: _key(encoder) for encoder in widths}
        if missing := sorted(set(keys.values()) - names):
            raise SettingError(f"embedding {file.path}: {' and '.join(missing)} is missing")
        return keys, own
    if len(names) > 1 and OF_FILE not in names:
        some = ", ".join(sorted(names)[:3])
        raise SettingError(
            f"embedding {file.path}: {len(names)} tensors ({some:.120}, …): expected one, named like its token, or {OF_FILE}: "
            "a LoRA is given as --lora"
        )
    key = OF_FILE if OF_FILE in names else next(iter(names))
    return dict.fromkeys(widths, key), own if key == OF_FILE else key


def _key(encoder: str) -> str:
    """Return the tensor for a text encoder of SDXL."""
    return _SECOND if role(encoder).takes_second_texts else _FIRST
