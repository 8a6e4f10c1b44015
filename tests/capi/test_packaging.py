"""The installed C library: its exports, CMake and pkg-config files, and building it from the wheel."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cplusplus import EXAMPLES, HEADER, ROOT, exported, functions_of_header, require_compiler, run, soname

import sdruntime
from sdruntime.__main__ import main
from sdruntime.errors import EnvironmentFault
from sdruntime.serving import capi

ABI = int(re.search(r"#define SDR_ABI_MAJOR (\d+)", HEADER.read_text(encoding="utf-8"))[1])  # type: ignore[index]
PROGRAM = """
#include <sdruntime/sdruntime.h>
#include <stdio.h>
int main(void) {
    sdr_runtime *runtime = NULL;
    sdr_status *status = sdr_runtime_open(NULL, &runtime);
    printf("%s %d %s\\n", sdr_version(), (int)sdr_status_code(status), sdr_version()[0] == SDR_VERSION[0] ? "same" : "other");
    sdr_status_free(status);
    return 0;
}
"""
PROJECT = """
cmake_minimum_required(VERSION 3.16)
project(host LANGUAGES C)
find_package(sdruntime ${WANTED} REQUIRED)
message(STATUS "found ${sdruntime_VERSION} abi ${sdruntime_ABI_VERSION}")
add_executable(host host.c)
target_link_libraries(host PRIVATE sdruntime::sdruntime)
"""


@pytest.fixture
def moved(capi_prefix: Path, tmp_path: Path) -> Path:
    """Return a copy of the installation in a folder with a space in its name."""
    return Path(shutil.copytree(capi_prefix, tmp_path / "another place", symlinks=True))


def test_the_library_exports_the_functions_of_the_header_and_nothing_else(capi_prefix: Path) -> None:
    assert len(functions_of_header()) >= 20
    assert exported(capi_prefix / "lib" / "libsdruntime.so") == functions_of_header()


def test_it_loads_without_python(capi_prefix: Path) -> None:
    library = capi_prefix / "lib" / "libsdruntime.so"
    assert "python" not in run("readelf", "--dynamic", library)
    undefined = {line.split()[-1] for line in run("nm", "--dynamic", "--undefined-only", library).splitlines()}
    assert "dlopen" in {name.split("@")[0] for name in undefined}
    assert [name for name in undefined if name.startswith(("Py", "_Py"))] == []


def test_names_and_versions_agree(capi_prefix: Path) -> None:
    lib = capi_prefix / "lib"
    library = lib / f"libsdruntime.so.{sdruntime.__version__}"
    assert soname(library) == f"libsdruntime.so.{ABI}"
    assert not library.is_symlink()
    assert (lib / "libsdruntime.so").resolve() == (lib / f"libsdruntime.so.{ABI}").resolve() == library.resolve()
    loaded = ctypes.CDLL(str(library))
    loaded.sdr_version.restype = ctypes.c_char_p
    loaded.sdr_abi_version.restype = ctypes.c_uint32
    assert loaded.sdr_version().decode() == sdruntime.__version__
    assert loaded.sdr_abi_version() >> 16 == ABI


def test_both_headers_and_nothing_else_are_installed(capi_prefix: Path) -> None:
    names = sorted(path.name for path in (capi_prefix / "include").rglob("*") if path.is_file())
    assert names == ["sdruntime.h", "sdruntime.hpp"]


def test_find_package_works_for_a_host_in_c(moved: Path, tmp_path: Path) -> None:
    (tmp_path / "host.c").write_text(PROGRAM)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    build = tmp_path / "build"
    configure = ("cmake", "-S", tmp_path, "-B", build, f"-DCMAKE_PREFIX_PATH={moved}")
    major, minor, _ = sdruntime.__version__.split(".")
    assert f"found {sdruntime.__version__} abi {ABI}" in run(*configure, f"-DWANTED={major}.{minor}")
    run("cmake", "--build", build)
    assert run(build / "host") == f"{sdruntime.__version__} 2 same\n"
    for wanted in (f"{int(major) + 1}.0", f"{major}.{int(minor) + 1}"):
        refused = " ".join(run(*configure, f"-DWANTED={wanted}", code=1).split())
        assert f'compatible with requested version "{wanted}"' in refused
        assert f"version: {sdruntime.__version__}" in refused


def test_pkg_config_works_for_a_host_in_c(moved: Path, tmp_path: Path) -> None:
    (tmp_path / "host.c").write_text(PROGRAM)
    where = {"PKG_CONFIG_PATH": str(moved / "lib" / "pkgconfig")}
    assert run("pkg-config", "--modversion", "sdruntime", **where).strip() == sdruntime.__version__
    flags = run("pkg-config", "--cflags", "--libs", "sdruntime", **where).strip()
    run("sh", "-c", f"cc -std=c99 -Wall -Wextra -Wpedantic -Werror '{tmp_path}/host.c' {flags} -o '{tmp_path}/host'")
    assert run(tmp_path / "host", LD_LIBRARY_PATH=str(moved / "lib")) == f"{sdruntime.__version__} 2 same\n"


def test_a_program_built_with_the_flags_of_capi_finds_the_library(capi_prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "host.c").write_text(PROGRAM)
    flags = run(sys.executable, "-m", "sdruntime", "capi", "--cflags", "--libs", capi_prefix).replace("\n", " ")
    run("sh", "-c", f"cc '{tmp_path}/host.c' {flags} -o '{tmp_path}/host'")
    assert run(tmp_path / "host") == f"{sdruntime.__version__} 2 same\n"


def test_without_cmake_the_build_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "c++").symlink_to(str(shutil.which("c++")))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    with pytest.raises(EnvironmentFault) as raised:
        capi.build_library(tmp_path / "sdr")
    first, *ways = str(raised.value).splitlines()
    assert "CMake 3.16 or later is not on PATH" in first
    assert [way.strip() for way in ways] == ["sudo apt-get install cmake", f"{tmp_path}/bin/python -m pip install cmake"]
    assert raised.value.exit_code == 3
    assert not (tmp_path / "sdr").exists()
    (tmp_path / "bin").mkdir()
    cmake = tmp_path / "bin" / "cmake"
    cmake.write_text("#!/bin/sh\n")
    cmake.chmod(0o755)
    assert capi.find_cmake() == str(cmake), "pip installs it beside the interpreter"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CXX": "", "PATH": "TOOLS"}, "none of c++, g++, clang++ is on PATH: sudo apt-get install g++"),
        ({"CXX": "no-such-compiler -m32"}, "CXX is no-such-compiler, which is not on PATH"),
        ({"CXX": "false"}, "the C library was not built"),
    ],
    ids=["no compiler", "CXX does not exist", "CXX fails"],
)
def test_a_failed_build_says_why(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    tools = tmp_path / "TOOLS"
    tools.mkdir()
    (tools / "cmake").symlink_to(str(shutil.which("cmake")))
    variables = {key: value.replace("TOOLS", str(tools)) for key, value in variables.items()}
    printed = run(sys.executable, "-m", "sdruntime", "capi", "--build", tmp_path, code=3, **variables)
    assert message in printed
    assert not (tmp_path / "lib").exists()


def test_without_a_compiler_tests_fail_unless_they_are_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SDRUNTIME_NO_COMPILER", "0")
    with pytest.raises(pytest.fail.Exception, match="not on PATH: sudo apt-get install"):
        require_compiler()
    monkeypatch.setenv("SDRUNTIME_NO_COMPILER", "1")
    with pytest.raises(pytest.skip.Exception, match="nothing is compiled"):
        require_compiler()


def test_capi_prints_paths_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    include = HEADER.parents[1]
    assert main(["capi", "--include", "--cflags", "--libs", "--version"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(include), f"-I{include}", "-lsdruntime", sdruntime.__version__]
    assert main(["capi"]) == 2
    assert "give --build DIR" in capsys.readouterr().err


@pytest.mark.full
def test_a_static_library_can_be_linked(tmp_path: Path) -> None:
    require_compiler()
    prefix, build = tmp_path / "prefix", tmp_path / "build"
    run("cmake", "-S", ROOT / "runtime" / "capi", "-B", build, "-DBUILD_SHARED_LIBS=OFF")
    run("cmake", "--build", build, "--parallel")
    run("cmake", "--install", build, "--prefix", prefix)
    assert [path.name for path in (prefix / "lib").glob("lib*")] == ["libsdruntime.a"]
    run("cmake", "-S", EXAMPLES, "-B", tmp_path / "examples", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path / "examples", "--target", "generate")
    assert "usage: generate" in run(tmp_path / "examples" / "generate", code=2)


@pytest.mark.full
def test_the_wheel_suffices_on_a_device(bundle: Path, tmp_path: Path) -> None:
    """Install the wheel in a new environment, build the library from it, and generate an image with a program that uses it."""
    require_compiler()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SDRUNTIME_", "VIRTUAL_ENV"))}

    def run_clean(*command: str | Path) -> str:
        words = [str(part) for part in command]
        return subprocess.run(words, check=True, cwd=tmp_path, env=clean, capture_output=True, text=True).stdout

    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run_clean(sys.executable, "-m", "venv", tmp_path / "tool")
    run_clean(tmp_path / "tool" / "bin" / "python", *pip, "install", "hatchling", "build")
    run_clean(tmp_path / "tool" / "bin" / "python", "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT / "runtime")
    [wheel] = tmp_path.glob("*.whl")
    inside = {name.removeprefix("sdruntime/native/") for name in zipfile.ZipFile(wheel).namelist() if "/native/" in name}
    source = ROOT / "runtime" / "capi"
    assert inside == {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}

    run_clean(sys.executable, "-m", "venv", tmp_path / "device")
    bin = tmp_path / "device" / "bin"
    run_clean(bin / "python", *pip, "install", f"{wheel}[onnxruntime]")
    prefix = tmp_path / "prefix"
    run_clean(bin / "sdruntime", "capi", "--build", prefix)
    flags = run_clean(bin / "sdruntime", "capi", "--cflags", "--libs", prefix).split()
    assert flags[0].startswith(f"-I{tmp_path / 'device'}")
    run_clean("c++", "-std=c++17", EXAMPLES / "generate.cpp", *flags, "-o", tmp_path / "generate")
    clean["VIRTUAL_ENV"] = str(tmp_path / "device")
    run_clean(tmp_path / "generate", bundle, "the red cat", tmp_path / "by-c.png", "7", "4", "5")
    run_clean(
        bin / "sdruntime",
        "generate",
        bundle,
        "the red cat",
        "--seed",
        "7",
        "--steps",
        "4",
        "--guidance",
        "5",
        "-o",
        "by.png",
    )
    assert (tmp_path / "by-c.png").read_bytes() == (tmp_path / "by.png").read_bytes()
