"""The headers and sources of the C library, which this package includes, and its build by CMake."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sdruntime.errors import EnvironmentFault, SettingError

COMPILERS = ("c++", "g++", "clang++")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `sdruntime capi`."""
    parser.add_argument("--include", action="store_true", help="print the folder of the headers")
    parser.add_argument("--cflags", action="store_true", help="print the options for the compiler")
    parser.add_argument(
        "--libs", nargs="?", const="", metavar="DIR", help="print the options for the linker, for a library in DIR"
    )
    parser.add_argument("--version", action="store_true", help="print the library's version")
    parser.add_argument(
        "--build", type=Path, metavar="DIR", help="build the library and install it into DIR, then print its path"
    )


def selected_lines(options: argparse.Namespace) -> dict[str, str]:
    """Return the requested lines of output by the name of their option. Runs the build for --build."""
    lines = {}
    if options.build is not None:
        lines["build"] = str(build_library(options.build))
    if options.include:
        lines["include"] = str(include_folder())
    if options.cflags:
        lines["cflags"] = shlex.join(compile_flags())
    if options.libs is not None:
        lines["libs"] = shlex.join(link_flags(Path(options.libs) if options.libs else None))
    if options.version:
        lines["version"] = library_version()
    if not lines:
        raise SettingError("capi: give --build DIR, --include, --cflags, --libs [DIR] or --version, or several of them")
    return lines


def source_folder() -> Path:
    """Return the folder with CMakeLists.txt, include/ and src/: in the package, or beside it in a checkout.

    Raises EnvironmentFault if it is in neither.
    """
    package = Path(__file__).parents[1]
    places = (package / "native", package.parent / "capi")
    for place in places:
        if (place / "CMakeLists.txt").is_file():
            return place
    searched = " and ".join(map(str, places))
    raise EnvironmentFault(f"the C library's sources are not in {searched}: pip install --force-reinstall sdruntime")


def include_folder() -> Path:
    """Return the folder of the headers."""
    return source_folder() / "include"


def library_version() -> str:
    """Return the library's version from its header."""
    text = (include_folder() / "sdruntime" / "sdruntime.h").read_text(encoding="utf-8")
    version = re.search(r'#define SDR_VERSION "(.+)"', text)
    assert version
    return version[1]


def compile_flags() -> list[str]:
    """Return the compiler options for a program that includes the headers."""
    return [f"-I{include_folder()}"]


def link_flags(prefix: Path | None = None) -> list[str]:
    """Return the linker options for the library in `prefix`, as `build_library` wrote it; None: in the linker's search path.

    With a prefix, the program also finds the library there when it starts.
    """
    if prefix is None:
        return ["-lsdruntime"]
    folder = prefix.resolve() / "lib"
    return [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lsdruntime"]


def build_library(prefix: Path) -> Path:
    """Build the library, install it with its headers and its files for find_package and pkg-config, and return its path.

    Raises EnvironmentFault if CMake or a C++ compiler is missing, or if the build fails,
    with its last lines.
    """
    source, cmake, compiler, prefix = source_folder(), find_cmake(), find_compiler(), prefix.resolve()
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_INSTALL_PREFIX": str(prefix),
        "CMAKE_INSTALL_LIBDIR": "lib",  # also where the system's is lib64
        "BUILD_SHARED_LIBS": "ON",
    }
    defines = [f"-D{key}={value}" for key, value in settings.items()]
    with tempfile.TemporaryDirectory(prefix="sdruntime-capi-") as folder:
        run([cmake, "-S", str(source), "-B", folder, *defines], CXX=shlex.join(compiler))
        run([cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)])
        run([cmake, "--install", folder])
    return prefix / "lib" / "libsdruntime.so"


def find_cmake() -> str:
    """Return the path of CMake: the one on PATH, or the one that pip installed beside this interpreter."""
    folders = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))
    if cmake := shutil.which("cmake", path=folders):
        return cmake
    raise EnvironmentFault(
        "the C library cannot be built: CMake 3.16 or later is not on PATH. Install it with one of\n"
        "  sudo apt-get install cmake\n"
        f"  {shlex.quote(sys.executable)} -m pip install cmake"
    )


def find_compiler() -> list[str]:
    """Return the command that compiles C++: CXX, which may include flags, or the first of COMPILERS on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    what = f"CXX is {named[0]}, which is not on PATH" if named else f"none of {', '.join(COMPILERS)} is on PATH"
    raise EnvironmentFault(f"no C++ compiler: {what}: sudo apt-get install g++, or set CXX to one")


def run(command: list[str], **variables: str) -> None:
    """Run a command with environment variables. Raises EnvironmentFault with its last lines if it fails."""
    done = subprocess.run(
        command,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last = "\n".join(done.stdout.splitlines()[-30:])
        raise EnvironmentFault(f"the C library was not built: {shlex.join(command)} failed with code {done.returncode}:\n{last}")
