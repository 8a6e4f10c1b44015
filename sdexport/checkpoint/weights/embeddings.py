"""Read the files of embeddings (textual inversion), also those that torch.save wrote. Nothing in a pickle is run.

They are AUTOMATIC1111's `.pt`, whose vectors are `string_to_param["*"]`, and diffusers' `.bin`, a tensor by its token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdexport.checkpoint.weights.safetensors import Array, StoredTensor
from sdexport.checkpoint.weights.torch_file.file import is_torch_file, read_with
from sdexport.checkpoint.weights.torch_file.tensors import Place, stored_tensors
from sdruntime.adapters.embedding import NAME, OF_FILE, TensorFile, open_embedding
from sdruntime.bundle.bundle import sha256
from sdruntime.errors import SettingError, plain

_VECTORS, _TOKEN = "string_to_param", "name"  # of AUTOMATIC1111
REFUSED = (
    "a pickle, a format that can hold code: use one with safetensors, or read it with --allow-pickle (only its vectors are read, "
    "and nothing in it is run)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PickledEmbedding:
    """The tensors of a file that torch.save wrote, as sdruntime.adapters.embedding.TensorFile has them."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    sha256: str

    @property
    def name(self) -> str:
        return self.path.stem

    def read(self, keys: Iterable[str]) -> dict[str, Array]:
        read = {key: self.tensors[key].read().astype(np.float32) for key in keys}
        for key, values in read.items():
            if not np.isfinite(values).all():
                raise SettingError(f"embedding {self.path}: {key:.120}: NaN or infinity: the file is damaged")
        return read


def open_file(path: Path | str, *, allow_pickle: bool) -> TensorFile:
    """Open the file of an embedding. Raises SettingError for a pickle that is not allowed, and for a damaged file."""
    path = Path(path)
    try:
        if not is_torch_file(path):
            return open_embedding(path)
        if not allow_pickle:
            raise ValueError(REFUSED)
        tensors, token = read_with(path, _tensors)
        return PickledEmbedding(path=path, tensors=tensors, metadata={NAME: token} if token else {}, sha256=sha256(path))
    except (OSError, ValueError) as error:
        raise SettingError(f"embedding {path}: {plain(error)}") from error


def _tensors(value: Any, path: Path, place: Place) -> tuple[dict[str, StoredTensor], str]:
    """Return the tensors, and the embedding's name, "" if it is that of its tensor or of the file."""
    if not isinstance(value, dict) or _VECTORS not in value:
        return stored_tensors(value, path, place), ""
    vectors, token = value[_VECTORS], value.get(_TOKEN)
    if not isinstance(vectors, dict) or len(vectors) != 1:
        raise ValueError(f"{_VECTORS} is not a dictionary with one entry: convert it to .safetensors")
    [tensor] = vectors.values()
    return stored_tensors({OF_FILE: tensor}, path, place), token if isinstance(token, str) else ""
