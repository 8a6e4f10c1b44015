"""Files of a checkpoint that are documents: regular, of a bounded size, and of the checkpoint itself."""

from __future__ import annotations

from pathlib import Path

from sdruntime.system.document import read_document


def read_own(path: Path, folder: Path) -> bytes | None:
    """The bytes of a file of the checkpoint in `folder`, None where there is none. Links are followed within the checkpoint, and
    into the blobs of the hub's cache that it lies in, never elsewhere. Raises ValueError with the reason that it is not read."""
    if not path.is_symlink() and not path.exists():
        return None
    if not path.exists():
        raise ValueError("it is a link to nothing")
    real = path.resolve()
    if not any(real.is_relative_to(place) for place in _places(folder)):
        raise ValueError("it is a link to a file outside of the checkpoint: copy the file in its place")
    return read_document(real)


def _places(folder: Path) -> list[Path]:
    """Where the files of a checkpoint may lie: its folder, and `blobs` of `models--owner--name/snapshots/REVISION`."""
    real = folder.resolve()
    cache = real.parent.parent
    return [real, cache / "blobs"] if real.parent.name == "snapshots" and cache.name.startswith("models--") else [real]
