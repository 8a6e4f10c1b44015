"""Compile the C library and its test programs with the compiler of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cplusplus import require_compiler
from once import alone

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CAPI = ROOT / "runtime" / "capi"
INCLUDE = CAPI / "include"
STAND_IN = HERE / "stand_in.py"
WARNINGS = ("-Wall", "-Wextra", "-pedantic", "-Werror")
SANITIZERS = {
    "plain": ("-O1",),
    # without optimisation, which would double the compile time
    "asan": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "tsan": ("-fsanitize=thread",),
}
TIMEOUT = 360  # seconds; a program that runs longer has hung


def run(*command: str | Path, env: dict[str, str] | None = None, code: int | None = 0, **options: object) -> str:
    """Run a program and return what it printed. Its exit code must be `code` (None: any)."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
        env=None if env is None else {**os.environ, **env},
        **options,  # type: ignore[call-overload]
    )
    printed = f"{done.stdout}{done.stderr}"
    assert code is None or done.returncode == code, f"{command[0]} exited with {done.returncode}\n{printed[-6000:]}"
    return printed


def compiler(name: str) -> str:
    require_compiler()
    return str(shutil.which(name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One build of the library, with the programs that are linked with it."""

    folder: Path
    flags: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.folder / "libsdruntime.so"

    def program(self, *sources: Path | str, name: str | None = None, flags: Iterable[str] = (), include: Path = INCLUDE) -> Path:
        """Compile a program, as C99 or C++17 depending on the name of its first source, and return its path."""
        paths = [HERE / source for source in sources]
        first, standard = ("c++", "-std=c++17") if paths[0].suffix == ".cpp" else ("cc", "-std=c99")
        out = self.folder / (name or paths[0].stem)
        link = (f"-L{self.folder}", "-lsdruntime", f"-Wl,-rpath,{self.folder}", "-ldl")
        posix = ("-D_GNU_SOURCE", "-g", "-pthread")
        command = (standard, *posix, *WARNINGS, *self.flags, f"-I{include}", *flags, *map(str, paths), "-o", str(out), *link)
        with alone(out):
            if not out.exists():
                run(compiler(first), *command)
        return out


def build_library(folder: Path, flags: Sequence[str]) -> None:
    """Build the library in the new `folder`."""
    folder.mkdir()
    objects = []

    def compile_source(source: Path) -> None:
        out = folder / f"{source.stem}.o"
        objects.append(str(out))
        includes = (f"-I{INCLUDE}", f"-I{CAPI / 'src'}")
        options = ("-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-pthread", *WARNINGS, *flags, *includes)
        run(compiler("c++"), *options, "-c", source, "-o", out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_source, sorted((CAPI / "src").rglob("*.cpp"))))
    script = f"-Wl,--version-script={CAPI / 'src' / 'sdruntime.map'}"
    complete = ("-Wl,--no-undefined",) if flags == SANITIZERS["plain"] else ()  # the symbols of a sanitizer are in the program
    link = ("-shared", "-pthread", "-Wl,-soname,libsdruntime.so", script, *complete)
    run(compiler("c++"), *link, *flags, *objects, "-ldl", "-o", folder / "libsdruntime.so")
