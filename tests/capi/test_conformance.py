"""The conformance suite of sdruntime.h: in process, in a worker process, and with a stand-in for the service."""

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
def test_sanitizers_report_nothing_in_the_library(build: Build, empty_bundle: Path, kind: str) -> None:
    conformance(build(kind), "process", empty_bundle, STAND_IN)


@pytest.mark.full
@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_the_sanitizer_reports_nothing_with_the_service(build: Build, bundle: Path, isolation: str) -> None:
    """Python and the engines keep memory until the process ends (lsan.supp); the library must not."""
    conformance(build("asan"), isolation, bundle, env={"LSAN_OPTIONS": f"suppressions={HERE / 'lsan.supp'}:print_suppressions=0"})


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_a_callback_that_throws_ends_its_own_job(library: Library, bundle: Path, isolation: str) -> None:
    assert run(library.program("throwing.cpp"), isolation, bundle).startswith("0 faults")


@pytest.mark.parametrize("kind", ["plain", "asan", "tsan"])
def test_an_exception_of_the_log_callback_is_discarded(build: Build, empty_bundle: Path, kind: str) -> None:
    assert run(build(kind).program("throwing.cpp"), "process", empty_bundle, STAND_IN) == "0 faults, 2 lines\n"


def test_freeing_twice_is_reported_in_debug_mode(library: Library, empty_bundle: Path) -> None:
    program = library.program(*(HERE / "conformance" / name for name in SOURCES), name="conformance")
    words = ("process", empty_bundle, STAND_IN, "-", "foreign_and_freed_handles")
    loud = run(program, *words, env={"SDRUNTIME_DEBUG": "1"})
    for kind in ("status", "job", "runtime"):
        assert len(re.findall(rf"^sdruntime: sdr_{kind}_free\(0x[0-9a-f]+\): already freed", loud, flags=re.MULTILINE)) == 1
    assert run(program, *words, env={"SDRUNTIME_DEBUG": "0"}) == "ok foreign_and_freed_handles\n0 of 1 failed\n"


@pytest.mark.parametrize("isolation", ["in-process", "process"])
@pytest.mark.parametrize("damage", ["no manifest", "invalid JSON", "missing engines", "unknown format"])
def test_damaged_bundles_are_rejected(library: Library, bundle: Path, tmp_path: Path, isolation: str, damage: str) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    manifest = folder / "manifest.json"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "invalid JSON":
        manifest.write_text("{")
    elif damage == "missing engines":
        shutil.rmtree(folder / "engines")
    else:
        manifest.write_text('{"format": "another"}')
    printed = run(library.program("host.c"), f"isolation={isolation}", f"bundle={folder}", code=1)
    assert printed.startswith("open 5 0 ")
    assert str(folder) in printed
