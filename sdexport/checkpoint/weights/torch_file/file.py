"""Read the header of a file that torch.save wrote, as `read_header` does that of a safetensors file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sdexport.checkpoint.weights.safetensors import StoredTensor
from sdexport.checkpoint.weights.torch_file.archive import SIGNATURE, Archive
from sdexport.checkpoint.weights.torch_file.sequence import MAGIC, PickleSequence
from sdexport.checkpoint.weights.torch_file.tensors import Place, stored_tensors
from sdruntime.system.document import open_regular

T = TypeVar("T")
REFUSED_PICKLE = (
    "a pickle, a format that can hold code: use a checkpoint with safetensors, or read it with --allow-pickle "
    "(only its weights are read, and nothing in it is run)"
)
_HEAD = 32  # bytes that tell the formats apart


def is_torch_file(path: Path) -> bool:
    """Return whether torch.save wrote a file, by its first bytes. Raises OSError, and ValueError if it is not a regular file."""
    head = _head(path)
    return head.startswith(SIGNATURE) or MAGIC in head


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a state dict by name. Nothing in the file is imported or run.

    Raises OSError, and ValueError if it is cut off, damaged, or holds something else.
    """
    return read_with(path, stored_tensors)


def read_with(path: Path, read: Callable[[Any, Path, Place], T]) -> T:
    """Return what `read` makes of what a file of torch.save holds. Raises OSError and ValueError."""
    head = _head(path)
    if head.startswith(SIGNATURE):
        with Archive(path) as archive:
            return read(archive.value(), path, archive.place)
    if MAGIC in head:
        sequence = PickleSequence(path)
        return read(sequence.value, path, sequence.place)
    raise ValueError("not a file of torch.save: neither a zip archive nor torch's older format")


def _head(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(_HEAD)
