"""One suite for every implementation of sdruntime.h: in this process, in a worker, and with a stand-in for the service."""

from __future__ import annotations

from pathlib import Path

import pytest
from capi.building import HERE, STAND_IN, Library, run
from capi.conftest import Build

SOURCES = ("harness.c", "arguments.c", "results.c", "callbacks.c", "lifetime.c")


def conformance(library: Library, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
    program = library.program(*(HERE / "conformance" / name for name in SOURCES), name="conformance")
    printed = run(program, *arguments, env=env)
    assert "0 of 29 failed" in printed, printed


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
