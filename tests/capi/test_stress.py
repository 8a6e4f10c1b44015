"""1000 jobs from 8 threads, with random cancellations, invalid parameters, frees, closes and dying workers: no job is lost."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from bundles import with_fake_engines
from capi.building import HERE, STAND_IN, run
from capi.conftest import FIXTURE, Build

from sdruntime.bundle.bundle import Bundle

JOBS = 1000
ENDS = ("done", "cancelled", "rejected", "refused", "freed")
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # the allocator caches less memory per thread
    "LSAN_OPTIONS": f"suppressions={HERE / 'lsan.supp'}:print_suppressions=0",
}


@pytest.fixture(scope="module")
def fast_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle with engines that return at once."""
    return with_fake_engines(Bundle.open(shutil.copytree(FIXTURE, tmp_path_factory.mktemp("stress") / "bundle"))).folder


@pytest.mark.parametrize(
    ("kind", "isolation"),
    [
        ("plain", "in-process"),
        ("plain", "process"),
        ("asan", "in-process"),
        ("asan", "process"),
        ("tsan", "process"),  # in process it would also report Python's threads, whose locks it does not see
    ],
)
def test_no_job_is_lost_and_nothing_leaks(build: Build, fast_bundle: Path, empty_bundle: Path, kind: str, isolation: str) -> None:
    host = build(kind).program("stress.c")
    where = (fast_bundle, "-", "fake") if isolation == "in-process" else (empty_bundle, STAND_IN, "-")
    printed = run(host, isolation, *where, str(JOBS), env=ENVIRONMENT)
    assert f"jobs {2 * JOBS} of {2 * JOBS}" in printed
    assert " 0 faults, children 0" in printed
    counts = dict(re.findall(r"^(\w+) (\d+)$", printed, flags=re.MULTILINE))
    assert all(int(counts[name]) > 0 for name in ENDS), counts
    [(resident, before, after)] = re.findall(r"^memory (\d+) (\d+) (\d+)$", printed, flags=re.MULTILINE)
    if kind == "plain":  # sanitizers keep freed memory
        assert int(after) - int(before) <= 0.05 * int(resident), printed  # leaking 1000 images would add a quarter
