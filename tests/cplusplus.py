"""Compiling C and C++ in tests. Without the tools they fail, unless SDRUNTIME_NO_COMPILER=1 skips them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

EXAMPLES = ROOT / "examples" / "cpp"
HEADER = ROOT / "runtime" / "capi" / "include" / "sdruntime" / "sdruntime.h"
TOOLS = ("c++", "cc", "cmake", "make", "pkg-config", "nm", "readelf")


def require_compiler() -> None:
    if os.environ.get("SDRUNTIME_NO_COMPILER") == "1":
        pytest.skip("SDRUNTIME_NO_COMPILER=1: nothing is compiled")
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.fail(
            f"{', '.join(missing)}: not on PATH: sudo apt-get install g++ cmake pkg-config, or SDRUNTIME_NO_COMPILER=1 to leave "
            "out the tests that compile",
            pytrace=False,
        )


def environment(**variables: str) -> dict[str, str]:
    """That of a host program, whose interpreter is this one with this tree's sdruntime, and nothing else of this process's."""
    unwanted = ("VIRTUAL_ENV", "SDRUNTIME_", "PKG_CONFIG", "LD_LIBRARY_PATH", "CXX", "CFLAGS", "MAKE", "MFLAGS")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return clean | {"PYTHONPATH": str(ROOT / "runtime"), "SDRUNTIME_PYTHON": sys.prefix} | variables


def run(*command: str | Path, code: int = 0, **variables: str) -> str:
    """What a command printed, both streams."""
    words = [str(part) for part in command]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=300, env=environment(**variables)
    )
    assert done.returncode == code, f"{' '.join(words)}: {done.returncode}\n{done.stdout[-6000:]}"
    return done.stdout


def install(prefix: Path) -> Path:
    """The library of this tree as users install it; the objects stay in build/capi from one session to the next."""
    require_compiler()
    run("make", "-C", ROOT, "install-capi", f"PREFIX={prefix}")
    return prefix


def functions_of_header() -> set[str]:
    return set(re.findall(r"^SDR_API [^(;]*?\b(\w+)\(", HEADER.read_text(encoding="utf-8"), flags=re.MULTILINE))


def exported(library: Path) -> set[str]:
    lines = run("nm", "--dynamic", "--defined-only", library).splitlines()
    return {line.split()[-1] for line in lines}


def soname(library: Path) -> str:
    [name] = re.findall(r"\(SONAME\).*\[(.+)\]", run("readelf", "--dynamic", library))
    return str(name)
