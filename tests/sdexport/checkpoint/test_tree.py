"""Documents of a checkpoint are its own: links within it and into the hub's cache are followed, others are not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sdexport.checkpoint.checkpoint import read_checkpoint
from sdexport.checkpoint.tree import read_own
from sdexport.errors import CheckpointError


def test_a_link_within_the_checkpoint_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "b").symlink_to("a")
    assert read_own(tmp_path / "b", tmp_path) == b"x"
    assert read_own(tmp_path / "c", tmp_path) is None


def test_a_link_into_the_blobs_of_the_hubs_cache_is_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "beef").write_bytes(b"x")
    (snapshot / "vocab.json").symlink_to("../../blobs/beef")
    assert read_own(snapshot / "vocab.json", snapshot) == b"x"
    moved = Path(shutil.move(repository, tmp_path / "plain"))
    with pytest.raises(ValueError, match="outside of the checkpoint"):
        read_own(moved / "snapshots" / "0123" / "vocab.json", moved / "snapshots" / "0123")


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_a_link_out_of_the_checkpoint_is_not_read(sd1_checkpoint: Path, tmp_path: Path, folder: bool) -> None:
    checkpoint = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    place = checkpoint / "tokenizer" / ("" if folder else "merges.txt")
    outside = Path(shutil.move(place, tmp_path / "outside"))
    place.symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"tokenizer/merges.txt: it is a link to a file outside of the checkpoint"):
        read_checkpoint(checkpoint, name="tiny")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "tokenizer/vocab.json", "tokenizer/added_tokens.json"])
def test_pipes_and_devices_are_not_opened(sd1_checkpoint: Path, tmp_path: Path, name: str) -> None:
    checkpoint = Path(shutil.copytree(sd1_checkpoint, tmp_path / "checkpoint"))
    (checkpoint / name).unlink(missing_ok=True)
    os.mkfifo(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"{name}.* a FIFO"):
        read_checkpoint(checkpoint, name="tiny")
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"{name}.*(a device|outside of the checkpoint)"):
        read_checkpoint(checkpoint, name="tiny")
