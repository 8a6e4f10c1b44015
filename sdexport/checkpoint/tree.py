"""Read the documents of a checkpoint: regular files of a bounded size that lie in the checkpoint itself."""

from __future__ import annotations

from pathlib import Path

from sdruntime.system.document import read_document


def read_own(path: Path, folder: Path) -> bytes | None:
    """Return the bytes of a file of the checkpoint in `folder`; None if there is no such file.

    Links are followed only within the checkpoint and into the blobs of the hub's cache that contains it. Raises ValueError with
    the reason if the file is not read.
    """
    if not path.is_symlink() and not path.exists():
        return None
    if not path.exists():
        raise ValueError("it is a broken link")
    real = path.resolve()
    if not any(real.is_relative_to(place) for place in _places(folder)):
        raise ValueError("it is a link to a file outside of the checkpoint: replace the link by a copy of the file")
    return read_document(real)


def _places(folder: Path) -> list[Path]:
    """Return where files of a checkpoint may lie: its folder, and the `blobs` beside `models--owner--name/snapshots/REVISION`."""
    real = folder.resolve()
    cache = real.parent.parent
    return [real, cache / "blobs"] if real.parent.name == "snapshots" and cache.name.startswith("models--") else [real]
