"""The C library's headers and sources, which come with this package, and what builds them into a folder.

CMake builds where there is one, else the compiler directly: both leave the same library, headers and pkg-config file.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from sdruntime.errors import EnvironmentFault, SettingError

COMPILERS = ("c++", "g++", "clang++")
# Keep equal to capi/CMakeLists.txt.
COMPILE = ("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
LINK = ("-shared", "-pthread", "-ldl", "-Wl,-z,nodelete")


def add_arguments(each: argparse.ArgumentParser) -> None:
    each.add_argument("--include", action="store_true", help="print the folder of the headers")
    each.add_argument("--cflags", action="store_true", help="print what the compiler takes")
    each.add_argument("--libs", nargs="?", const="", metavar="DIR", help="print what the linker takes, for a library in DIR")
    each.add_argument("--version", action="store_true", help="print the library's version")
    each.add_argument("--build", type=Path, metavar="DIR", help="build the library and install it into DIR, then print its path")


def answers(options: argparse.Namespace) -> dict[str, str]:
    """What the options of `add_arguments` ask for, by their names: one line each. `build` is done."""
    found = {}
    if options.build is not None:
        found["build"] = str(build_library(options.build))
    if options.include:
        found["include"] = str(include_folder())
    if options.cflags:
        found["cflags"] = shlex.join(compile_flags())
    if options.libs is not None:
        found["libs"] = shlex.join(link_flags(Path(options.libs) if options.libs else None))
    if options.version:
        found["version"] = header_versions()[0]
    if not found:
        raise SettingError("capi: give --build DIR, --include, --cflags, --libs [DIR] or --version, or several of them")
    return found


def source_folder() -> Path:
    """The folder with CMakeLists.txt, include/ and src/: within the package, or beside it in a checkout.

    Raises EnvironmentFault where it is in neither place.
    """
    here = Path(__file__).parent
    places = (here / "native", here.parent / "capi")
    for place in places:
        if (place / "CMakeLists.txt").is_file():
            return place
    searched = " and ".join(map(str, places))
    raise EnvironmentFault(f"the C library's sources are not in {searched}: pip install --force-reinstall sdruntime")


def include_folder() -> Path:
    return source_folder() / "include"


def header_versions() -> tuple[str, int]:
    """That of the library, and the major number of its ABI, as the header has them."""
    text = (include_folder() / "sdruntime" / "sdruntime.h").read_text(encoding="utf-8")
    version, abi = re.search(r'#define SDR_VERSION "(.+)"', text), re.search(r"#define SDR_ABI_MAJOR (\d+)", text)
    assert version
    assert abi
    return version[1], int(abi[1])


def compile_flags() -> list[str]:
    return [f"-I{include_folder()}"]


def link_flags(prefix: Path | None = None) -> list[str]:
    """`prefix`: what `build_library` wrote to, where the program then finds the library; None: a place that the linker knows."""
    if prefix is None:
        return ["-lsdruntime"]
    folder = prefix.resolve() / "lib"
    return [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lsdruntime"]


def build_library(prefix: Path) -> Path:
    """Compile the library and install it with its headers and what find_package and pkg-config read; returns lib/libsdruntime.so.

    Raises EnvironmentFault where there is no C++ compiler, or where the build fails, with its last lines.
    """
    source, compiler, cmake, prefix = source_folder(), find_compiler(), shutil.which("cmake"), prefix.resolve()
    with tempfile.TemporaryDirectory(prefix="sdruntime-capi-") as folder:
        if cmake:
            build_with_cmake(cmake, compiler, source, Path(folder), prefix)
        else:
            build_with_compiler(compiler, source, Path(folder), prefix)
    return prefix / "lib" / "libsdruntime.so"


def find_compiler() -> list[str]:
    """The command that compiles C++: CXX, which may hold flags too, else the first of COMPILERS on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    what = f"CXX is {named[0]}, which is not there" if named else f"none of {', '.join(COMPILERS)} is on PATH"
    raise EnvironmentFault(f"no C++ compiler: {what}: sudo apt-get install g++, or set CXX to one")


def build_with_cmake(cmake: str, compiler: list[str], source: Path, folder: Path, prefix: Path) -> None:
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_INSTALL_PREFIX": str(prefix),
        "CMAKE_INSTALL_LIBDIR": "lib",  # also where the system's is lib64
        "BUILD_SHARED_LIBS": "ON",
    }
    defines = [f"-D{key}={value}" for key, value in settings.items()]
    run([cmake, "-S", str(source), "-B", str(folder), *defines], CXX=shlex.join(compiler))
    run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
    run([cmake, "--install", str(folder)])


def build_with_compiler(compiler: list[str], source: Path, folder: Path, prefix: Path) -> None:
    version, abi = header_versions()
    soname, library = f"libsdruntime.so.{abi}", f"libsdruntime.so.{version}"
    sources = [str(path) for path in sorted((source / "src").rglob("*.cpp"))]
    flags = [*COMPILE, *shlex.split(os.environ.get("CXXFLAGS", "")), f"-I{source / 'include'}", f"-I{source / 'src'}"]
    exports = f"-Wl,--version-script={source / 'src' / 'sdruntime.map'}"
    run([*compiler, *flags, *sources, *LINK, f"-Wl,-soname,{soname}", exports, "-o", str(folder / library)])
    lib = prefix / "lib"
    (lib / "pkgconfig").mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / "include", prefix / "include", dirs_exist_ok=True)
    (lib / library).unlink(missing_ok=True)  # a program that runs keeps the former one
    shutil.copy(folder / library, lib / library)
    for name, target in ((soname, library), ("libsdruntime.so", soname)):
        (lib / name).unlink(missing_ok=True)
        (lib / name).symlink_to(target)
    text = (source / "cmake" / "sdruntime.pc.in").read_text(encoding="utf-8")
    values = {"PREFIX": "${pcfiledir}/../..", "LIBDIR": "${prefix}/lib", "INCLUDEDIR": "${prefix}/include", "VERSION": version}
    for key, value in values.items():
        text = text.replace(f"@SDR_{key}@", value)
    (lib / "pkgconfig" / "sdruntime.pc").write_text(text, encoding="utf-8")


def run(command: list[str], **variables: str) -> None:
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
        raise EnvironmentFault(f"the C library was not built: {shlex.join(command)} ended with {done.returncode}:\n{last}")
