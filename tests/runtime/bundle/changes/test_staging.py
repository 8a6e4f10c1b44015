"""What takes a bundle's place, and what is never removed on the way."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from bundles import make_bundle, tree, with_fake_engines

from sdruntime.bundle.bundle import Bundle
from sdruntime.bundle.changes.staging import check_place, is_mount, staging
from sdruntime.errors import BundleError, OutOfSpace


def write(place: Path, text: str = "{}") -> None:
    """Export a bundle to `place`, with `text` in one of its files."""
    with staging(place) as folder, tempfile.TemporaryDirectory() as scratch:
        made = make_bundle(Path(scratch) / "made").with_files({"unet/extra.json": text.encode()})
        shutil.copytree(made.folder, folder, dirs_exist_ok=True)


def refusal(place: Path) -> str:
    """Why an export to `place` is refused; it must not have touched anything."""
    before = tree(place.parent)
    with pytest.raises(BundleError) as caught, staging(place) as folder:
        (folder / "file").write_text("new")
    assert tree(place.parent) == before
    return str(caught.value)


def test_staging_takes_its_place_at_the_end(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "place"
    for text in ("first", "second"):
        write(place, text)
        assert (place / "unet/extra.json").read_text() == text
        assert Bundle.open(place).changed_files() == []
    assert [path.name for path in place.parent.iterdir()] == ["place"]


def test_an_empty_folder_is_a_place(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    write(tmp_path / "place")
    assert Bundle.open(tmp_path / "place").changed_files() == []


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_failed_staging_leaves_the_existing_bundle_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    write(tmp_path / "place")
    before = tree(tmp_path)
    with pytest.raises(type(error)), staging(tmp_path / "place") as folder:  # noqa: PT012
        (folder / "file").write_text("half")
        raise error
    assert tree(tmp_path) == before


def test_two_folders_are_swapped_where_the_system_has_no_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    for text in ("first", "second"):
        write(tmp_path / "place", text)
    assert (tmp_path / "place/unet/extra.json").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_bundle_is_put_back_if_a_swap_in_two_steps_was_killed_between_them(tmp_path: Path, dead_token: str) -> None:
    write(tmp_path / "place", "first")
    (tmp_path / "place").rename(tmp_path / f".place.former-{dead_token}")
    with pytest.raises(RuntimeError), staging(tmp_path / "place"):
        raise RuntimeError("this export fails too")
    assert Bundle.open(tmp_path / "place").changed_files() == []
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_full_disk_is_reported_with_its_free_bytes(tmp_path: Path) -> None:
    with pytest.raises(OutOfSpace, match=r"the disk is full \([\d,]+ bytes are free\)") as caught, staging(tmp_path / "place"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_only_a_bundle_is_replaced(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "index.html").write_text("a web app")
    assert "not a bundle" in refusal(app)
    for manifest in ("{}", '{"name": "an app"}', '{"format": "sdexport-bundle", "revision": 999}', "not JSON", "[]"):
        (app / "manifest.json").write_text(manifest)
        assert "not a bundle" in refusal(app)
    (app / "manifest.json").write_text(json.dumps({"format": "sdexport-bundle", "revision": 1}))
    assert "does not list its files" in refusal(app)
    assert "this is a file" in refusal(app / "index.html")


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_mount(Path("/proc") if Path("/proc/self/mountinfo").exists() else Path("/"))
    (place := tmp_path / "a volume").mkdir()
    assert not is_mount(place)
    read = Path.read_bytes
    line = b"36 35 98:0 /mnt1 " + os.fsencode(place).replace(b" ", rb"\040") + b" rw,noatime - ext3 /dev/root rw"
    monkeypatch.setattr(Path, "read_bytes", lambda self: line if self.name == "mountinfo" else read(self))
    assert "a file system is mounted here, so it cannot be replaced: use a folder in it" in refusal(place)
    write(place / "bundle")


@pytest.mark.parametrize(
    "name", ["notes.txt", ".git/HEAD", "unet/mine.bin", "engines/notes.txt", "engines/deep/x.onnx", "more/a"]
)
def test_a_bundle_with_files_of_others_is_not_replaced(tmp_path: Path, name: str) -> None:
    write(tmp_path / "place")
    with_fake_engines(Bundle.open(tmp_path / "place"))
    check_place(tmp_path / "place")
    path = tmp_path / "place" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert f"would be lost: {name.split('/')[0]}" in refusal(tmp_path / "place")


def test_links_are_neither_replaced_nor_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "bundle")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "bundle")
    assert "a symbolic link is never replaced" in refusal(tmp_path / "link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert "a symbolic link is never replaced" in refusal(tmp_path / "dangling")

    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "unet-photo.bin").write_text("a photo")
    write(tmp_path / "place")
    (tmp_path / "place" / "engines").symlink_to(tmp_path / "holiday")
    assert "would be lost: engines" in refusal(tmp_path / "place")
    assert (tmp_path / "holiday" / "unet-photo.bin").read_text() == "a photo"

    (tmp_path / "way").symlink_to(tmp_path / "elsewhere")  # a link on the way is the user's own arrangement
    write(tmp_path / "way" / "bundle", "second")
    assert (tmp_path / "elsewhere/bundle/unet/extra.json").read_text() == "second"


def test_a_damaged_bundle_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "place")
    (tmp_path / "place" / "unet" / "model.onnx").unlink()
    (tmp_path / "place" / "vae_decoder" / "model.onnx").write_bytes(b"longer than before")
    write(tmp_path / "place", "second")
    assert Bundle.open(tmp_path / "place").changed_files() == []


def test_what_becomes_something_else_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "place")
    with pytest.raises(BundleError, match=r"would be lost: late\.txt"), staging(tmp_path / "place") as folder:  # noqa: PT012
        (folder / "file").write_text("new")
        (tmp_path / "place" / "late.txt").write_text("mine")
    assert (tmp_path / "place" / "late.txt").read_text() == "mine"
    assert Bundle.open(tmp_path / "place").changed_files() == []


def test_what_a_killed_export_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path, dead_token: str) -> None:
    other = tmp_path / f".place.staged-{dead_token}"
    other.mkdir()
    (other / "weights").write_bytes(bytes(1000))
    (tmp_path / ".place.staged-notes about it").mkdir()
    with staging(tmp_path / "place") as living:
        (living / "file").write_text("half")
        assert not other.exists()
        write(tmp_path / "place")
        assert (living / "file").exists()
        shutil.rmtree(tmp_path / "place")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".place.staged-notes about it", "place"]
