"""Worker processes that die or send invalid messages: each job gets a status, the host survives, and the next job succeeds."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from capi.building import STAND_IN, TIMEOUT, Library, run

WORKER_DIED = 15


@pytest.fixture
def host(library: Library) -> Path:
    return library.program("host.c")


def statuses(printed: str, what: str) -> list[tuple[int, int]]:
    """Return the code and reason of each status of one call."""
    return [(int(code), int(reason)) for code, reason in re.findall(rf"^{what} (\d+) (\d+)", printed, flags=re.MULTILINE)]


def children(process: int) -> list[int]:
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_dead_worker_fails_its_eight_jobs_and_the_next_jobs_succeed(host: Path, bundle: Path, number: signal.Signals) -> None:
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
        printed, _ = program.communicate("\n", timeout=TIMEOUT)
    assert statuses(seen, "submit") == [(0, 0)] * 8
    assert statuses(printed, "job") == [(1, WORKER_DIED)] * 8 + [(0, 0)] * 8
    assert printed.count(f"was killed by signal {int(number)}") == 8
    assert f"process {worker} " in printed
    assert statuses(printed, "close") == [(0, 0)]
    assert "children 0" in printed
    assert program.returncode == 1  # because of the eight failed jobs


FAULTS = {
    "kill": "was killed by signal 9 (SIGKILL",
    "segv": "was killed by signal 11 (segmentation fault)",
    "exit": "exited with code 7",
    "nonsense": "sent an invalid message",
    "huge": "sent an invalid message (a header with 10 bytes of JSON, a blob of 1152921504606846976 bytes",
    "short": "sent an invalid message",
}


@pytest.mark.parametrize("kind", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("prompt", FAULTS)
def test_each_job_of_a_faulty_worker_gets_a_status(
    request: pytest.FixtureRequest, empty_bundle: Path, prompt: str, kind: str
) -> None:
    host = request.getfixturevalue("build")(kind).program("host.c")
    words = ("isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "jobs=8", "rounds=2", "steps=2")
    printed = run(host, *words, f"prompt={prompt}", code=1)
    assert statuses(printed, "job") == [(1, WORKER_DIED)] * 8 + [(0, 0)] * 8
    assert printed.count(FAULTS[prompt]) == 8
    assert statuses(printed, "close") == [(0, 0)]
    assert "children 0" in printed


@pytest.mark.parametrize("prompt", ["sealed", "unsealed", "inline"])
def test_a_large_image_is_received_as_a_memory_file(host: Path, empty_bundle: Path, tmp_path: Path, prompt: str) -> None:
    """A file that may still shrink is copied, and a Python without memory files sends bytes. The rows are the same."""
    words = ("isolation=process", f"bundle={empty_bundle}", f"python={STAND_IN}", "size=1024", f"prompt={prompt}")
    run(host, *words, f"out={tmp_path / 'rows'}")
    rows = (tmp_path / "rows").read_bytes()
    mark = [rows[k] ^ k for k in range(4)]
    assert rows == bytes(mark[k % 4] ^ k & 255 for k in range(3 * 1024)) * 1024
