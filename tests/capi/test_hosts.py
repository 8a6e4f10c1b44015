"""Hosts with unusual signals, descriptors, folders or children: each generates an image, or gets an error that says why not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from capi.building import STAND_IN, Library, run
from capi.test_worker import WORKER_DIED, statuses

ISOLATIONS = ["in-process", "process"]
UNUSUAL = ["ignore=1", "no_stdio=1", "block=1"]
CYCLES = 20


@pytest.fixture
def host(library: Library) -> Path:
    return library.program("host.c")


def descriptors(printed: str) -> tuple[int, int]:
    """Return the number of open descriptors before and after."""
    [(before, after)] = re.findall(r"^descriptors (\d+) (\d+)$", printed, flags=re.MULTILINE)
    return int(before), int(after)


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("word", UNUSUAL)
def test_hosts_that_ignore_children_lack_stdio_or_block_signals(host: Path, bundle: Path, word: str, isolation: str) -> None:
    printed = run(host, f"isolation={isolation}", f"bundle={bundle}", "jobs=2", "rounds=2", word)
    assert statuses(printed, "job") == [(0, 0)] * 4
    assert "children 0" in printed


@pytest.mark.parametrize("word", ["jobs=1", *UNUSUAL])
def test_a_worker_starts_with_a_clean_environment(host: Path, empty_bundle: Path, word: str) -> None:
    """It has the standard descriptors and its end of the socket; it blocks no signal and does not ignore children."""
    printed = run(host, "isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", word)
    [described] = re.findall(r"^describe (.*)$", printed, flags=re.MULTILINE)
    worker = json.loads(described)
    assert (worker["descriptors"], worker["blocked"], worker["children"]) == ([0, 1, 2, 3], [], True)


def test_the_standard_descriptors_are_left_to_the_host(host: Path, empty_bundle: Path) -> None:
    """A host that becomes a daemon later opens its own files there."""
    printed = run(host, "isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "no_stdio=1")
    assert "taken 0\n" in printed
    assert statuses(printed, "job") == [(0, 0)]


def test_a_worker_that_dies_in_the_middle_of_a_message(host: Path, empty_bundle: Path) -> None:
    """The host does not ignore SIGPIPE, which would end it when it writes to the dead worker."""
    words = ("isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "jobs=2", "rounds=2", f"prompt_bytes={8 << 20}")
    printed = run(host, *words, code=1)
    assert statuses(printed, "job") == [(1, WORKER_DIED)] * 2 + [(0, 0)] * 2
    assert printed.count("exited with code 8") == 2
    assert "children 0" in printed


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("files", [4, 12, 18])
def test_a_low_limit_of_open_files_is_reported(host: Path, bundle: Path, files: int, isolation: str) -> None:
    """Before Python starts: Python ends the process if it cannot read its own library."""
    printed = run(host, f"isolation={isolation}", f"bundle={bundle}", f"file_limit={files}")
    assert statuses(printed, "open") == [(3, 0), (0, 0)]
    [free] = re.findall(
        rf" (\d+) free file descriptors, but 16 are required; this process may open {files}: raise the limit", printed
    )
    assert int(free) <= files - 3
    before, after = descriptors(printed)
    assert after <= before, "a descriptor of the first runtime may be closed late, but none is leaked"
    assert statuses(printed, "job") == [(0, 0)]


@pytest.mark.parametrize(
    ("word", "why"),
    [("image=256", "could not be sent a message (memfd_create: Too many"), ("size=512", "cannot open more files")],
)
def test_running_out_of_descriptors_while_jobs_run_is_reported(host: Path, empty_bundle: Path, word: str, why: str) -> None:
    """A large image needs a descriptor for its memory file, both to the worker and from it."""
    words = ("isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "no_files=1", "jobs=2", "rounds=2")
    printed = run(host, *words, word, code=1)
    assert statuses(printed, "job") == [(1, WORKER_DIED)] * 2 + [(0, 0)] * 2
    assert printed.count(why) == 2
    assert "children 0" in printed


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_twenty_runtimes_leak_no_descriptor(host: Path, bundle: Path, empty_bundle: Path, isolation: str) -> None:
    words = (f"bundle={bundle}",) if isolation == "in-process" else (f"bundle={empty_bundle}", f"python={STAND_IN}", "size=512")
    printed = run(host, f"isolation={isolation}", *words, f"cycles={CYCLES}")
    assert statuses(printed, "job") == [(0, 0)] * (CYCLES + 1)
    before, after = descriptors(printed)
    assert after == before


def state(process: int) -> str:
    """Return the state of a process as one letter, as in ps; "Z" or "" if it has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return ""


def test_a_worker_ends_with_its_host_even_if_a_child_of_the_host_lives_on(host: Path, empty_bundle: Path) -> None:
    words = ("isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "idle_child=1")
    with subprocess.Popen([host, *words], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout
        lines = [program.stdout.readline() for _ in range(3)]
        worker = json.loads(lines[1].removeprefix("describe "))["process"]
        child = int(lines[2].removeprefix("child "))
        try:
            program.kill()
            deadline = time.monotonic() + 5
            while state(worker) not in ("Z", "") and time.monotonic() < deadline:
                time.sleep(0.01)
            assert state(worker) in ("Z", "")
            assert state(child) == "S"
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_host_may_change_its_folder_after_opening(host: Path, bundle: Path, tmp_path: Path, isolation: str) -> None:
    words = (f"isolation={isolation}", f"bundle={bundle.name}", f"chdir={tmp_path}", "rounds=2")
    printed = run(host, *words, cwd=bundle.parent)
    assert statuses(printed, "job") == [(0, 0)] * 2


def test_a_new_worker_starts_after_the_host_has_changed_its_folder(host: Path, empty_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "worker.py").symlink_to(STAND_IN)
    (tmp_path / "bundle").symlink_to(empty_bundle)
    words = ("isolation=process", "bundle=bundle", "python=worker.py", "chdir=/", "prompt=kill", "rounds=2")
    printed = run(host, *words, code=1, cwd=tmp_path)
    assert statuses(printed, "job") == [(1, WORKER_DIED), (0, 0)]
