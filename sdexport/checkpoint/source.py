"""Where a checkpoint comes from: a folder, a file, or one of these with parts of another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sdexport.checkpoint.card import Card
from sdexport.checkpoint.weights.safetensors import StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """The files of a network's weights, by names without this machine's paths, and the location of each tensor in them."""

    files: Mapping[str, Path]
    tensors: Mapping[str, StoredTensor]


class Source(Protocol):
    """Where a checkpoint comes from, presented as a diffusers folder."""

    path: Path
    inferred: tuple[str, ...]  # a line for each setting that was concluded, as no document states it

    def document(self, path: str) -> Any:
        """Return a JSON document. Raises FileNotFoundError, OSError and ValueError."""

    def file(self, path: str) -> bytes | None:
        """Return a file's bytes; None if there is no such file. Raises OSError and ValueError."""

    def weights(self, part: str, faults: list[str]) -> StoredWeights:
        """Return the weights of a network; what is wrong is added to `faults`."""

    def card(self) -> Card:
        """Return the model card."""

    def inputs(self, parts: Iterable[str]) -> Mapping[str, Path]:
        """Return the files that documents of these networks were read from, by names without this machine's paths."""
