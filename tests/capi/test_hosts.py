"""What hosts do around the library: to their signals, descriptors, folder. Each draws, or is told why it cannot."""

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
ODD = ["ignore=1", "bare=1", "block=1"]
CYCLES = 20


@pytest.fixture
def host(library: Library) -> Path:
    return library.program("host.c")


def descriptors(printed: str) -> tuple[int, int]:
    [(before, after)] = re.findall(r"^descriptors (\d+) (\d+)$", printed, flags=re.MULTILINE)
    return int(before), int(after)


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("odd", ODD)
def test_hosts_that_ignore_their_children_have_no_descriptors_or_block_signals(
    host: Path, bundle: Path, odd: str, isolation: str
) -> None:
    printed = run(host, f"isolation={isolation}", f"bundle={bundle}", "jobs=2", "rounds=2", odd)
    assert statuses(printed, "job") == [(0, 0)] * 4
    assert "children 0" in printed


@pytest.mark.parametrize("odd", ["jobs=1", *ODD])
def test_a_worker_begins_as_any_process(host: Path, empty_bundle: Path, odd: str) -> None:
    """With the usual descriptors and its end of the socket; it blocks no signal and ignores no child."""
    printed = run(host, "isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", odd)
    [described] = re.findall(r"^describe (.*)$", printed, flags=re.MULTILINE)
    worker = json.loads(described)
    assert (worker["descriptors"], worker["blocked"], worker["children"]) == ([0, 1, 2, 3], [], True)


def test_the_three_usual_descriptors_are_left_to_the_host(host: Path, empty_bundle: Path) -> None:
    """One that becomes a daemon later puts files of its own there."""
    printed = run(host, "isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "bare=1")
    assert "taken 0\n" in printed
    assert statuses(printed, "job") == [(0, 0)]


def test_a_worker_that_dies_in_the_middle_of_a_message(host: Path, empty_bundle: Path) -> None:
    """The host has the usual SIGPIPE, which ends a process that writes to one that is gone."""
    words = ("isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "jobs=2", "rounds=2", f"long={8 << 20}")
    printed = run(host, *words, code=1)
    assert statuses(printed, "job") == [(1, WORKER_DIED)] * 2 + [(0, 0)] * 2
    assert printed.count("ended with exit code 8") == 2
    assert "children 0" in printed


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("files", [4, 12, 18])
def test_a_host_that_may_open_few_files_is_told(host: Path, bundle: Path, files: int, isolation: str) -> None:
    """Before Python starts, which ends its process where it cannot read its own library."""
    printed = run(host, f"isolation={isolation}", f"bundle={bundle}", f"files={files}")
    assert statuses(printed, "open") == [(3, 0), (0, 0)]
    [free] = re.findall(
        rf" (\d+) file descriptors are free and 16 are needed; this process may open {files}: raise that", printed
    )
    assert int(free) <= files - 3
    before, after = descriptors(printed)
    assert after <= before, "one of the first runtime may be closed late, none is left"
    assert statuses(printed, "job") == [(0, 0)]


@pytest.mark.parametrize(
    ("asked", "why"),
    [("image=256", "could not be sent a message (memfd_create: Too many"), ("size=512", "may open no more files")],
)
def test_a_host_that_can_open_no_file_while_jobs_run_is_told(host: Path, empty_bundle: Path, asked: str, why: str) -> None:
    """Large pictures need one for their memory, on their way to the worker and from it."""
    words = ("isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "full=1", "jobs=2", "rounds=2")
    printed = run(host, *words, asked, code=1)
    assert statuses(printed, "job") == [(1, WORKER_DIED)] * 2 + [(0, 0)] * 2
    assert printed.count(why) == 2
    assert "children 0" in printed


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_no_descriptor_is_left_after_twenty_runtimes(host: Path, bundle: Path, empty_bundle: Path, isolation: str) -> None:
    where = (f"bundle={bundle}",) if isolation == "in-process" else (f"bundle={empty_bundle}", f"python={STAND_IN}", "size=512")
    printed = run(host, f"isolation={isolation}", *where, f"cycles={CYCLES}")
    assert statuses(printed, "job") == [(0, 0)] * (CYCLES + 1)
    before, after = descriptors(printed)
    assert after == before


def state(process: int) -> str:
    """One letter, as ps has it; Z, or nothing, for one that has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return ""


def test_a_worker_goes_with_its_host_though_a_child_of_that_lives_on(host: Path, empty_bundle: Path) -> None:
    words = ("isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "stay=1")
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
def test_a_host_that_changes_its_folder_after_opening(host: Path, bundle: Path, tmp_path: Path, isolation: str) -> None:
    words = (f"isolation={isolation}", f"bundle={bundle.name}", f"away={tmp_path}", "rounds=2")
    printed = run(host, *words, cwd=bundle.parent)
    assert statuses(printed, "job") == [(0, 0)] * 2


def test_the_next_worker_is_found_from_another_folder_too(host: Path, empty_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "worker.py").symlink_to(STAND_IN)
    (tmp_path / "bundle").symlink_to(empty_bundle)
    words = ("isolation=process", "bundle=bundle", "python=worker.py", "away=/", "prompt=kill", "rounds=2")
    printed = run(host, *words, code=1, cwd=tmp_path)
    assert statuses(printed, "job") == [(1, WORKER_DIED), (0, 0)]
