"""Whose a temporary name is, and the lock that ends with its owner."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sdruntime.bundle.changes import lock as lock_module
from sdruntime.bundle.changes.lock import locked
from sdruntime.errors import BundleError
from sdruntime.system import owner as owner_module
from sdruntime.system.owner import Owner, abandoned, leftovers, owned_folder, sweep

HERE = Owner.here()


def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


def token(**changes: object) -> str:
    return dataclasses.replace(HERE, **changes).token()  # type: ignore[arg-type]


def test_a_token_names_its_owner() -> None:
    assert Owner.parse(HERE.token()) == HERE
    assert HERE.token() != HERE.token()
    for text in ("", "notes", "1-2-3", HERE.token() + "x"):
        assert Owner.parse(text) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_owner_is_gone_when_its_process_is(dead_token: str) -> None:
    dead = Owner.parse(dead_token)
    assert dead is not None
    assert dead.gone() is True
    assert HERE.gone() is False
    assert dataclasses.replace(HERE, start=HERE.start - 1).gone() is True, "another process with its number"
    assert dataclasses.replace(HERE, boot="00000000").gone() is True, "this host was restarted"
    assert dataclasses.replace(HERE, boot="00000000", host="00000000").gone() is None, "another host"
    assert dataclasses.replace(HERE, space=1).gone() is None, "another container"


def test_without_proc_a_process_that_runs_is_not_gone(dead_token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc may hide the processes of other users."""

    def hidden(self: Path, **_: object) -> str:
        raise FileNotFoundError(2, "No such file or directory")

    dead = Owner.parse(dead_token)
    assert dead is not None
    monkeypatch.setattr(Path, "read_text", hidden)
    assert HERE.gone() is False
    assert dead.gone() is True


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_ended_and_was_not_waited_for_is_gone() -> None:
    code = "from sdruntime.system.owner import Owner; print(Owner.here().token())"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=-1)
    assert child.stdout is not None
    owner = Owner.parse(child.stdout.read().decode().strip())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner is not None
    assert owner.gone() is True
    child.wait()
    child.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_an_unknown_owner_has_is_left_alone_for_a_day(tmp_path: Path) -> None:
    for host in ({"space": 1}, {"boot": "00000000", "host": "00000000"}):
        path = tmp_path / f"x-{token(**host)}"
        path.write_text("")
        assert not abandoned(path, path.name.removeprefix("x-"))
        os.utime(path, (time.time() - 90_000,) * 2)
        assert abandoned(path, path.name.removeprefix("x-"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_between_containers_the_lock_on_a_folder_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boot, space, host = owner_module._system()
    monkeypatch.setattr(owner_module, "_system", lambda: (boot, space + 1, host))  # another container makes it
    with owned_folder(tmp_path, "x-") as path:
        monkeypatch.setattr(owner_module, "_system", lambda: (boot, space, host))
        assert leftovers(tmp_path, "x-") == []
        other = tmp_path / path.name.replace("x-", "x-1", 1)  # not locked by anybody
        other.mkdir()
        assert leftovers(tmp_path, "x-") == [other]
        stub(monkeypatch)
        assert leftovers(tmp_path, "x-") == [], "locks that only say yes tell nothing"


def test_only_names_with_a_token_are_swept(tmp_path: Path, dead_token: str) -> None:
    for name in ("x-", "x-notes", "x-2024-holiday", f"y-{dead_token}", f"x-{dead_token}.txt"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    (tmp_path / f"x-{dead_token}").symlink_to(tmp_path / "mine")
    sweep(tmp_path, "x-")
    assert {path.name for path in tmp_path.iterdir()} == before
    assert (tmp_path / "mine" / "file").read_text() == "mine"


@pytest.mark.parametrize("honest", [True, False])
def test_one_holder_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, honest: bool) -> None:
    if not honest:
        stub(monkeypatch)
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with locked(tmp_path):
                inside += 1
                most = max(most, inside)
                time.sleep(0)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("honest", [True, False])
def test_the_lock_of_a_dead_owner_is_broken(
    tmp_path: Path, dead_token: str, monkeypatch: pytest.MonkeyPatch, honest: bool
) -> None:
    if not honest:
        stub(monkeypatch)
    (tmp_path / ".lock").mkdir()
    with locked(tmp_path):  # killed between the file and the folder
        pass
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / dead_token).touch()
    with locked(tmp_path):
        assert [name.name for name in (tmp_path / ".lock").iterdir()] != [dead_token]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("holder", ["this process", "another host", "no token"])
def test_a_lock_that_is_kept_is_named_and_never_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: str) -> None:
    monkeypatch.setattr(lock_module, "_PATIENCE", 0.02)
    held = {"this process": HERE.token(), "another host": token(boot="00000000", host="00000000"), "no token": "notes"}[holder]
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / held).touch()
    with pytest.raises(BundleError, match=r"locked by .*remove the folder .*\.lock") as caught, locked(tmp_path):
        pass
    if holder != "no token":
        assert f"process {HERE.pid}" in str(caught.value)
    assert (tmp_path / ".lock" / held).exists()


def test_a_linked_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / HERE.token()).touch()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(BundleError, match=r"\.lock is a file or a link"), locked(tmp_path / "bundle"):
        pass
    assert len(list((tmp_path / "mine").iterdir())) == 1


def test_the_lock_is_that_of_the_folder_that_is_there_at_last(tmp_path: Path) -> None:
    """A bundle that is replaced while another process waits for its lock."""
    place, entered = tmp_path / "bundle", threading.Event()
    place.mkdir()

    def wait() -> None:
        with locked(place):
            (place / "mark").touch()
        entered.set()

    with locked(place):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.02)
        (tmp_path / "newer").mkdir()
        place.rename(tmp_path / "former")
        (tmp_path / "newer").rename(place)
    thread.join()
    assert [path.name for path in place.iterdir()] == ["mark"]
    assert list((tmp_path / "former").iterdir()) == []


def test_a_file_under_the_locks_name_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")
    with pytest.raises(BundleError) as caught, locked(tmp_path):
        pass
    assert caught.value.faults == (f".lock is a file or a link, and a lock is a folder: remove {tmp_path / '.lock'}",)
    assert (tmp_path / ".lock").is_file()
