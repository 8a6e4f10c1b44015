"""One suite for every implementation of sdruntime.h: in this process, in a worker, and with a stand-in for the service."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from capi.building import HERE, STAND_IN, Library, run
from capi.conftest import Build

SOURCES = ("harness.c", "arguments.c", "results.c", "callbacks.c", "lifetime.c")


def conformance(library: Library, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
    program = library.program(*(HERE / "conformance" / name for name in SOURCES), name="conformance")
    printed = run(program, *arguments, env=env)
    assert "0 of 30 failed" in printed, printed


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_the_library_conforms(library: Library, bundle: Path, isolation: str) -> None:
    conformance(library, isolation, bundle)


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_its_own_code_has_no_report(build: Build, empty_bundle: Path, kind: str) -> None:
    conformance(build(kind), "process", empty_bundle, STAND_IN)


@pytest.mark.full
@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_with_the_service_there_is_no_report(build: Build, bundle: Path, isolation: str) -> None:
    """Python and the engines keep memory of their own until the process ends; of the library's there must be none left."""
    conformance(build("asan"), isolation, bundle, env={"LSAN_OPTIONS": f"suppressions={HERE / 'lsan.supp'}:print_suppressions=0"})


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_a_callback_that_throws_ends_its_own_job(library: Library, bundle: Path, isolation: str) -> None:
    assert run(library.program("throwing.cpp"), isolation, bundle).startswith("0 faults")


@pytest.mark.parametrize("kind", ["plain", "asan", "tsan"])
def test_a_log_callback_that_throws_is_dropped(build: Build, empty_bundle: Path, kind: str) -> None:
    assert run(build(kind).program("throwing.cpp"), "process", empty_bundle, STAND_IN) == "0 faults, 2 lines\n"


def test_freeing_twice_is_told_where_debugging_is_on(library: Library, empty_bundle: Path) -> None:
    program = library.program(*(HERE / "conformance" / name for name in SOURCES), name="conformance")
    words = ("process", empty_bundle, STAND_IN, "-", "foreign_and_freed_handles")
    loud = run(program, *words, env={"SDRUNTIME_DEBUG": "1"})
    for kind in ("status", "job", "runtime"):
        assert len(re.findall(rf"^sdruntime: sdr_{kind}_free\(0x[0-9a-f]+\): freed already", loud, flags=re.MULTILINE)) == 1
    assert run(program, *words, env={"SDRUNTIME_DEBUG": "0"}) == "ok foreign_and_freed_handles\n0 of 1 failed\n"


@pytest.mark.parametrize("isolation", ["in-process", "process"])
@pytest.mark.parametrize("damage", ["no manifest", "no JSON", "an engine is gone", "another format"])
def test_bundles_that_are_damaged_are_refused(
    library: Library, bundle: Path, tmp_path: Path, isolation: str, damage: str
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = folder / "manifest.json"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "no JSON":
        manifest.write_text("{")
    elif damage == "an engine is gone":
        shutil.rmtree(folder / "engines")
    else:
        manifest.write_text('{"format": "another"}')
    printed = run(library.program("host.c"), f"isolation={isolation}", f"bundle={folder}", code=1)
    assert printed.startswith("open 5 0 ")
    assert str(folder) in printed
