"""Worker processes that die or send nonsense: each job gets its status, the host lives, the next job draws, no child is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from capi.building import HANGS, STAND_IN, Library, run

WORKER_DIED = 15


@pytest.fixture
def host(library: Library) -> Path:
    return library.program("host.c")


def statuses(printed: str, what: str) -> list[tuple[int, int]]:
    return [(int(code), int(reason)) for code, reason in re.findall(rf"^{what} (\d+) (\d+)", printed, flags=re.MULTILINE)]


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_ends_eight_jobs_and_the_next_ones_draw(host: Path, bundle: Path, number: signal.Signals) -> None:
    words = ("isolation=process", f"bundle={bundle}", "jobs=8", "steps=999", "rounds=2", "hold=1")
    with subprocess.Popen([host, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin
        assert program.stdout
        seen = ""
        while not seen.endswith("held\n"):
            line = program.stdout.readline()
            assert line, seen
            seen += line
        [worker] = children(program.pid)
        os.kill(worker, number)
        printed, _ = program.communicate("\n", timeout=HANGS)
    assert statuses(seen, "submit") == [(0, 0)] * 8
    assert statuses(printed, "job") == [(1, WORKER_DIED)] * 8 + [(0, 0)] * 8
    assert printed.count(f"was ended by signal {int(number)}") == 8
    assert f"process {worker} " in printed
    assert statuses(printed, "close") == [(0, 0)]
    assert "children 0" in printed
    assert program.returncode == 1  # for the eight that failed


TROUBLES = {
    "kill": "was ended by signal 9 (killed",
    "segv": "was ended by signal 11 (segmentation fault)",
    "exit": "ended with exit code 7",
    "nonsense": "sent what is no message",
    "huge": "sent what is no message (a header of 10 bytes of JSON, a blob of 1152921504606846976",
    "short": "sent what is no message",
}


@pytest.mark.parametrize("kind", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("prompt", TROUBLES)
def test_whatever_a_worker_does_each_job_gets_a_status(
    request: pytest.FixtureRequest, empty_bundle: Path, prompt: str, kind: str
) -> None:
    host = request.getfixturevalue("build")(kind).program("host.c")
    words = ("isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "jobs=8", "rounds=2", "steps=2")
    printed = run(host, *words, f"prompt={prompt}", code=1)
    assert statuses(printed, "job") == [(1, WORKER_DIED)] * 8 + [(0, 0)] * 8
    assert printed.count(TROUBLES[prompt]) == 8
    assert statuses(printed, "close") == [(0, 0)]
    assert "children 0" in printed


@pytest.mark.parametrize("prompt", ["sealed", "unsealed", "inline"])
def test_a_large_picture_comes_as_a_memory_file(host: Path, empty_bundle: Path, tmp_path: Path, prompt: str) -> None:
    """One that could be cut short meanwhile is copied, and a Python that has no memory files sends bytes: the same rows."""
    words = ("isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "size=1024", f"prompt={prompt}")
    run(host, *words, f"out={tmp_path / 'rows'}")
    rows = (tmp_path / "rows").read_bytes()
    mark = [rows[k] ^ k for k in range(4)]
    assert rows == bytes(mark[k % 4] ^ k & 255 for k in range(3 * 1024)) * 1024
