"""Files below a folder: nothing is followed, nothing but regular files is opened."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from descriptors import open_files

from sdruntime.system.files import FileFault, FileMissing, Folder, hash_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/file").write_bytes(b"bytes")
    (tmp_path / "link").symlink_to("deep")
    (tmp_path / "deep/link").symlink_to("er/file")
    os.mkfifo(tmp_path / "deep/fifo")
    return tmp_path


def test_a_regular_file_is_read(folder: Path) -> None:
    opened = Folder(folder)
    assert opened.read("deep/er/file") == b"bytes"
    assert opened.read("deep/er/file", most=5) == b"bytes"
    assert opened.status("deep/er/file").st_size == 5
    with pytest.raises(FileFault, match="deep/er/file: 5 bytes; at most 4 are read"):
        opened.read("deep/er/file", most=4)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("link/er/file", "link/er/file: link is a link"),
        ("deep/link", "deep/link: not a regular file"),
        ("deep/fifo", "deep/fifo: not a regular file"),
        ("deep/er", "deep/er: not a regular file"),
        ("deep/er/file/x", "deep/er/file/x: Not a directory"),
    ],
)
def test_what_is_no_regular_file_of_the_folder_is_refused(folder: Path, path: str, fault: str) -> None:
    opened = Folder(folder)
    with pytest.raises(FileFault) as caught:
        opened.status(path)
    assert str(caught.value) == fault
    with pytest.raises(FileFault) as caught, opened.open(path):
        pass
    assert str(caught.value) == fault


def test_a_socket_a_device_and_nothing_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Folder(folder)
    with socket.socket(socket.AF_UNIX) as listening, pytest.raises(FileFault, match="s: not a regular file"):  # noqa: PT012
        monkeypatch.chdir(folder)
        listening.bind("s")
        opened.read("s")
    with pytest.raises(FileFault, match="null: not a regular file"):
        Folder("/dev").read("null")
    with pytest.raises(FileMissing, match="none: missing"):
        opened.read("none")
    with pytest.raises(FileMissing, match="none/file: missing"):
        opened.read("none/file")
    with pytest.raises(FileFault, match="No such file"):
        Folder(folder / "none")


def test_what_takes_a_files_place_just_now_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at a file and its opening; a FIFO without a writer would hang."""
    opened, real = Folder(folder), os.stat

    def stat(path: str, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        found = real(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
        if path == "file":
            os.unlink("file", dir_fd=dir_fd)
            os.mkfifo("file", dir_fd=dir_fd)
        return found

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(FileFault, match="file: not a regular file"):
        opened.read("deep/er/file")


def test_the_folder_stays_the_one_that_was_opened(folder: Path, tmp_path: Path) -> None:
    opened = Folder(folder / "deep")
    (folder / "deep").rename(folder / "moved")
    assert opened.read("er/file") == b"bytes"


def test_descriptors_are_closed(folder: Path) -> None:
    before = open_files()
    opened = Folder(folder)
    for path in ("deep/er/file", "deep/fifo", "link/er/file", "none"):
        for _ in range(3):
            try:
                opened.read(path)
            except FileFault:
                continue
    del opened
    assert open_files() == before


def test_a_hash_is_of_the_whole_file_and_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    with (tmp_path / "file").open("rb") as file:
        assert hash_of(file.fileno()) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        assert hash_of(file.fileno(), lambda: True) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
