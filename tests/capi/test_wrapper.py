"""The C++ header: in each standard, in two files linked together, with a stand-in for the service and with the service."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from capi.building import HERE, INCLUDE, STAND_IN, WARNINGS, Library, compiler, run
from capi.conftest import Build

STANDARDS = {"c++17": 201703, "c++20": 202002, "c++23": 202100}  # the minimum value of __cplusplus


def wrapper(library: Library, standard: str) -> Path:
    known = subprocess.run(
        [compiler("c++"), f"-std={standard}", "-E", "-x", "c++", "/dev/null"], capture_output=True, check=False
    )
    if known.returncode:
        pytest.skip(f"this compiler does not support {standard}")
    unit = library.folder / "wrapper_unit.o"
    if not unit.exists():
        run(compiler("c++"), "-std=c++17", *WARNINGS, *library.flags, f"-I{INCLUDE}", "-c", HERE / "wrapper_unit.cpp", "-o", unit)
    # with optimisation, GCC 12 falsely reports a std::stop_source as uninitialised
    flags = (f"-std={standard}", "-Wno-maybe-uninitialized")
    return library.program("wrapper.cpp", unit, name=f"wrapper-{standard}", flags=flags)


def check(program: Path, standard: str, *arguments: str | Path) -> str:
    printed = run(program, *arguments)
    last = printed.splitlines()[-1].split()
    assert last[:4] == ["0", "faults", "as", "C++"], printed
    assert int(last[4]) >= STANDARDS[standard]
    return printed


@pytest.mark.parametrize("standard", STANDARDS)
def test_the_header_works_in_each_standard(library: Library, empty_bundle: Path, standard: str) -> None:
    assert "lines of the log\n" in check(wrapper(library, standard), standard, "process", empty_bundle, STAND_IN)


@pytest.mark.parametrize("isolation", ["in-process", "process"])
def test_the_header_works_with_the_service(library: Library, bundle: Path, isolation: str) -> None:
    check(wrapper(library, "c++20"), "c++20", isolation, bundle, "-")


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_the_sanitizers_report_nothing_in_the_header(build: Build, empty_bundle: Path, kind: str) -> None:
    check(wrapper(build(kind), "c++20"), "c++20", "process", empty_bundle, STAND_IN)


def test_the_header_needs_no_rtti_and_defines_no_macro(tmp_path: Path) -> None:
    """Except for its include guard, all macros come from the C header."""
    source = tmp_path / "included.cpp"
    source.write_text('#include "sdruntime/sdruntime.hpp"\n')
    strict = ("-fno-rtti", "-Wshadow", "-Wconversion", "-Wold-style-cast", "-Wnon-virtual-dtor")
    run(compiler("c++"), "-std=c++17", *WARNINGS, *strict, f"-I{INCLUDE}", "-c", source, "-o", tmp_path / "included.o")
    macros = run(compiler("c++"), "-std=c++17", "-dM", "-E", f"-I{INCLUDE}", source)
    ours = {name for name in (line.split()[1] for line in macros.splitlines()) if name.upper().startswith(("SDR", "SD_"))}
    assert ours == {"SDRUNTIME_HPP", "SDRUNTIME_H", "SDR_API", "SDR_VERSION", "SDR_ABI_MAJOR", "SDR_ABI_MINOR"}
